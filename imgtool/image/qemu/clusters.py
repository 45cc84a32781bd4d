"""Where the bytes of a disk lie in the files of its chain: for raw and plain qcow2, whose clusters
can be read from the files themselves, once QEMU has opened the chain and holds its locks.

Whatever is not plain, and whatever is odd, is left to QEMU: compressed clusters, subclusters,
encryption, external data files, images marked dirty or corrupt, tables and clusters that are out of
place or past the end of their file.

Layout: docs/interop/qcow2.txt in QEMU's sources, "Cluster mapping".
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from sys import byteorder
from typing import NamedTuple

from imgtool.formats.qcow2 import Qcow2Header, read_header
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.info import ImageInfo

_MOST_LINKS = 16  # each is looked at for every stretch
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COPIED, _ZERO = 1 << 63, 1
_ENTRY = 8
_PART = 512  # entries of a table that are read at once
_KEPT_PARTS = 256  # 1 MiB


class ByteRange(NamedTuple):
    """Bytes that lie together in the file of `descriptor`, or zeros, for which that is None."""

    descriptor: int | None
    offset: int
    length: int


class _UnsupportedMapping(Exception):
    """Only QEMU can tell."""


class _Below(NamedTuple):
    """What is in the next link of the chain, for so many bytes."""

    length: int


class _Raw:
    """A link whose file is the disk."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._descriptor = descriptor
        self._end = os.fstat(descriptor).st_size

    def find(self, offset: int, length: int) -> ByteRange | _Below:
        if offset + length > self._end:
            raise _UnsupportedMapping
        return ByteRange(self._descriptor, offset, length)


class _Qcow2:
    """A link whose clusters are found by two tables."""

    def __init__(self, descriptor: int, header: Qcow2Header) -> None:
        self.size = header.virtual_size
        self._descriptor = descriptor
        self._end = os.fstat(descriptor).st_size
        self._version = header.version
        self._cluster = header.cluster_size
        self._first = header.l1_offset
        self._tables = header.l1_size // _ENTRY
        self._per_table = header.cluster_size // _ENTRY
        self._part = min(_PART, self._per_table)
        self._parts: OrderedDict[int, array[int]] = OrderedDict()

    def find(self, offset: int, length: int) -> ByteRange | _Below:
        cluster, within = divmod(offset, self._cluster)
        number, index = divmod(cluster, self._part)
        entries = self._entries(number)
        first = self._check_entry(entries[index])
        step = self._cluster if first & _OFFSET and not first & _ZERO else 0
        most = min(len(entries), index + -(-(within + length) // self._cluster))
        following = index + 1
        while following < most and self._check_entry(entries[following]) == first + step:
            first, following = first + step, following + 1
        count = following - index
        length = min(length, count * self._cluster - within)
        if first & _ZERO:
            return ByteRange(None, 0, length)
        if not step:
            return _Below(length)
        place = first - (count - 1) * step + within
        if place + length > self._end:
            raise _UnsupportedMapping
        return ByteRange(self._descriptor, place, length)

    def _check_entry(self, entry: int) -> int:
        """An entry without what does not matter here: the offset, or 1 for zeros, or 0."""
        entry &= ~_COPIED
        if entry & ~(_OFFSET | _ZERO) or (entry & _OFFSET) % self._cluster:
            raise _UnsupportedMapping
        if entry & _ZERO:
            if self._version < 3:
                raise _UnsupportedMapping
            return _ZERO
        return entry

    def _entries(self, number: int) -> array[int]:
        known = self._parts.get(number)
        if known is not None:
            self._parts.move_to_end(number)
            return known
        table, part = divmod(number, self._per_table // self._part)
        if table >= self._tables:
            raise _UnsupportedMapping
        place = self._read(self._first + table * _ENTRY, 1)[0] & ~_COPIED
        if place & ~_OFFSET or place % self._cluster:
            raise _UnsupportedMapping
        if place:
            found = self._read(place + part * self._part * _ENTRY, self._part)
        else:
            found = array("Q", bytes(self._part * _ENTRY))
        self._parts[number] = found
        if len(self._parts) > _KEPT_PARTS:
            self._parts.popitem(last=False)
        return found

    def _read(self, offset: int, count: int) -> array[int]:
        data = os.pread(self._descriptor, count * _ENTRY, offset)
        if len(data) < count * _ENTRY:
            raise _UnsupportedMapping
        found = array("Q", data)
        if byteorder == "little":
            found.byteswap()
        return found


class Clusters:
    """The clusters of a chain, active image first."""

    def __init__(self, links: Sequence[_Raw | _Qcow2]) -> None:
        self._links = links

    def at(self, offset: int, length: int) -> ByteRange | None:
        """The first bytes of a part of the disk, at least one and at most `length`; None where only
        QEMU can read them. Raises `OSError` of the host.
        """
        try:
            for link in self._links:
                if offset >= link.size:
                    break  # an image that is larger than what it stands on
                found = link.find(offset, min(length, link.size - offset))
                length = found.length
                if isinstance(found, ByteRange):
                    return found
        except _UnsupportedMapping:
            return None
        return ByteRange(None, 0, length)


def plain(chain: Chain, descriptors: Mapping[Path, int]) -> Clusters | None:
    """The clusters of a chain whose files are open, for as long as they are; None if one of its
    links is none of those that can be read without QEMU, or if there are very many.
    """
    if len(chain.links) > _MOST_LINKS or chain.header is not None:
        return None
    links = []
    for link in chain.links:
        found = _link(link, descriptors[link.path])
        if found is None:
            return None
        links.append(found)
    return Clusters(links)


def _link(link: ImageInfo, descriptor: int) -> _Raw | _Qcow2 | None:
    if link.data_path or link.encrypted or link.extents:
        return None
    if link.format == "raw":
        return _Raw(descriptor, link.virtual_size)
    if link.format != "qcow2" or link.dirty or link.corrupt:
        return None
    with os.fdopen(os.dup(descriptor), "rb") as file:
        header = read_header(file)
    if header is None or not header.sound or header.dirty or header.corrupt or header.encrypted:
        return None
    if header.has_data_file or header.virtual_size != link.virtual_size:
        return None
    return _Qcow2(descriptor, header)
