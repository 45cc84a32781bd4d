"""The bytes of one file, written with holes for zeros, the later ones while the next are read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

BLOCK = 4096
_ZEROS = bytes(1 << 20)
_FEW = 8  # pieces, for which to start a thread would take longer
_WAITING = 3


def _nonzero_runs(block: bytes) -> Iterator[tuple[int, bytes]]:
    """The parts of a block that are not zeros, by whole filesystem blocks, with their offsets."""
    if block == _ZEROS[: len(block)]:
        return
    first_bytes = block[::BLOCK]  # most blocks of most files are known by theirs
    start, number = 0, first_bytes.find(0)
    while number >= 0:
        offset = number * BLOCK
        piece = block[offset : offset + BLOCK]
        if piece == _ZEROS[: len(piece)]:
            if start < offset:
                yield start, block[start:offset]
            start = offset + len(piece)
        number = first_bytes.find(0, number + 1)
    if start < len(block):
        yield start, block[start:] if start else block


def _write(file: int, offset: int, piece: bytes) -> None:
    for start, run in _nonzero_runs(piece):
        view, at = memoryview(run), offset + start
        while view:
            written = os.pwrite(file, view, at)
            view, at = view[written:], at + written


class Writes:
    """Pieces on their way into an open file, which whoever made this closes after it.

    A new page of a file is memory that the system has to find first, which on a virtual machine can
    take longer than to fill it: the next piece is read meanwhile. (Of several threads that
    write all but one would wait for the kernel's lock of the file.)
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._count = 0
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def add(self, offset: int, piece: bytes) -> None:
        """Write a piece now or soon; raises the `OSError` of this or an earlier one."""
        self._count += 1
        if self._count <= _FEW:
            _write(self._file, offset, piece)
            return
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor  # most files do without

            self._pool = ThreadPoolExecutor(1)
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(_write, self._file, offset, piece))

    def finish(self) -> None:
        """Wait until all is written; raises `OSError`."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Nothing is written from now on."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
