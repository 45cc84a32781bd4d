"""The bytes of large files, read from the disks with several requests on their way at once."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

from imgtool.engines.direct.wire.extents import Extent
from imgtool.engines.direct.wire.ring import SLOT
from imgtool.engines.direct.worker.fs.base import Filesystem, ReadFailed
from imgtool.engines.direct.worker.sources import Disk
from imgtool.engines.direct.worker.volumes import Volumes, on_disks

LARGE = 4 << 20  # below it the map of a file costs more than it saves
_ON_THEIR_WAY = 4  # slots


def map_file(volumes: Volumes, filesystem: Filesystem, inode: int) -> list[Extent] | None:
    """Where all of a regular file is on the disks, ascending, holes left out; None where that is
    not known, or not all of it can be read.
    """
    runs = filesystem.runs(inode)
    if runs is None:
        return None
    places = volumes.places(filesystem)
    found: list[Extent] = []
    for start, at, length in runs:
        end = start + length
        for disk, offset, size in on_disks(places, at, length):
            if found and _follows(found[-1], start, disk, offset):
                found[-1] = found[-1]._replace(end=start + size)
            else:
                found.append(Extent(start, start + size, disk, offset))
            start += size
        if start != end:
            return None  # past the end of the volume
    return found


def _follows(run: Extent, start: int, disk: int, at: int) -> bool:
    return (run.end, run.disk, run.at - run.start) == (start, disk, at - start)


class _Piece(NamedTuple):
    slot: int
    length: int
    asked: list[tuple[Disk, int]]


class Contents:
    """One file, or a part of it, on its way from the disks into slots of `view`."""

    def __init__(
        self,
        disks: Sequence[Disk],
        runs: Sequence[Extent],
        view: Callable[[int, int], memoryview],
        take: Callable[[bool], int | None],
    ) -> None:
        self._disks = disks
        self._runs = runs
        self._view = view
        self._take = take

    def read(self, offset: int, end: int) -> Generator[tuple[int, int], None, None]:
        """Each slot and how many bytes of the file are in it, in their order."""
        waiting: deque[_Piece] = deque()
        try:
            while True:
                while offset < end and len(waiting) < _ON_THEIR_WAY:
                    slot = self._take(not waiting)
                    if slot is None:
                        break
                    piece = _Piece(slot, min(SLOT, end - offset), [])
                    waiting.append(piece)
                    self._ask(piece, offset)
                    offset += piece.length
                if not waiting:
                    return
                self._finish(waiting[0])
                done = waiting.popleft()
                yield done.slot, done.length
        finally:
            for piece in waiting:  # nothing is written into a slot later on
                while piece.asked:
                    with contextlib.suppress(ReadFailed):
                        self._finish(piece)

    @staticmethod
    def _finish(piece: _Piece) -> None:
        while piece.asked:
            disk, asked = piece.asked.pop()  # what failed is over: it is not waited for again
            disk.finish(asked)

    def _ask(self, piece: _Piece, offset: int) -> None:
        view = self._view(piece.slot, piece.length)
        at, end = offset, offset + piece.length
        first = max(0, bisect_right(self._runs, offset, key=lambda run: run.start) - 1)
        for index in range(first, len(self._runs)):
            run = self._runs[index]
            if run.start >= end:
                break
            start, stop = max(run.start, offset), min(run.end, end)
            if start >= stop:
                continue
            _clear(view[at - offset : start - offset])
            disk = self._disks[run.disk]
            part = view[start - offset : stop - offset]
            piece.asked.append((disk, disk.start(run.at + start - run.start, part)))
            at = stop
        _clear(view[at - offset :])


def _clear(view: memoryview) -> None:
    view[:] = bytes(len(view))
