"""Chains of clusters on FAT and exFAT: as far as they are sound, and which of them are not.

The kernel follows a chain for as long as the file's size asks, wherever it leads: round in a
circle, or on into another file. What it gives then is not the file. fsck.fat and fsck.exfat call
both corrupt, and so do these readers. A chain that is longer than the file is not: Linux itself
leaves such chains (fallocate(2) with FALLOC_FL_KEEP_SIZE), and what the size asks for is right.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import ReadFailed, Source
from imgtool.engines.direct.worker.fs.exfat.boot import FIRST_CLUSTER, numbers

END_OF_CHAIN = -1

_MOST_PIECES = 500_000
_TABLE_CHUNK = 16 * 1024
_LARGE_CHUNK = 1024 * 1024

Piece = tuple[int, int]  # clusters side by side: the first one, and how many


class Table:
    """A table of clusters with entries of 16 or 32 bits, read in chunks."""

    def __init__(self, source: Source, start: int, width: int) -> None:
        self._source = source
        self._start = start
        self._width = width
        self._type = "H" if width == 2 else "I"
        self._chunk: tuple[int, array[int]] = (-1, array("I"))

    def entry(self, cluster: int) -> int:
        """What the table has for a cluster."""
        at = self._start + cluster * self._width
        chunk = at // _TABLE_CHUNK
        if self._chunk[0] != chunk:
            start = chunk * _TABLE_CHUNK
            length = min(_TABLE_CHUNK, self._source.size - start) // self._width * self._width
            self._chunk = (chunk, numbers(self._source.read(start, length), self._type))
        return self._chunk[1][at % _TABLE_CHUNK // self._width]

    def parts(self, end: int, mask: int = 0xFFFFFFFF) -> Iterator[tuple[int, array[int]]]:
        """The entries of the clusters before `end`, in parts, each with the number of its first
        cluster; without parts in which nothing is in use. Of each entry only the bits of `mask`.
        """
        step = _LARGE_CHUNK // self._width
        for cluster in range(0, end, step):
            length = min(step, end - cluster) * self._width
            data = self._source.read(self._start + cluster * self._width, length)
            if not data.strip(b"\0"):
                continue
            entries = numbers(data, self._type)
            if self._width == 4 and max(data[3::4]) > mask >> 24:
                entries = array(entries.typecode, (number & mask for number in entries))
            yield cluster, entries


class Chain(NamedTuple):
    """The clusters of a file, as far as they are its own, and why they end before the file does."""

    pieces: list[Piece]
    problem: str | None

    def cut(self, clusters: int, problem: str) -> Chain:
        """Only the first clusters of it."""
        kept: list[Piece] = []
        for first, count in self.pieces:
            if clusters <= 0:
                break
            kept.append((first, min(count, clusters)))
            clusters -= count
        return Chain(kept, problem)


def follow(first: int, wanted: int, end: int, following: Callable[[int], int]) -> Chain:
    """The first `wanted` clusters of the chain that begins at `first`.

    `end` is the number after the volume's last cluster; `following` gives the next cluster of a
    chain, `END_OF_CHAIN` after the last one.
    """
    # A chain of more clusters than the volume has runs in a circle.
    most = min(wanted, end)
    pieces: list[Piece] = []
    problem = None
    cluster, done = first, 0
    while done < most:
        if cluster == END_OF_CHAIN:
            problem = "the file's chain of clusters is too short"
            break
        if not FIRST_CLUSTER <= cluster < end:
            problem = "the file's chain of clusters is broken"
            break
        if len(pieces) >= _MOST_PIECES:
            raise Unsupported("a file is in too many pieces")
        start, count = cluster, 0
        while cluster == start + count and cluster < end and done < most:
            count, done = count + 1, done + 1
            cluster = following(cluster) if done < most else END_OF_CHAIN
        pieces.append((start, count))
    return _without_circle(Chain(pieces, problem))


def _without_circle(chain: Chain) -> Chain:
    """A chain up to the first cluster that it comes to again."""
    if not _overlap(chain.pieces):
        return chain
    # As many pieces as do not overlap: `low` do not, `high` do.
    low, high = 1, len(chain.pieces)
    while high - low > 1:
        middle = (low + high) // 2
        if _overlap(chain.pieces[:middle]):
            high = middle
        else:
            low = middle
    first, count = chain.pieces[low]
    again = min(
        max(first, start)
        for start, length in chain.pieces[:low]
        if start < first + count and first < start + length
    )
    done = sum(length for _, length in chain.pieces[:low]) + again - first
    return chain.cut(done, "the file's chain of clusters runs in a circle")


def _overlap(pieces: Sequence[Piece]) -> bool:
    last = 0
    for first, count in sorted(pieces):
        if first < last:
            return True
        last = first + count
    return False


class Runs(NamedTuple):
    """Where a file lies on the volume: for each run where it starts in the file, its place and its
    size in bytes. `problem` is why there is no more of the file.
    """

    starts: list[int]
    places: list[tuple[int, int]]
    problem: str | None

    def read(self, source: Source, offset: int, length: int) -> bytes:
        """Bytes of the file, fewer where it ends too early; `ReadFailed` if there are none."""
        parts = []
        at = bisect_right(self.starts, offset) - 1
        while length > 0 and 0 <= at < len(self.places):
            place, available = self.places[at]
            within = offset - self.starts[at]
            take = min(length, available - within)
            if take <= 0:
                break
            parts.append(source.read(place + within, take))
            offset, length, at = offset + take, length - take, at + 1
        if not parts and length > 0 and self.problem is not None:
            raise ReadFailed(self.problem)
        return b"".join(parts)


def runs(chain: Chain, place: Callable[[int], int], cluster_size: int) -> Runs:
    """A chain in bytes; `place` gives where a cluster is."""
    starts: list[int] = []
    places: list[tuple[int, int]] = []
    done = 0
    for first, count in chain.pieces:
        starts.append(done)
        places.append((place(first), count * cluster_size))
        done += count * cluster_size
    return Runs(starts, places, chain.problem)
