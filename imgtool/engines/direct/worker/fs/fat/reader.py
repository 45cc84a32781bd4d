"""FAT12, FAT16 and FAT32, as Linux's vfat shows them when mounted with its default options."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from stat import S_IFDIR, S_IFREG

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs import cluster_chains, cluster_users
from imgtool.engines.direct.worker.fs.base import (
    Filesystem,
    Node,
    PathNotFound,
    ReadFailed,
    Source,
    Usage,
)
from imgtool.engines.direct.worker.fs.cluster_chains import END_OF_CHAIN, Chain, Runs, Table
from imgtool.engines.direct.worker.fs.cluster_users import Owners, Sharing
from imgtool.engines.direct.worker.fs.exfat.boot import numbers
from imgtool.engines.direct.worker.fs.fat import directory as fat_directory
from imgtool.engines.direct.worker.fs.fat.boot import FIRST_CLUSTER, Geometry, read_geometry
from imgtool.engines.direct.worker.fs.fat.directory import (
    DIRECTORY,
    ENTRY,
    READ_ONLY,
    Content,
    Entry,
)
from imgtool.engines.direct.worker.fs.pages import Pages

_ROOT = 0  # no directory entry lies there: it is the boot sector
_LARGEST_DIRECTORY = 2 * 1024 * 1024  # the specification's limit of 65,536 entries
_CHUNK = 1024 * 1024


class FatFilesystem(Filesystem):
    """A FAT volume. An inode is the place of the directory entry on the volume, in entries."""

    type = "vfat"
    root = _ROOT
    ignores_case = True

    def __init__(self, source: Source, geometry: Geometry) -> None:
        self._source = Pages(source)
        self._geometry = geometry
        self._bad = {12: 0xFF7, 16: 0xFFF7, 32: 0x0FFFFFF7}[geometry.bits]
        self._table = Table(self._source, geometry.table, 2 if geometry.bits == 16 else 4)
        self._directory_of_cluster: dict[int, int] = {}
        self._last_directory: tuple[int, bytes] = (-1, b"")
        self._last_runs: tuple[int, Runs] = (-1, Runs([], [], None))
        self._sharing = Sharing(
            geometry.clusters, self._survey, self._beginnings, self._parts_of_table
        )

    @classmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> FatFilesystem:
        """Check the boot sector and the root directory; a dirty volume reads like a clean one."""
        found = cls(source, read_geometry(source))
        found._directory(_ROOT)
        return found

    def stat(self, inode: int) -> Node:
        """`lstat`; a directory's size and link count come from its clusters, as in the kernel."""
        if inode == _ROOT:
            data = self._directory(_ROOT)
            links = fat_directory.subdirectories(data) + 2
            return self._node(inode, S_IFDIR | 0o755, len(data), 0, links)
        entry = self._entry(inode)
        if entry.attributes & DIRECTORY:
            data = self._directory(inode)
            links = fat_directory.subdirectories(data)
            if links < 2:
                raise Unsupported("a directory on FAT does not begin with . and ..")
            return self._node(inode, S_IFDIR | 0o755, len(data), entry.mtime, links)
        mode = 0o555 if entry.attributes & READ_ONLY else 0o755
        return self._node(inode, S_IFREG | mode, entry.size, entry.mtime, 1)

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """Long names where there are any, else 8.3 names; no volume labels, nothing deleted."""
        for entry, child in self._list_directory(inode)[0]:
            yield entry.name, child

    def target(self, inode: int) -> bytes:
        """FAT has no symbolic links."""
        raise ReadFailed("not a symbolic link")

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file; of one whose chain is damaged those before the damage."""
        entry = self._entry(inode)
        length = min(length, entry.size - offset)
        if length <= 0:
            return b""
        return self._runs(inode, entry).read(self._source, offset, length)

    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        """All of the file: FAT has no holes."""
        size = self._entry(inode).size
        return [(0, size)] if size else []

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

    def _node(self, inode: int, mode: int, size: int, mtime: int, links: int) -> Node:
        cluster = self._geometry.cluster_size
        blocks = -(-size // cluster) * cluster // 512
        return Node(inode, mode, 0, 0, size, mtime * 10**9, blocks, links, 0)

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
            if inode == _ROOT and self._geometry.bits != 32:
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
        if inode == _ROOT:
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
        # Two entries with one directory behind them could make a walk endless.
        if self._directory_of_cluster.setdefault(first, inode) != inode:
            raise Unsupported("two directories on FAT share their clusters")
        places: list[int] = []
        cluster = first
        while cluster != END_OF_CHAIN:
            if len(places) * geometry.cluster_size >= _LARGEST_DIRECTORY:
                raise Unsupported("a directory on FAT is too large or goes in circles")
            places.append(self._place(cluster))
            cluster = self._next(cluster)
        return places

    def _directory(self, inode: int) -> bytes:
        if self._last_directory[0] == inode:
            return self._last_directory[1]
        if inode == _ROOT and self._geometry.bits != 32:
            data = self._source.read(self._geometry.root_offset, self._geometry.root_size)
        else:
            size = self._geometry.cluster_size
            data = b"".join(self._source.read(place, size) for place in self._places(inode))
        self._last_directory = (inode, data)
        return data

    def _runs(self, inode: int, entry: Content) -> Runs:
        if self._last_runs[0] == inode:
            return self._last_runs[1]
        if entry.attributes & DIRECTORY:
            raise ReadFailed("not a regular file")
        if entry.cluster == 0:
            raise Unsupported("a file on FAT has a size and no clusters")
        chain = self._sharing.check(inode, self._chain(entry))
        runs = cluster_chains.runs(chain, self._place, self._geometry.cluster_size)
        self._last_runs = (inode, runs)
        return runs

    def _chain(self, entry: Content) -> Chain:
        wanted = -(-entry.size // self._geometry.cluster_size)
        return cluster_chains.follow(entry.cluster, wanted, self._geometry.end, self._next)

    def _beginnings(self) -> Iterator[tuple[int, int, int]]:
        """Where the chains of files and directories begin."""
        geometry, size = self._geometry, self._geometry.cluster_size
        if geometry.bits == 32:
            yield _ROOT, geometry.root_cluster, 1
        waiting = [_ROOT]
        while waiting:
            directory = waiting.pop()
            try:
                data, places = self._directory(directory), self._places(directory)
            except (Unsupported, ReadFailed):
                continue
            step = len(data) if directory == _ROOT and geometry.bits != 32 else size
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

    def _survey(self) -> Owners | None:
        """Who uses which clusters; None on volumes where it would take long to find out."""
        owners = Owners(self._geometry.end)
        waiting, names = [_ROOT], 0
        while waiting:
            directory = waiting.pop()
            try:
                listed = self._list_directory(directory)[0]
                clusters = self._clusters(directory)
            except (Unsupported, ReadFailed):
                continue  # whoever lists it will hear of it
            owners.claim(clusters)
            names += len(listed)
            if names > cluster_users.MOST_NAMES:
                return None
            for entry, child in listed:
                content = fat_directory.content(entry.raw, self._geometry.bits)
                if content.attributes & DIRECTORY:
                    waiting.append(child)
                elif content.size and content.cluster:
                    owners.claim(self._chain(content).pieces)
                if owners.is_futile:
                    return None
        return owners

    def _clusters(self, directory: int) -> list[cluster_chains.Piece]:
        if directory == _ROOT and self._geometry.bits != 32:
            return []
        first, size = self._geometry.data, self._geometry.cluster_size
        return [((place - first) // size + FIRST_CLUSTER, 1) for place in self._places(directory)]

    def _place(self, cluster: int) -> int:
        if not FIRST_CLUSTER <= cluster < self._geometry.end:
            raise ReadFailed("a chain of clusters leaves the volume")
        return self._geometry.data + (cluster - FIRST_CLUSTER) * self._geometry.cluster_size

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
