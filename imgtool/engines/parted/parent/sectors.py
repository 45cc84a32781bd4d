"""The sectors of a disk in which tables are, as far as libparted follows them: nothing else of a
disk reaches it.

Whatever is followed is bounded, and was written by an adversary: what lies elsewhere than where a
table of its kind could be is not found, and libparted sees zeros there.

Sources: as in `imgtool.formats.partition_table`; parted, libparted/labels/.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from imgtool.formats.partition_types import EXTENDED

Read = Callable[[int, int], bytes]

_HEAD, _TAIL = 1 << 20, 1 << 20
_BLOCK = 4096
_SECTOR = 512
_MOST_RECORDS = 256
_MOST_ENTRIES = 1 << 20  # bytes of a GPT's array
_GPT_PLACES = struct.Struct("<32xQ32xQII")  # the other header, entries, how many, of how many bytes
_AMIGA_SECTORS = 16


def table_sectors(read: Read, size: int) -> Iterator[tuple[int, bytes]]:
    """Offsets and bytes, some of them twice; none that are zeros."""
    for start, length in _places(read, size):
        start = max(start, 0) // _SECTOR * _SECTOR
        for at in range(start, min(start + length, size), _BLOCK):
            data = read(at, min(_BLOCK, start + length - at, size - at))
            if any(data):
                yield at, data


def _places(read: Read, size: int) -> Iterator[tuple[int, int]]:
    yield 0, _HEAD
    yield size - _TAIL, _TAIL
    yield from _boot_records(read, size)
    for sector in (512, 4096):
        yield from _gpt(read, size, sector)
    yield from _amiga(read, size)


def _boot_records(read: Read, size: int) -> Iterator[tuple[int, int]]:
    """The boot records of logical partitions, by every link that there is."""
    seen: set[int] = set()
    waiting = [(0, 0)]
    while waiting and len(seen) < _MOST_RECORDS:
        here, outer = waiting.pop()
        if here in seen or here * _SECTOR >= size:
            continue
        seen.add(here)
        sector = read(here * _SECTOR, _SECTOR)
        if sector[510:512] != b"\x55\xaa":
            continue
        yield here * _SECTOR, _SECTOR
        for kind, start in struct.iter_unpack("<4xB3xI4x", sector[446:510]):
            if kind in EXTENDED:
                waiting.append((outer + start, outer or start))


def _gpt(read: Read, size: int, sector: int) -> Iterator[tuple[int, int]]:
    """Both headers and arrays, wherever the first header says they are."""
    headers = [sector]
    for at in headers:
        header = read(at, 92)
        if len(header) < 92 or not header.startswith(b"EFI PART"):
            continue
        other, entries, count, length = _GPT_PLACES.unpack_from(header)
        yield at, sector
        yield entries * sector, min(count * length, _MOST_ENTRIES)
        if at == sector and other * sector < size:
            headers.append(other * sector)


def _amiga(read: Read, size: int) -> Iterator[tuple[int, int]]:
    """The list of partitions, each in a block of its own."""
    for number in range(_AMIGA_SECTORS):
        block = read(number * _SECTOR, _SECTOR)
        if not block.startswith(b"RDSK"):
            continue
        (following,) = struct.unpack_from(">28xI", block)
        for _ in range(_MOST_RECORDS):
            at = following * _SECTOR
            if at >= size:
                return
            yield at, _SECTOR
            block = read(at, _SECTOR)
            if not block.startswith(b"PART"):
                return
            (following,) = struct.unpack_from(">16xI", block)
        return
