"""What FAT and exFAT have in common: names and data in clusters, without owners, links or holes."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs import cluster_chains, cluster_users
from imgtool.engines.direct.worker.fs.base import Filesystem, Node, ReadFailed, Source
from imgtool.engines.direct.worker.fs.cluster_chains import Chain, Piece, Runs
from imgtool.engines.direct.worker.fs.cluster_users import Owners, Sharing
from imgtool.engines.direct.worker.fs.exfat.boot import FIRST_CLUSTER
from imgtool.engines.direct.worker.fs.fat.directory import DIRECTORY
from imgtool.engines.direct.worker.fs.pages import Pages

ROOT = 0  # no directory entry lies there: it is the boot sector


class Geometry(Protocol):
    """Where the clusters are: their size and the place of the first one in bytes, how many they
    are, and the number after the last one's."""

    @property
    def cluster_size(self) -> int: ...
    @property
    def clusters(self) -> int: ...
    @property
    def data(self) -> int: ...
    @property
    def end(self) -> int: ...


class Content(Protocol):
    """What an entry of a directory says, but for the name."""

    @property
    def attributes(self) -> int: ...
    @property
    def cluster(self) -> int: ...
    @property
    def size(self) -> int: ...


_Content = TypeVar("_Content", bound=Content)


class ClusterFilesystem(Filesystem, Generic[_Content]):
    """A volume in clusters. An inode is the place of the file's entry on the volume, in entries."""

    root = ROOT
    ignores_case = True

    def __init__(self, source: Source, geometry: Geometry) -> None:
        self._source = Pages(source)
        self._clusters_at = geometry
        self._directory_of_cluster: dict[int, int] = {}
        self._last_directory: tuple[int, bytes] = (-1, b"")
        self._last_runs: tuple[int, Runs] = (-1, Runs([], [], None))
        self._sharing = Sharing(
            geometry.clusters, self._survey, self._beginnings, self._parts_of_table
        )

    def target(self, inode: int) -> bytes:
        """There are no symbolic links."""
        raise ReadFailed("not a symbolic link")

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file; of one whose chain is damaged those before the damage."""
        entry = self._entry(inode)
        length = min(length, entry.size - offset)
        if length <= 0:
            return b""
        return self._runs(inode, entry).read(self._source, offset, length)

    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        """All of the file: there are no holes."""
        size = self._entry(inode).size
        return [(0, size)] if size else []

    @abstractmethod
    def _entry(self, inode: int) -> _Content:
        """What the entry of a file or directory says."""

    @abstractmethod
    def _file_chain(self, entry: _Content) -> Chain:
        """The clusters of a file."""

    @abstractmethod
    def _places(self, inode: int) -> list[int]:
        """Where a directory's clusters are on the volume, in bytes."""

    @abstractmethod
    def _contents(self, directory: int) -> tuple[int, Iterable[tuple[int, _Content]]]:
        """How many names a directory has, and the inodes and entries of what it holds."""

    @abstractmethod
    def _beginnings(self) -> Iterator[tuple[int, int, int]]:
        """Where the clusters of files and directories begin, as `Sharing` asks for it."""

    @abstractmethod
    def _parts_of_table(self) -> Iterator[tuple[int, array[int]]]:
        """The entries of the table, as `Sharing` asks for them."""

    def _node(self, inode: int, mode: int, size: int, mtime_ns: int, links: int) -> Node:
        cluster = self._clusters_at.cluster_size
        blocks = -(-size // cluster) * cluster // 512
        return Node(inode, mode, 0, 0, size, mtime_ns, blocks, links, 0)

    def _place(self, cluster: int) -> int:
        """Where a cluster is on the volume, in bytes; `ReadFailed` for a number that none has."""
        if not FIRST_CLUSTER <= cluster < self._clusters_at.end:
            raise ReadFailed("a chain of clusters leaves the volume")
        return self._clusters_at.data + (cluster - FIRST_CLUSTER) * self._clusters_at.cluster_size

    def _directory(self, inode: int) -> bytes:
        """All that is in a directory."""
        if self._last_directory[0] != inode:
            self._last_directory = (inode, self._read_directory(inode))
        return self._last_directory[1]

    def _read_directory(self, inode: int) -> bytes:
        size = self._clusters_at.cluster_size
        return b"".join(self._source.read(place, size) for place in self._places(inode))

    def _claim(self, first: int, inode: int, name: str) -> None:
        """Two entries with one directory behind them could make a walk endless: `Unsupported`."""
        if self._directory_of_cluster.setdefault(first, inode) != inode:
            raise Unsupported(f"two directories on {name} share their clusters")

    def _runs(self, inode: int, entry: _Content) -> Runs:
        if entry.attributes & DIRECTORY:
            raise ReadFailed("not a regular file")
        if self._last_runs[0] != inode:
            chain = self._sharing.check(inode, self._file_chain(entry))
            runs = cluster_chains.runs(chain, self._place, self._clusters_at.cluster_size)
            self._last_runs = (inode, runs)
        return self._last_runs[1]

    def _clusters(self, directory: int) -> Iterable[Piece]:
        """The clusters of a directory."""
        first, size = self._clusters_at.data, self._clusters_at.cluster_size
        return [((place - first) // size + FIRST_CLUSTER, 1) for place in self._places(directory)]

    def _survey(self) -> Owners | None:
        """Who uses which clusters; None on volumes where it would take long to find out."""
        owners = Owners(self._clusters_at.end)
        waiting, names = [ROOT], 0
        while waiting:
            directory = waiting.pop()
            try:
                count, contents = self._contents(directory)
                clusters = self._clusters(directory)
            except (Unsupported, ReadFailed):
                continue  # whoever lists it will hear of it
            owners.claim(clusters)
            names += count
            if names > cluster_users.MOST_NAMES:
                return None
            for child, entry in contents:
                if entry.attributes & DIRECTORY:
                    waiting.append(child)
                elif entry.size and entry.cluster:
                    owners.claim(self._file_chain(entry).pieces)
                if owners.is_futile:
                    return None
        return owners
