"""FAT12, FAT16 and FAT32, as Linux's vfat shows them when mounted with its default options."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from stat import S_IFDIR, S_IFREG

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs import cluster_chains
from imgtool.engines.direct.worker.fs.base import (
    Node,
    PathNotFound,
    ReadFailed,
    Source,
    Usage,
)
from imgtool.engines.direct.worker.fs.cluster_chains import END_OF_CHAIN, Chain, Piece, Table
from imgtool.engines.direct.worker.fs.cluster_filesystem import ROOT, ClusterFilesystem
from imgtool.engines.direct.worker.fs.exfat.boot import FIRST_CLUSTER, numbers
from imgtool.engines.direct.worker.fs.fat import directory as fat_directory
from imgtool.engines.direct.worker.fs.fat.boot import Geometry, read_geometry
from imgtool.engines.direct.worker.fs.fat.directory import (
    DIRECTORY,
    ENTRY,
    READ_ONLY,
    Content,
    Entry,
)

_LARGEST_DIRECTORY = 2 * 1024 * 1024  # the specification's limit of 65,536 entries
_CHUNK = 1024 * 1024


class FatFilesystem(ClusterFilesystem[Content]):
    """A FAT volume. An inode is the place of the directory entry on the volume, in entries."""

    type = "vfat"

    def __init__(self, source: Source, geometry: Geometry) -> None:
        super().__init__(source, geometry)
        self._geometry = geometry
        self._bad = {12: 0xFF7, 16: 0xFFF7, 32: 0x0FFFFFF7}[geometry.bits]
        self._table = Table(self._source, geometry.table, 2 if geometry.bits == 16 else 4)

    @classmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> FatFilesystem:
        """Check the boot sector and the root directory; a dirty volume reads like a clean one."""
        found = cls(source, read_geometry(source))
        found._directory(ROOT)
        return found

    def stat(self, inode: int) -> Node:
        """`lstat`; a directory's size and link count come from its clusters, as in the kernel."""
        if inode == ROOT:
            data = self._directory(ROOT)
            links = fat_directory.subdirectories(data) + 2
            return self._node(inode, S_IFDIR | 0o755, len(data), 0, links)
        entry = self._entry(inode)
        if entry.attributes & DIRECTORY:
            data = self._directory(inode)
            links = fat_directory.subdirectories(data)
            if links < 2:
                raise Unsupported("a directory on FAT does not begin with . and ..")
            return self._node(inode, S_IFDIR | 0o755, len(data), entry.mtime * 10**9, links)
        mode = 0o555 if entry.attributes & READ_ONLY else 0o755
        return self._node(inode, S_IFREG | mode, entry.size, entry.mtime * 10**9, 1)

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """Long names where there are any, else 8.3 names; no volume labels, nothing deleted."""
        for entry, child in self._list_directory(inode)[0]:
            yield entry.name, child

    def usage(self) -> Usage:
        """The kernel counts free clusters in the table: FAT32's stored count may be stale."""
        cluster = self._geometry.cluster_size
        size, free = self._geometry.clusters * cluster, self._free_clusters() * cluster
        return Usage(size, size - free, free, 0, 0)

    def lookup(self, inode: int, name: bytes) -> int:
        """By long name or alias, without regard to the case of ASCII letters or dots at the end."""
        child = self._list_directory(inode)[1].get(self.fold(name.rstrip(b".")))
        if child is None:
            raise PathNotFound
        return child

    def fold(self, name: bytes) -> bytes:
        """The kernel's `iocharset=ascii` knows no other letters."""
        return name.upper()

    def _entry(self, inode: int) -> Content:
        return fat_directory.content(self._source.read(inode * ENTRY, ENTRY), self._geometry.bits)

    def _list_directory(self, inode: int) -> tuple[list[tuple[Entry, int]], dict[bytes, int]]:
        """What a directory lists, and which entry the kernel finds for a folded name."""
        data = self._directory(inode)
        places = self._places(inode)
        cluster = self._geometry.cluster_size
        listed: list[tuple[Entry, int]] = []
        found: dict[bytes, int] = {}
        for entry in fat_directory.entries(data):
            if inode == ROOT and self._geometry.bits != 32:
                place = places[0] + entry.position
            else:
                place = places[entry.position // cluster] + entry.position % cluster
            child = place // ENTRY
            if not entry.is_dot:
                listed.append((entry, child))
                found.setdefault(self.fold(entry.alias), child)
                found.setdefault(self.fold(entry.name), child)
        for entry, child in listed:
            if found.get(self.fold(entry.name.rstrip(b"."))) != child:
                raise Unsupported("a directory on FAT has two entries of one name")
        return listed, found

    def _places(self, inode: int) -> list[int]:
        """Where a directory's clusters are on the volume, in bytes."""
        geometry = self._geometry
        if inode == ROOT:
            if geometry.bits != 32:
                return [geometry.root_offset]
            first = geometry.root_cluster
        else:
            entry = self._entry(inode)
            if not entry.attributes & DIRECTORY:
                raise ReadFailed("not a directory")
            first = entry.cluster
            if first in (0, geometry.root_cluster):
                raise Unsupported("a directory on FAT has no clusters of its own")
        self._claim(first, inode, "FAT")
        places: list[int] = []
        cluster = first
        while cluster != END_OF_CHAIN:
            if len(places) * geometry.cluster_size >= _LARGEST_DIRECTORY:
                raise Unsupported("a directory on FAT is too large or goes in circles")
            places.append(self._place(cluster))
            cluster = self._next(cluster)
        return places

    def _read_directory(self, inode: int) -> bytes:
        if inode == ROOT and self._geometry.bits != 32:
            return self._source.read(self._geometry.root_offset, self._geometry.root_size)
        return super()._read_directory(inode)

    def _contents(self, directory: int) -> tuple[int, Iterable[tuple[int, Content]]]:
        listed = self._list_directory(directory)[0]
        bits = self._geometry.bits
        return len(listed), (
            (child, fat_directory.content(entry.raw, bits)) for entry, child in listed
        )

    def _file_chain(self, entry: Content) -> Chain:
        if entry.cluster == 0:
            raise Unsupported("a file on FAT has a size and no clusters")
        wanted = -(-entry.size // self._geometry.cluster_size)
        return cluster_chains.follow(entry.cluster, wanted, self._geometry.end, self._next)

    def _beginnings(self) -> Iterator[tuple[int, int, int]]:
        """Where the chains of files and directories begin."""
        geometry, size = self._geometry, self._geometry.cluster_size
        if geometry.bits == 32:
            yield ROOT, geometry.root_cluster, 1
        waiting = [ROOT]
        while waiting:
            directory = waiting.pop()
            try:
                data, places = self._directory(directory), self._places(directory)
            except (Unsupported, ReadFailed):
                continue
            step = len(data) if directory == ROOT and geometry.bits != 32 else size
            for position, cluster, is_directory in fat_directory.beginnings(data, geometry.bits):
                child = (places[position // step] + position % step) // ENTRY
                yield child, cluster, 1
                if is_directory:
                    waiting.append(child)

    def _parts_of_table(self) -> Iterator[tuple[int, array[int]]]:
        end = self._geometry.end
        if self._geometry.bits == 12:
            yield 0, array("i", map(self._next, range(end)))
        else:
            yield from self._table.parts(end, 0x0FFFFFFF)

    def _clusters(self, directory: int) -> Iterable[Piece]:
        if directory == ROOT and self._geometry.bits != 32:
            return []
        return super()._clusters(directory)

    def _next(self, cluster: int) -> int:
        """The next cluster of a chain; the mark of a bad cluster ends one, as in the kernel."""
        table, bits = self._geometry.table, self._geometry.bits
        if bits == 12:
            pair = int.from_bytes(self._source.read(table + cluster * 3 // 2, 2), "little")
            found = pair >> 4 if cluster & 1 else pair & 0xFFF
        else:
            found = self._table.entry(cluster)
            if bits == 32:
                found &= 0x0FFFFFFF
        if found >= self._bad:
            return END_OF_CHAIN
        return found

    def _free_clusters(self) -> int:
        geometry = self._geometry
        if geometry.bits == 12:
            return sum(self._next(c) == 0 for c in range(FIRST_CLUSTER, geometry.end))
        width = geometry.bits // 8
        start = geometry.table + FIRST_CLUSTER * width
        end = geometry.table + geometry.end * width
        free = 0
        while start < end:
            chunk = self._source.read(start, min(_CHUNK, end - start))
            start += len(chunk)
            entries = numbers(chunk, "H" if width == 2 else "I")
            if width == 4 and max(chunk[3::4]) > 0x0F:  # the upper four bits are not part of it
                free += sum(not number & 0x0FFFFFFF for number in entries)
            else:
                free += entries.count(0)
        return free
