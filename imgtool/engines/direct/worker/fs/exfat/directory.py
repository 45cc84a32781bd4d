"""Entry sets of exFAT directories: names, times and places, as the kernel's exfat has them.

The kernel takes a lot that the specification forbids, and its versions differ in what they take:
only sets that are whole, with their checksums, are read here.

Source: the exFAT file system specification (Microsoft), sections 6 "Directory Structure" and 7
"Directory Entry Definitions", and Linux, fs/exfat/dir.c and fs/exfat/misc.c.
"""

from __future__ import annotations

import calendar
import struct
from collections.abc import Iterator
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.exfat.boot import numbers, rotated_sum

ENTRY = 32
READ_ONLY, DIRECTORY = 0x01, 0x10
FAT_CHAIN, NO_FAT_CHAIN = 0x01, 0x03
BITMAP, UPCASE, LABEL, FILE, GUID = 0x81, 0x82, 0x83, 0x85, 0xA0
_STREAM, _NAME = 0xC0, 0xC1
_IN_USE = 0x80
_ATTRIBUTES = 0x37  # read-only, hidden, system, directory, archive
_NAME_PART = 15  # characters in one entry
_FORBIDDEN = frozenset('"*/:<>?\\|')
_TABLE_SIZE = 1 << 16
_SKIP = 0xFFFF
_CHECKSUM_AT = (2, 3)
_UTC_VALID = 0x80
_QUARTER = 15 * 60


class Content(NamedTuple):
    """What an entry set says, but for the name. `mtime_ns` is nanoseconds since 1970."""

    attributes: int
    chained: bool  # in the table; else the clusters lie side by side
    cluster: int
    size: int
    mtime_ns: int


class Entry(NamedTuple):
    """A file or directory: its name in UTF-8 and in upper case, and where its set lies in the
    directory, in bytes.
    """

    name: bytes
    folded: bytes
    position: int


class Upcase:
    """The up-case table of a volume: 65,536 characters of 16 bits."""

    def __init__(self, compressed: bytes, checksum: int) -> None:
        """Raises `Unsupported` for a table that the kernel would put its own in place of."""
        table = list(range(_TABLE_SIZE))
        index, skip = 0, False
        for unit in numbers(compressed, "H"):
            if skip:
                index, skip = index + unit, False
            elif unit == _SKIP and index != _SKIP:
                skip = True
            elif index < _TABLE_SIZE:
                table[index] = unit or index
                index += 1
            else:
                raise Unsupported("exFAT with an up-case table that is too long")
        if index < _SKIP or rotated_sum(compressed, 32) != checksum:
            raise Unsupported("exFAT with a damaged up-case table")
        self._table = table

    def fold(self, units: bytes) -> bytes:
        """A name in UTF-16 (little-endian) in upper case."""
        table = self._table
        found = [table[unit] for unit in numbers(units, "H")]
        return struct.pack(f"<{len(found)}H", *found)


