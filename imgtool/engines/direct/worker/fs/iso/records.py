"""Volume descriptors and directory records of ISO 9660, with Joliet's and Rock Ridge's additions.

Source: ECMA-119; the Joliet specification; IEEE P1281 (SUSP) and P1282 (Rock Ridge); Linux,
fs/isofs/inode.c, namei.c, joliet.c, rock.c and util.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Source
from imgtool.engines.direct.worker.fs.pages import Pages

BLOCK = 2048
_FIRST_DESCRIPTOR = 16
_MOST_DESCRIPTORS = 84
_PRIMARY, _SUPPLEMENTARY, _TERMINATOR = 1, 2, 255
_JOLIET = (b"%/@", b"%/C", b"%/E")
DIRECTORY, ASSOCIATED = 0x02, 0x04
_KNOWN_FLAGS = 0x01 | DIRECTORY | ASSOCIATED
_MOST_CONTINUATIONS = 16


class Volume(NamedTuple):
    """The descriptors: size in blocks, and the blocks of the root directories."""

    blocks: int
    primary_root: int
    joliet_root: int | None


class Record(NamedTuple):
    """One directory record as it lies on the volume, `place` in bytes."""

    place: int
    extent: int
    size: int
    flags: int
    mtime: int
    name: bytes
    system_use: bytes

    @property
    def is_dot(self) -> bool:
        return self.name in (b"\0", b"\1")


def read_volume(source: Source) -> Volume:
    """The descriptors of a volume that has nothing odd; `Unsupported` for any other."""
    primary: tuple[int, int] | None = None
    joliet: int | None = None
    for number in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + _MOST_DESCRIPTORS):
        if (number + 1) * BLOCK > source.size:
            break
        block = source.read(number * BLOCK, BLOCK)
        if block[1:6] != b"CD001":
            break
        if block[0] == _TERMINATOR:
            if primary is None:
                break
            return Volume(primary[0], primary[1], joliet)
        if block[0] == _PRIMARY and primary is None:
            primary = _read_descriptor(block, source)
        elif block[0] == _SUPPLEMENTARY and block[88:91] in _JOLIET and joliet is None:
            joliet = _read_descriptor(block, source)[1]
    raise Unsupported("the volume descriptors are not those of ISO 9660")


def _read_descriptor(block: bytes, source: Source) -> tuple[int, int]:
    (blocks,) = struct.unpack_from("<I", block, 80)
    (size,) = struct.unpack_from("<H", block, 128)
    if size != BLOCK or block[6] != 1:
        raise Unsupported(f"ISO 9660 with blocks of {size} bytes")
    root = _record(block[156:190], 0)
    if not root.flags & DIRECTORY or not 0 < blocks * BLOCK <= source.size:
        raise Unsupported("ISO 9660 with areas outside of the volume")
    return blocks, root.extent


def read_record(source: Pages, place: int) -> Record:
    """The record at a place; none crosses the end of a block."""
    room = BLOCK - place % BLOCK
    raw = source.read(place, room)
    if not 34 <= raw[0] <= room:
        raise Unsupported("a directory record of ISO 9660 is damaged")
    return _record(raw[: raw[0]], place)


def records(source: Pages, extent: int, size: int) -> Iterator[Record]:
    """The records of a directory, `.` and `..` first."""
    for start in range(extent * BLOCK, extent * BLOCK + size, BLOCK):
        block = source.read(start, BLOCK)
        at = 0
        while at < BLOCK and block[at]:
            length = block[at]
            if length < 34 or at + length > BLOCK:
                raise Unsupported("a directory record of ISO 9660 is damaged")
            yield _record(block[at : at + length], start + at)
            at += length


def _record(raw: bytes, place: int) -> Record:
    extent, size = struct.unpack_from("<I4xI", raw, 2)
    flags, unit, gap = raw[25], raw[26], raw[27]
    if raw[1] or unit or gap or flags & ~_KNOWN_FLAGS:
        raise Unsupported("a file on ISO 9660 is interleaved, in sections or has attributes")
    end = 33 + raw[32]
    if raw[32] == 0 or end > len(raw):
        raise Unsupported("a directory record of ISO 9660 is damaged")
    system_use = raw[end + (1 - raw[32] % 2) :]
    return Record(place, extent, size, flags, unix_time(raw[18:25]), raw[33:end], system_use)


def unix_time(stamp: bytes) -> int:
    """Seconds since 1970 of the seven bytes; the last counts quarters of an hour off UTC."""
    year, month, day, hour, minute, second, zone = struct.unpack("<6Bb", stamp)
    try:
        local = datetime(1900 + year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        raise Unsupported("a time on ISO 9660 is impossible") from None
    if not -52 <= zone <= 52:
        raise Unsupported("a time zone on ISO 9660 is impossible")
    return int((local - timedelta(minutes=15 * zone)).timestamp())


def plain_name(name: bytes) -> bytes:
    """A name of plain ISO 9660: lower case, without version and empty extension."""
    name = name.split(b"\0")[0].lower()
    for ending in (b".;1", b";1"):
        if name.endswith(ending):
            name = name[: -len(ending)]
            break
    return checked_name(name.replace(b";", b".").replace(b"/", b"."))


def joliet_name(name: bytes) -> bytes:
    """A name of Joliet: UTF-16, without version and dots at its end."""
    try:
        text = name.decode("utf-16-be").encode()
    except UnicodeDecodeError:
        raise Unsupported("a name of Joliet is not UTF-16") from None
    text = text.removesuffix(b";1") if len(text) > 2 else text
    while len(text) >= 2 and text.endswith(b"."):
        text = text[:-1]
    return checked_name(text)


def checked_name(name: bytes) -> bytes:
    """The name, if it can be one."""
    if not name or b"/" in name or b"\0" in name or name in (b".", b"..") or len(name) > 253:
        raise Unsupported("a name on ISO 9660 is impossible")
    return name


def system_use_fields(source: Pages, area: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a system use area and of what continues it: signature and payload."""
    for _ in range(_MOST_CONTINUATIONS):
        following: tuple[int, int, int] | None = None
        at = 0
        while at + 4 <= len(area):
            signature, length = area[at : at + 2], area[at + 2]
            if signature == b"\0\0":
                break
            if length < 4 or at + length > len(area):
                raise Unsupported("a system use area of ISO 9660 is damaged")
            payload = area[at + 4 : at + length]
            if signature == b"CE":
                if len(payload) != 24 or following:
                    raise Unsupported("a system use area of ISO 9660 is damaged")
                following = struct.unpack("<I4xI4xI4x", payload)
            elif signature == b"ST":
                break
            else:
                yield signature, payload
            at += length
        if following is None:
            return
        block, offset, length = following
        if offset + length > BLOCK:
            raise Unsupported("a system use area of ISO 9660 is damaged")
        area = source.read(block * BLOCK + offset, length)
    raise Unsupported("a system use area of ISO 9660 has no end")
