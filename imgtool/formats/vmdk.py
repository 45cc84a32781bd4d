"""What a VMDK says of itself: its kind, its extents, what it stands on, where its data end.

Layout: "Virtual Disk Format 5.0" by VMware; which lines count is QEMU's block/vmdk.c. Where QEMU
reads a line loosely, this reads it more loosely: naming a file too many is harmless here.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

SPARSE_MAGIC = b"KDMV"
COWD_MAGIC = b"COWD"
# Of the content of an image that stands on no other.
NO_PARENT = 0xFFFF_FFFF
_DESCRIPTOR_LIMIT = 1 << 20
_LINES = re.compile(
    rb"^\s*(?P<name>CID|parentCID|createType|parentFileNameHint|changeTrackPath)\s*=\s*"
    rb'"?(?P<value>[^\n\r"]*)"?',
    re.MULTILINE,
)
_EXTENT = re.compile(rb'(?:FLAT|SPARSE|VMFS|ZERO)\s*"([^\n\r"]+)"?')
_SIZED_EXTENT = re.compile(
    rb'^\s*\w+\s+(?P<sectors>[0-9]{1,18})\s+(?P<kind>\w+)\s+"(?P<name>[^\n\r"]+)"'
    rb"(?:[ \t]+(?P<offset>[0-9]{1,18}))?",
    re.MULTILINE,
)
_EXTENT_NAME = re.compile(rb'^(RW [0-9]+ SPARSE ")[^\n\r"]*"', re.MULTILINE)
_SPARSE = struct.Struct("<4sIIQQQQIQQQ?4sH")
_SECTOR = 512
_COMPRESSED_OR_MARKERS = 3 << 16
_MOST_TABLES = 64 << 20  # bytes of grain tables: of 1 TiB in grains of 64 KiB
_LARGEST_DIRECTORY = 4 << 20
_READ_AT_ONCE = 1 << 18  # entries


@dataclass(frozen=True)
class Extent:
    """A file that holds a part of the disk: its name as written, the bytes of the disk that are
    in it, and where in it they begin."""

    kind: str
    name: bytes
    size: int
    offset: int


@dataclass(frozen=True)
class Descriptor:
    """The lines that count; `cid` changes with each writer, `parent_cid` is that of what it stands
    on, `parent` the name of that as written; `change_track` the file in which VMware notes what
    was changed."""

    kind: str
    cid: int
    parent_cid: int
    parent: str | None
    change_track: str | None
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Sparse:
    """The header of a sparse extent; offsets and sizes in bytes."""

    version: int
    compressed: bool
    closed: bool
    capacity: int
    grain_size: int
    table_entries: int
    directory_offset: int


def _embedded_descriptor(start: bytes) -> int | None:
    """Where a sparse extent without a capacity of its own keeps the descriptor used instead."""
    if not start.startswith(SPARSE_MAGIC) or len(start) < 36:
        return None
    capacity, _, descriptor_sector = struct.unpack_from("<QQQ", start, 12)
    return descriptor_sector * 512 if capacity == 0 and descriptor_sector else None


def looks_like_descriptor(start: bytes) -> bool:
    """Whether QEMU may take a file with these first bytes as a VMDK descriptor."""
    return start[:1] in (b"#", b" ", b"v") and b"version=" in start


def has_descriptor_inside(file: BinaryIO) -> bool:
    """Whether an extent would make QEMU read a further descriptor out of it."""
    file.seek(0)
    return _embedded_descriptor(file.read(512)) is not None


def extent_names(file: BinaryIO) -> tuple[bytes, ...]:
    """The names, as written, of the files that hold the data; none if this file holds it itself."""
    file.seek(0)
    start = file.read(512)
    at = 0
    if start.startswith((SPARSE_MAGIC, COWD_MAGIC)):
        embedded = _embedded_descriptor(start)
        if embedded is None or embedded >= 1 << 63:
            return ()
        at = embedded
    file.seek(at)
    return tuple(dict.fromkeys(_EXTENT.findall(file.read(_DESCRIPTOR_LIMIT))))


def _descriptor_text(file: BinaryIO) -> bytes | None:
    file.seek(0)
    start = file.read(512)
    at, length = 0, _DESCRIPTOR_LIMIT
    if start.startswith(SPARSE_MAGIC):
        if len(start) < 44:
            return None
        sector, sectors = struct.unpack_from("<QQ", start, 28)
        at, length = sector * 512, min(sectors * 512, length)
        if not sector or not sectors or at >= 1 << 62:
            return None
    elif not looks_like_descriptor(start):
        return None
    file.seek(at)
    return file.read(length).partition(b"\0")[0]


def name_itself(descriptor: int, name: str) -> None:
    """Write into a VMDK that is one file, and open, which name it has, as others than QEMU look
    for.

    A name that its line cannot hold is left out in part. Raises `OSError`.
    """
    written = os.fsencode(name).translate(None, b'"\r\n\0')
    with os.fdopen(os.dup(descriptor), "r+b") as file:
        file.seek(0)
        start = file.read(512)
        text = _descriptor_text(file)
        if text is None or not start.startswith(SPARSE_MAGIC):
            return
        sector, sectors = struct.unpack_from("<QQ", start, 28)
        new = _EXTENT_NAME.sub(lambda line: line[1] + written + b'"', text, count=1)
        if len(new) < sectors * _SECTOR:
            file.seek(sector * _SECTOR)
            file.write(new.ljust(len(text), b"\0"))


def _number(text: bytes | None) -> int:
    try:
        return int(text or b"", 16)
    except ValueError:
        return NO_PARENT


def read_descriptor(file: BinaryIO) -> Descriptor | None:
    """The descriptor, which is the file or lies in it; None where there is none."""
    text = _descriptor_text(file)
    if text is None:
        return None
    lines: dict[bytes, bytes] = {}
    for line in _LINES.finditer(text):
        lines.setdefault(line["name"], line["value"])  # the first one counts, as in QEMU
    parent, tracked = lines.get(b"parentFileNameHint"), lines.get(b"changeTrackPath")
    return Descriptor(
        kind=lines.get(b"createType", b"").decode(errors="replace"),
        cid=_number(lines.get(b"CID")),
        parent_cid=_number(lines.get(b"parentCID")),
        parent=os.fsdecode(parent) if parent else None,
        change_track=os.fsdecode(tracked) if tracked else None,
        extents=tuple(
            Extent(
                found["kind"].decode(),
                found["name"],
                int(found["sectors"]) * _SECTOR,
                int(found["offset"] or 0) * _SECTOR,
            )
            for found in _SIZED_EXTENT.finditer(text)
        ),
    )


def read_sparse(file: BinaryIO) -> Sparse | None:
    """The header of a sparse extent of VMware's hosted products; None where this is none."""
    file.seek(0)
    data = file.read(_SPARSE.size)
    if len(data) < _SPARSE.size or not data.startswith(SPARSE_MAGIC):
        return None
    _, version, flags, capacity, grain, _, _, entries, _, tables, _, unclean, _, algorithm = (
        _SPARSE.unpack(data)
    )
    return Sparse(
        version=version,
        compressed=bool(flags & _COMPRESSED_OR_MARKERS or algorithm),
        closed=not unclean,
        capacity=capacity * _SECTOR,
        grain_size=grain * _SECTOR,
        table_entries=entries,
        directory_offset=tables * _SECTOR,
    )