def primaries(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and the bytes of every entry in use that begins a set, to the end of a directory."""
    for at in range(0, len(data), ENTRY):
        if not data[at]:
            return
        if data[at] & _IN_USE and data[at] < _STREAM:
            yield data[at], data[at : at + ENTRY]


def subdirectories(data: bytes) -> int:
    """How many directories the entries name."""
    return sum(kind == FILE and bool(raw[4] & DIRECTORY) for kind, raw in primaries(data))


def beginnings(data: bytes) -> Iterator[tuple[int, int, int, bool]]:
    """What `entries` gives, and perhaps more: of each the position, the first cluster, of those
    that are no chain the size in bytes, and whether it is a directory.
    """
    kinds = data[: len(data) - len(data) % ENTRY : ENTRY].split(b"\0", 1)[0]
    index = kinds.find(FILE)
    while index >= 0:
        if kinds[index + 1 : index + 2] == bytes([_STREAM]):
            at = index * ENTRY
            stream = at + ENTRY
            cluster, size = struct.unpack_from("<IQ", data, stream + 20)
            length = size if data[stream + 1] == NO_FAT_CHAIN else 0
            yield at, cluster, length, bool(data[at + 4] & DIRECTORY)
        index = kinds.find(FILE, index + 1)


def entries(data: bytes, upcase: Upcase, is_root: bool) -> Iterator[Entry]:
    """What a directory lists, in order. Raises `Unsupported` for anything odd."""
    at, end = 0, len(data) - len(data) % ENTRY
    while at < end and data[at]:
        kind = data[at]
        if not kind & _IN_USE or (is_root and kind in (BITMAP, UPCASE, LABEL, GUID)):
            at += ENTRY
            continue
        if kind != FILE:
            raise Unsupported(f"a directory on exFAT has an entry of type 0x{kind:02x}")
        length = (data[at + 1] + 1) * ENTRY
        yield Entry(*_name(data[at : at + length], length, upcase), at)
        at += length


def _name(raw: bytes, length: int, upcase: Upcase) -> tuple[bytes, bytes]:
    """The name in an entry set, also in upper case, once all of the set is as it should be."""
    if len(raw) < length or length < 3 * ENTRY:
        raise Unsupported("a directory on exFAT has an entry that is cut off")
    characters = raw[ENTRY + 3]
    parts = -(-characters // _NAME_PART)
    kinds = raw[ENTRY::ENTRY]
    if kinds != bytes([_STREAM]) + bytes([_NAME]) * parts or not characters:
        raise Unsupported("a directory on exFAT has an entry with odd parts")
    (stored,) = struct.unpack_from("<H", raw, _CHECKSUM_AT[0])
    if rotated_sum(raw[: _CHECKSUM_AT[0]] + raw[_CHECKSUM_AT[1] + 1 :], 16) != stored:
        raise Unsupported("a directory on exFAT has an entry with a wrong checksum")
    joined = b"".join(raw[at + 2 : at + ENTRY] for at in range(2 * ENTRY, length, ENTRY))
    units, rest = joined[: characters * 2], joined[characters * 2 :]
    try:
        name = units.decode("utf-16-le")
    except UnicodeDecodeError:
        raise Unsupported("a name on exFAT is not UTF-16") from None
    if any(rest) or name.endswith(".") or any(c < " " or c in _FORBIDDEN for c in name):
        raise Unsupported("a name on exFAT is impossible")
    folded = upcase.fold(units)
    (hashed,) = struct.unpack_from("<H", raw, ENTRY + 4)
    if rotated_sum(folded, 16) != hashed:
        raise Unsupported("a name on exFAT has a wrong hash")
    return name.encode(), folded


def content(raw: bytes) -> Content:
    """The fields of a set that `entries` has listed. Raises `Unsupported` for odd ones."""
    (attributes,) = struct.unpack_from("<H", raw, 4)
    time, date = struct.unpack_from("<HH", raw, 12)
    hundredths, offset = raw[21], raw[23]
    flags = raw[ENTRY + 1]
    (valid,) = struct.unpack_from("<Q", raw, ENTRY + 8)
    cluster, size = struct.unpack_from("<IQ", raw, ENTRY + 20)
    if attributes & ~_ATTRIBUTES:
        raise Unsupported(f"a file on exFAT has the attributes 0x{attributes:x}")
    if valid != size:
        # Before 6.8 Linux shows the part that is written, since then all with zeros at its end.
        raise Unsupported("a file on exFAT is not written to its end")
    if size and flags not in (FAT_CHAIN, NO_FAT_CHAIN):
        raise Unsupported(f"a file on exFAT has the flags 0x{flags:x}")
    seconds, nanoseconds = _unix_time(date, time, hundredths, offset)
    return Content(attributes, flags != NO_FAT_CHAIN, cluster, size, seconds * 10**9 + nanoseconds)


def _unix_time(date: int, time: int, hundredths: int, offset: int) -> tuple[int, int]:
    """Seconds and nanoseconds since 1970; a time without an offset is taken as UTC."""
    year, month, day = 1980 + (date >> 9), date >> 5 & 15, date & 31
    hour, minute, second = time >> 11, time >> 5 & 63, (time & 31) * 2
    if (
        not 1 <= month <= 12
        or not 1 <= day <= calendar.monthrange(year, month)[1]
        or (hour > 23 or minute > 59 or second > 58 or hundredths > 199)
    ):
        raise Unsupported("a file on exFAT has an impossible time")
    seconds = calendar.timegm((year, month, day, hour, minute, second)) + hundredths // 100
    if offset & _UTC_VALID:
        quarters = offset & 0x7F
        seconds -= (quarters - 128 if quarters > 63 else quarters) * _QUARTER
    return seconds, hundredths % 100 * 10_000_000
