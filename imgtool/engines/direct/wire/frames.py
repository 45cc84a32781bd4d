"""The language of the worker: frames with a kind and a length, JSON or raw bytes inside.

Both ends use this module, and each takes the other for hostile: a frame that is too long, of no
known kind, or not what was asked for ends the conversation with `BadMessage`.
"""

from __future__ import annotations

import base64
import json
import os
import struct
from typing import BinaryIO, Protocol

from imgtool.formats.xattrs import Xattrs

LARGEST = 8 << 20
_HEAD = struct.Struct(">cI")

JSON = b"J"  # a part of the answer
DATA = b"D"  # raw bytes of the answer
ERROR = b"E"  # the answer is, or ends with, an error: {"kind": ..., "message": ..., ...}
END = b"."  # the answer is complete
ALIVE = b"~"  # nothing yet, but at work
READY = b"!"  # nothing yet: the sandbox is closed; before the first request
GRANT = b"L"  # raw bytes of the answer that are in the shared memory: where, and how many
_KINDS = (JSON, DATA, ERROR, END, ALIVE, READY, GRANT)
_EMPTY = (END, ALIVE, READY)

# What the parent says of an answer on its way: that it wants no more, or that it has done with what
# was lent. A request has its length there.
STOP = bytes(4)
RELEASE = b"\xff\xff\xff\xff"

# More block devices, or volume groups with what is in them, are not told of.
MOST_DEVICES = 4096

# What is told of a block device, in this order.
# Why a filesystem is not mounted, where the guest could not mount it either.
NO_PLACE = "there is no such directory"

BLOCK = (
    *("device", "kind", "size", "type", "label", "uuid", "partuuid", "partlabel", "parttype"),
    "dm_uuid",
    "parents",
)


class BadMessage(Exception):
    """What arrived is not what this protocol allows."""


class Ended(BadMessage):
    """Nothing more arrives."""


def send(stream: BinaryIO, kind: bytes, payload: bytes | bytearray = b"") -> None:
    """Write one frame; the caller flushes."""
    stream.write(_HEAD.pack(kind, len(payload)))
    stream.write(payload)


def send_json(stream: BinaryIO, kind: bytes, value: object) -> None:
    """Write one frame of JSON."""
    send(stream, kind, json.dumps(value, separators=(",", ":")).encode("ascii"))


class Readable(Protocol):
    """What frames are read from."""

    def read(self, length: int, /) -> bytes:
        """So many bytes; fewer at the end."""


def _exactly(stream: Readable, length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise Ended("the other end went away")
    return data


def receive(stream: Readable) -> tuple[bytes, bytes]:
    """Read one frame: its kind and its payload."""
    kind, length = _HEAD.unpack(_exactly(stream, _HEAD.size))
    if kind not in _KINDS or length > LARGEST:
        raise BadMessage("a frame of unknown kind or of too many bytes")
    # Who waits for something is not kept waiting with nothing.
    if (length == 0) != (kind in _EMPTY):
        raise BadMessage("a frame without what should be in it")
    return kind, _exactly(stream, length)


def parse_json(payload: bytes) -> object:
    """The value in a frame of JSON."""
    try:
        value: object = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadMessage("not JSON") from error
    return value


def pairs(xattrs: Xattrs) -> list[list[str]]:
    """Extended attributes as JSON carries them: names as `text`, values in base64."""
    return [[text(name), base64.b64encode(value).decode("ascii")] for name, value in xattrs]


def text(name: bytes) -> str:
    """A name as JSON carries it: bytes that are not UTF-8 become lone surrogates."""
    return os.fsdecode(name)


def name(value: object) -> bytes:
    """The bytes of a name that `text` made."""
    if not isinstance(value, str):
        raise BadMessage("a name that is no string")
    try:
        return os.fsencode(value)
    except UnicodeEncodeError as error:
        raise BadMessage("a name that is no name") from error