def size_needed(file: BinaryIO, sparse: Sparse) -> int:
    """How long the file has to be, in bytes, to hold the last grain that its tables name; 0 where
    that cannot be told: it is compressed, or its tables are very large."""
    needed = tables_end(file, sparse)
    if not needed:
        return 0
    for place, count in _runs(_directory(file, sparse), sparse.table_entries):
        last = max(_entries(file, place * _SECTOR, count), default=0)
        if last > 1:  # 1 is a grain of zeros
            needed = max(needed, last * _SECTOR + sparse.grain_size)
    return needed


def _runs(places: Sequence[int], entries: int) -> Iterator[tuple[int, int]]:
    """Tables that lie one after the other, as one: where they begin, and how many entries."""
    start, count = 0, 0
    for place in sorted(set(places)):
        if count and place * _SECTOR == start * _SECTOR + count * 4 and count < _READ_AT_ONCE:
            count += entries
            continue
        if count:
            yield start, count
        start, count = place, entries
    if count:
        yield start, count


def tables_end(file: BinaryIO, sparse: Sparse) -> int:
    """Where the last of its tables ends, in bytes; 0 where `size_needed` cannot tell."""
    tables = _tables(sparse)
    if not tables:
        return 0
    table = sparse.table_entries * 4
    ends = [place * _SECTOR + table for place in _directory(file, sparse)]
    return max([sparse.directory_offset + tables * 4, *ends])


def _tables(sparse: Sparse) -> int:
    """How many tables of grains it has; 0 where they are not looked at."""
    per_table = sparse.grain_size * sparse.table_entries
    if sparse.compressed or not per_table or sparse.directory_offset >= 1 << 62:
        return 0
    tables = -(-sparse.capacity // per_table)
    too_large = tables * 4 > _LARGEST_DIRECTORY
    return 0 if too_large or tables * sparse.table_entries * 4 > _MOST_TABLES else tables


def _directory(file: BinaryIO, sparse: Sparse) -> list[int]:
    """Where its tables are, in sectors."""
    return [place for place in _entries(file, sparse.directory_offset, _tables(sparse)) if place]


def _entries(file: BinaryIO, offset: int, count: int) -> array[int]:
    """A table, or nothing for one of zeros."""
    file.seek(offset)
    data = file.read(count * 4)
    if not data.strip(b"\0"):
        return array("I")  # as most of a new disk is
    found = array("I", data[: len(data) // 4 * 4])
    if sys.byteorder == "big":
        found.byteswap()
    return found
