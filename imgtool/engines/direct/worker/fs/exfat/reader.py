"""exFAT, as Linux's exfat shows it when mounted with its default options."""

from __future__ import annotations

import struct
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
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
from imgtool.engines.direct.worker.fs.cluster_chains import (
    END_OF_CHAIN,
    Chain,
    Table,
)
from imgtool.engines.direct.worker.fs.cluster_filesystem import ROOT, ClusterFilesystem
from imgtool.engines.direct.worker.fs.exfat import directory as exfat_directory
from imgtool.engines.direct.worker.fs.exfat.boot import FIRST_CLUSTER, Geometry, read_geometry
from imgtool.engines.direct.worker.fs.exfat.directory import (
    DIRECTORY,
    ENTRY,
    READ_ONLY,
    Content,
    Upcase,
)

_LARGEST_DIRECTORY = 16 * 1024 * 1024
_LARGEST_UPCASE = 2 * 65536
_CHUNK = 1024 * 1024
_BAD = 0xFFFFFFF7
_TIME_UNIT = 10_000_000  # nanoseconds


class ExfatFilesystem(ClusterFilesystem[Content]):
    """An exFAT volume. An inode is the place of the file's entry on the volume, in entries."""

    type = "exfat"

    def __init__(self, source: Source, geometry: Geometry) -> None:
        super().__init__(source, geometry)
        self._geometry = geometry
        # The root directory has no times of its own: the kernel gives it that of the mount.
        self._opened_ns = time.time_ns() // _TIME_UNIT * _TIME_UNIT
        self._stream_of: dict[int, int] = {}  # where a set goes on in another cluster, in bytes
        self._last_listed: tuple[int, list[tuple[bytes, int]], dict[bytes, int]] = (-1, [], {})
        self._table = Table(self._source, geometry.table, 4)
        system = list(exfat_directory.primaries(self._directory(ROOT)))
        self._upcase = self._read_upcase(system)
        self._bitmap = self._find_bitmap(system)

    @classmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> ExfatFilesystem:
        """Check the boot region, the root directory, the up-case table and the bitmap's place."""
        found = cls(source, read_geometry(source))
        found._list_directory(ROOT)
        return found

    def stat(self, inode: int) -> Node:
        """`lstat`; a directory's link count comes from its clusters, as in the kernel."""
        if inode == ROOT:
            return self._directory_node(inode, self._opened_ns)
        entry = self._entry(inode)
        if entry.attributes & DIRECTORY:
            return self._directory_node(inode, entry.mtime_ns)
        mode = S_IFREG | (0o555 if entry.attributes & READ_ONLY else 0o755)
        return self._node(inode, mode, entry.size, entry.mtime_ns, 1)

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """What the directory's entry sets name; no volume label, nothing deleted."""
        yield from self._list_directory(inode)[0]

    def usage(self) -> Usage:
        """The kernel counts the bits of the allocation bitmap."""
        geometry = self._geometry
        used, left, at = 0, geometry.clusters, self._bitmap
        while left:
            data = self._source.read(at, min(_CHUNK, -(-left // 8)))
            bits = int.from_bytes(data, "little") & (1 << min(left, len(data) * 8)) - 1
            used += bits.bit_count()
            left, at = max(0, left - len(data) * 8), at + len(data)
        size, used = geometry.clusters * geometry.cluster_size, used * geometry.cluster_size
        return Usage(size, used, size - used, 0, 0)

    def lookup(self, inode: int, name: bytes) -> int:
        """By the volume's own table of upper-case letters, without regard to dots at the end."""
        child = self._list_directory(inode)[1].get(self.fold(name))
        if child is None:
            raise PathNotFound
        return child

    def fold(self, name: bytes) -> bytes:
        """In upper case by the volume's own table, without the dots at its end."""
        try:
            return self._upcase.fold(name.rstrip(b".").decode().encode("utf-16-le"))
        except UnicodeDecodeError:
            return name

    def _directory_node(self, inode: int, mtime_ns: int) -> Node:
        data = self._directory(inode)
        links = exfat_directory.subdirectories(data) + 2
        return self._node(inode, S_IFDIR | 0o755, len(data), mtime_ns, links)

    def _entry(self, inode: int) -> Content:
        start = inode * ENTRY
        stream = self._stream_of.get(inode, start + ENTRY)
        raw = self._source.read(start, ENTRY) + self._source.read(stream, ENTRY)
        entry = exfat_directory.content(raw)
        count = -(-entry.size // self._geometry.cluster_size)
        room = self._geometry.end - entry.cluster
        if count and (entry.cluster < FIRST_CLUSTER or room < (1 if entry.chained else count)):
            # Versions of Linux differ in what they make of these.
            raise Unsupported("a file on exFAT has clusters outside of the volume")
        if count > self._geometry.clusters:
            raise Unsupported("a file on exFAT is larger than the volume")
        return entry

    def _list_directory(self, inode: int) -> tuple[list[tuple[bytes, int]], dict[bytes, int]]:
        """What a directory lists, and which entry the kernel finds for a folded name."""
        if self._last_listed[0] == inode:
            return self._last_listed[1:]
        data = self._directory(inode)
        places = self._places(inode)
        cluster = self._geometry.cluster_size
        listed: list[tuple[bytes, int]] = []
        found: dict[bytes, int] = {}
        for entry in exfat_directory.entries(data, self._upcase, inode == ROOT):
            child = (places[entry.position // cluster] + entry.position % cluster) // ENTRY
            self._note_stream(child, entry.position, places)
            listed.append((entry.name, child))
            if found.setdefault(entry.folded, child) != child:
                raise Unsupported("a directory on exFAT has two entries of one name")
        self._last_listed = (inode, listed, found)
        return listed, found

    def _places(self, inode: int) -> list[int]:
        """Where a directory's clusters are on the volume, in bytes."""
        size = self._geometry.cluster_size
        if inode == ROOT:
            first, count = self._geometry.root_cluster, None
            pieces = self._chain(first, _LARGEST_DIRECTORY // size + 1)
        else:
            entry = self._entry(inode)
            if not entry.attributes & DIRECTORY:
                raise ReadFailed("not a directory")
            if entry.size == 0 or entry.size % size or entry.size > _LARGEST_DIRECTORY:
                raise Unsupported(f"a directory on exFAT has a size of {entry.size} bytes")
            first, count = entry.cluster, entry.size // size
            pieces = self._chain(first, count + 1) if entry.chained else iter([(first, count)])
        self._claim(first, inode, "exFAT")
        places: list[int] = []
        try:
            for start, length in pieces:
                if (len(places) + length) * size > _LARGEST_DIRECTORY:
                    raise Unsupported("a directory on exFAT is too large or goes in circles")
                places.extend(self._place(start + number) for number in range(length))
        except ReadFailed as error:
            # The kernel looks no further than the end of the entries.
            raise Unsupported(f"a directory on exFAT: {error}") from error
        if count not in (None, len(places)):
            raise Unsupported("a directory on exFAT has another size than its clusters")
        return places

    def _file_chain(self, entry: Content) -> Chain:
        def following(cluster: int) -> int:
            found = self._next(cluster)
            return END_OF_CHAIN if found > _BAD else found

        wanted = -(-entry.size // self._geometry.cluster_size)
        if not entry.chained:
            return Chain([(entry.cluster, wanted)], None)
        return cluster_chains.follow(entry.cluster, wanted, self._geometry.end, following)

    def _beginnings(self) -> Iterator[tuple[int, int, int]]:
        """Where the clusters of files and directories begin, and of those that are no chain how
        many they are.
        """
        size = self._geometry.cluster_size
        yield ROOT, self._geometry.root_cluster, 1
        waiting = [ROOT]
        while waiting:
            directory = waiting.pop()
            try:
                data, places = self._directory(directory), self._places(directory)
            except (Unsupported, ReadFailed):
                continue
            for at, cluster, length, is_directory in exfat_directory.beginnings(data):
                child = (places[at // size] + at % size) // ENTRY
                yield child, cluster, max(1, -(-length // size))
                if is_directory:
                    self._note_stream(child, at, places)
                    waiting.append(child)

    def _note_stream(self, inode: int, position: int, places: Sequence[int]) -> None:
        """Remember where the set that begins at this position of a directory goes on."""
        stream = position + ENTRY
        if stream % self._geometry.cluster_size == 0:
            self._stream_of[inode] = places[stream // self._geometry.cluster_size]

    def _parts_of_table(self) -> Iterator[tuple[int, array[int]]]:
        return self._table.parts(self._geometry.end)

    def _contents(self, directory: int) -> tuple[int, Iterable[tuple[int, Content]]]:
        listed = self._list_directory(directory)[0]
        return len(listed), self._sound_entries(child for _, child in listed)

    def _sound_entries(self, inodes: Iterable[int]) -> Iterator[tuple[int, Content]]:
        for inode in inodes:
            try:
                entry = self._entry(inode)
            except Unsupported:
                continue
            yield inode, entry

    def _chain(self, cluster: int, most: int) -> Iterator[tuple[int, int]]:
        """The pieces of a chain in the table: first cluster and number of clusters. What comes
        after `most` clusters is not looked at.
        """
        while most and cluster <= _BAD:
            first, count = cluster, 0
            while cluster == first + count and count < most:
                count += 1
                if count < most:
                    cluster = self._next(cluster)
            most -= count
            yield first, count

    def _next(self, cluster: int) -> int:
        """What the table has for a cluster: the next one's number, or a mark of the end."""
        self._place(cluster)
        return self._table.entry(cluster)

    def _contiguous(self, raw: bytes, what: str) -> tuple[int, int]:
        """The place and size of the bitmap or up-case table that an entry of the root names."""
        cluster, size = struct.unpack_from("<IQ", raw, 20)
        wanted = -(-size // self._geometry.cluster_size)
        if not 0 < wanted <= self._geometry.clusters:
            raise Unsupported(f"exFAT with an odd {what}")
        # The kernel does not look into the table for these.
        if list(self._chain(cluster, wanted + 1)) != [(cluster, wanted)]:
            raise Unsupported(f"exFAT with the {what} in pieces")
        return self._place(cluster), size

    def _read_upcase(self, system: Sequence[tuple[int, bytes]]) -> Upcase:
        found = [raw for kind, raw in system if kind == exfat_directory.UPCASE]
        if len(found) != 1:
            raise Unsupported(f"exFAT with {len(found)} up-case tables")
        place, size = self._contiguous(found[0], "up-case table")
        if size % 2 or size > _LARGEST_UPCASE:
            raise Unsupported(f"exFAT with an up-case table of {size} bytes")
        (checksum,) = struct.unpack_from("<I", found[0], 4)
        return Upcase(self._source.read(place, size), checksum)

    def _find_bitmap(self, system: Sequence[tuple[int, bytes]]) -> int:
        found = [raw for kind, raw in system if kind == exfat_directory.BITMAP]
        if len(found) != 1 or found[0][1]:
            raise Unsupported(f"exFAT with {len(found)} allocation bitmaps")
        place, size = self._contiguous(found[0], "allocation bitmap")
        if size != -(-self._geometry.clusters // 8):
            raise Unsupported(f"exFAT with an allocation bitmap of {size} bytes")
        return place
