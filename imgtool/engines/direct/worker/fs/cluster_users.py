"""Who uses the clusters of a FAT or exFAT: whether a file's are another's too.

For one file it is enough to see that nothing leads into its clusters: no entry of the table but its
own, and no file or directory that begins there. Where something does, and where more than a few
files are read, it is found out for the whole volume.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

from imgtool.engines.direct.worker.fs.cluster_chains import Chain, Piece

# Who uses a cluster is found out on volumes up to these, 128 GiB in clusters of 32 KiB: once, in
# 1.5 s where all are in use.
MOST_CLUSTERS = 4 << 20
MOST_NAMES = 100_000

_FREE, _USED, _SHARED = 0, 1, 2
_ONE_MORE = bytes([_USED, _SHARED, _SHARED]).ljust(256, b"\0")
_FEW_FILES = 2
# The whole volume is as quick with fewer names, and takes little beside the reading of a file that
# has more clusters.
_FEW_NAMES = 500
_MOST_OF_ONE = 1 << 18


class Owners:
    """How many files and directories use each cluster of a volume: none, one, or more."""

    def __init__(self, end: int) -> None:
        self._users = bytearray(end)
        self._claims = 0

    @property
    def is_futile(self) -> bool:
        """Whether so many clusters are in use by several that to go on would not end."""
        return self._claims > 2 * len(self._users)

    def claim(self, pieces: Iterable[Piece]) -> None:
        """A file or directory uses these clusters."""
        for first, count in pieces:
            self._claims += count
            part = self._users[first : first + count]
            if part.count(_FREE) == len(part):
                self._users[first : first + count] = bytes([_USED]) * len(part)
            else:
                self._users[first : first + count] = part.translate(_ONE_MORE)

    def check(self, chain: Chain) -> Chain:
        """A chain up to the first cluster that something else uses too."""
        done = 0
        for first, count in chain.pieces:
            shared = self._users.find(_SHARED, first, first + count)
            if shared >= 0:
                return chain.cut(done + shared - first, "its clusters are in use by another file")
            done += count
        return chain


class OneFile:
    """The clusters of a file, to see whether something leads into them."""

    def __init__(self, chain: Chain) -> None:
        self._pieces = sorted(chain.pieces)
        self._starts = [first for first, _ in self._pieces]
        self._clusters = {c for first, count in self._pieces for c in range(first, first + count)}

    def meets(self, first: int, count: int) -> bool:
        """Whether some of these clusters are the file's."""
        at = bisect_right(self._starts, first + count - 1) - 1
        return at >= 0 and sum(self._pieces[at]) > first

    def is_entered(self, start: int, entries: array[int]) -> bool:
        """Whether one of these entries of the table, the first of which is that of the cluster
        `start`, leads into the file; its own do not count, and are zeros afterwards.
        """
        end = start + len(entries)
        at = max(bisect_right(self._starts, start) - 1, 0)
        for first, count in self._pieces[at : bisect_right(self._starts, end)]:
            low = max(first, start) - start
            length = min(first + count, end) - start - low
            if length > 0:
                zeros = array(entries.typecode, bytes(length * entries.itemsize))
                entries[low : low + length] = zeros
        return not self._clusters.isdisjoint(entries)


class Sharing:
    """Finds out whether something else uses a file's clusters too."""

    def __init__(
        self,
        clusters: int,
        survey: Callable[[], Owners | None],
        beginnings: Callable[[], Iterator[tuple[int, int, int]]],
        table: Callable[[], Iterator[tuple[int, array[int]]]],
    ) -> None:
        """`survey` looks at all that a volume of so many clusters holds. `beginnings` gives the
        inode of every file and directory, its first cluster, and how many surely follow that one
        side by side, itself counted; `table` the entries of the table in parts, each with the
        number of its first cluster. Both may give more than there is, and not less.
        """
        self._is_large = clusters > MOST_CLUSTERS
        self._survey = survey
        self._beginnings = beginnings
        self._table = table
        self._files = 0

    def check(self, inode: int, chain: Chain) -> Chain:
        """A file's chain up to the first cluster that something else uses too; all of it where to
        find out would take too long.
        """
        if self._is_large:
            return chain
        self._files += 1
        if self._files <= _FEW_FILES and self._is_alone(inode, chain):
            return chain
        return self._owners.check(chain) if self._owners else chain

    @cached_property
    def _owners(self) -> Owners | None:
        return self._survey()

    def _is_alone(self, inode: int, chain: Chain) -> bool:
        """Whether nothing leads into the file, as far as that is quickly seen."""
        if sum(count for _, count in chain.pieces) > _MOST_OF_ONE:
            return False
        file = OneFile(chain)
        names = 0
        for other, first, count in self._beginnings():
            names += 1
            if names > MOST_NAMES or (other != inode and file.meets(first, count)):
                return False
        if names < _FEW_NAMES:
            return False
        return not any(file.is_entered(start, entries) for start, entries in self._table())
