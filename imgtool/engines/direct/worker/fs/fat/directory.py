"""Directory entries of FAT, named and dated as the kernel's vfat does with its default options.

Source: the FAT specification (fatgen103), "Directory Structure" and "Long Directory Entries", and
Linux, fs/fat/dir.c (parsing) and fs/fat/misc.c (time). Two things there are not in the
specification: an entry that begins with a zero byte does not end the directory, and the lower-case
bits of Windows NT count (`shortname=mixed`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.exfat.boot import numbers

ENTRY = 32
READ_ONLY, VOLUME, DIRECTORY, LONG_NAME = 0x01, 0x08, 0x10, 0x0F
_DELETED = 0xE5
_LAST_SLOT = 0x40
_MOST_SLOTS = 20
_SLOT_CHARACTERS = 13
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10
_DOTS = (b".".ljust(11), b"..".ljust(11))
_DAYS_BEFORE = (0, 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 0, 0, 0)
_DAYS_TO_1980 = 3652
_YEAR_2100 = 120


class Entry(NamedTuple):
    """A file or directory: its names as shown and as an alias, and where its entry lies."""

    name: bytes
    alias: bytes
    position: int  # in the directory
    raw: bytes

    @property
    def is_dot(self) -> bool:
        return self.raw[:11] in _DOTS


class Content(NamedTuple):
    """What the 32 bytes of an entry say, but for the name."""

    attributes: int
    cluster: int
    size: int
    mtime: int


def content(raw: bytes, bits: int) -> Content:
    """The fields of an entry; only FAT32 has the upper half of the cluster number."""
    high, time, date, low, size = struct.unpack_from("<HHHHI", raw, 20)
    cluster = low | high << 16 if bits == 32 else low
    return Content(raw[11], cluster, size, unix_time(date, time))


def unix_time(date: int, time: int) -> int:
    """Seconds since 1970 of a date and time taken as UTC; odd months and days as in the kernel."""
    year, month, day = date >> 9, max(1, date >> 5 & 15), max(1, date & 31) - 1
    leap_days = (year + 3) // 4 - (year > _YEAR_2100)
    if year % 4 == 0 and year != _YEAR_2100 and month > 2:
        leap_days += 1
    days = year * 365 + leap_days + _DAYS_BEFORE[month] + day + _DAYS_TO_1980
    return days * 86400 + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2


def subdirectories(data: bytes) -> int:
    """How many directories the entries name, `.` and `..` among them: the kernel's link count."""
    return sum(
        1
        for at in range(0, len(data), ENTRY)
        if data[at] not in (0, _DELETED) and data[at + 11] & (VOLUME | DIRECTORY) == DIRECTORY
    )


def beginnings(data: bytes, bits: int) -> Iterator[tuple[int, int, bool]]:
    """What `entries` gives but for `.` and `..`, and perhaps more: of each the position, the first
    cluster, and whether it is a directory.
    """
    words = numbers(data[: len(data) - len(data) % ENTRY], "H")
    upper = words[10::16] if bits == 32 else bytes(len(words) // 16)
    fields = zip(data[::ENTRY], data[11::ENTRY], words[13::16], upper, strict=False)
    for index, (first, attributes, low, high) in enumerate(fields):
        if first in (0, _DELETED) or attributes & VOLUME:
            continue
        at = index * ENTRY
        if data[at : at + 11] not in _DOTS:
            yield at, low | high << 16, bool(attributes & DIRECTORY)


def entries(data: bytes) -> Iterator[Entry]:
    """What a directory lists, in order, `.` and `..` included."""
    at, end = 0, len(data) - len(data) % ENTRY
    while at < end:
        attributes = data[at + 11]
        if data[at] == _DELETED or (attributes != LONG_NAME and _hidden(data, at)):
            at += ENTRY
            continue
        long_name = b""
        if attributes == LONG_NAME:
            at, found = _long_name(data, at, end)
            if found is None:
                continue
            long_name = found
        raw = data[at : at + ENTRY]
        alias = _short_name(raw)
        if not alias:
            raise Unsupported("a directory entry has no short name")
        entry = Entry(long_name or alias, alias, at, raw)
        if not entry.is_dot and (b"/" in entry.name or entry.name in (b".", b"..")):
            raise Unsupported("a directory entry has an impossible name")
        yield entry
        at += ENTRY


def _hidden(data: bytes, at: int) -> bool:
    return data[at] in (0, _DELETED) or bool(data[at + 11] & VOLUME)


def _long_name(data: bytes, at: int, end: int) -> tuple[int, bytes | None]:
    """The long name whose first slot is at `at`, and where parsing goes on.

    The place is that of the short entry where there is a name (empty if it belongs to another short
    entry); without one it is the next entry to look at.
    """
    while True:
        slots = data[at] & ~_LAST_SLOT
        if not data[at] & _LAST_SLOT or not 0 < slots <= _MOST_SLOTS:
            return at + ENTRY, None
        checksum = data[at + 13]
        parts = []
        restart = False
        for slot in range(slots, 0, -1):
            parts.append(data[at + 1 : at + 11] + data[at + 14 : at + 26] + data[at + 28 : at + 32])
            at += ENTRY
            if at >= end:
                return end, None
            if slot == 1:
                break
            if data[at + 11] != LONG_NAME:
                return at, None
            if data[at] & ~_LAST_SLOT != slot - 1 or data[at + 13] != checksum:
                restart = True
                break
        if restart:
            continue
        if data[at] == _DELETED:
            return at + ENTRY, None
        if data[at + 11] == LONG_NAME:
            continue
        if _hidden(data, at):
            return at + ENTRY, None
        if _checksum(data[at : at + 11]) != checksum:
            return at, b""
        return at, _utf8(b"".join(reversed(parts)))


def _utf8(name: bytes) -> bytes:
    """A name in UTF-16 up to its zero; the kernel drops lone surrogates, so others must read it."""
    for at in range(0, len(name), 2):
        if name[at] == name[at + 1] == 0:
            name = name[:at]
            break
    try:
        text = name.decode("utf-16-le").encode("utf-8")
    except UnicodeDecodeError:
        raise Unsupported("a long name on FAT is not UTF-16") from None
    if not text:
        raise Unsupported("a long name on FAT is empty")
    return text


def _checksum(name: bytes) -> int:
    total = 0
    for byte in name:
        total = ((total & 1) << 7 | total >> 1) + byte & 0xFF
    return total


def _short_name(raw: bytes) -> bytes:
    """The 8.3 name, in lower case where the bits of Windows NT say so."""
    name = bytes([_DELETED]) + raw[1:11] if raw[0] == 0x05 else raw[:11]
    base = name[:8].split(b"\0")[0].rstrip(b" ")
    extension = name[8:].split(b"\0")[0].rstrip(b" ")
    if raw[12] & _LOWER_BASE:
        base = _lower(base)
    if raw[12] & _LOWER_EXTENSION:
        extension = _lower(extension)
    joined = base + b"." + extension if extension else base
    return joined.decode("cp437").encode()


def _lower(part: bytes) -> bytes:
    if not part.isascii():
        raise Unsupported("a short name on FAT has lower-case bits and letters outside of ASCII")
    return part.lower()
