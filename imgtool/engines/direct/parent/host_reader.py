"""Large files, read from the image's own files: where they lie is asked of the worker, the bytes
need not go through it and QEMU.

What the worker says can be wrong only about which bytes of the guest's own disks these are. Whether
they may be read so is the host's to know: `imgtool.image.qemu.clusters`.
"""

from __future__ import annotations

import contextlib
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from imgtool.engines.direct.wire.extents import Extent
from imgtool.errors import EngineError, Interrupted
from imgtool.host import interrupt
from imgtool.image.qemu.clusters import ByteRange, Clusters

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_ZEROS = bytes(1 << 20)


class PlainStream(io.RawIOBase):
    """The bytes of a file from `at` to `end`; holes are zeros.

    `disks` has None for those that only QEMU can read. From where the file goes on in one of them,
    or in clusters that only QEMU can read, its bytes are those of `others`, which gets the place in
    the file.
    """

    def __init__(
        self,
        found: Sequence[Extent],
        disks: Sequence[Clusters | None],
        at: int,
        end: int,
        others: Callable[[int], BinaryIO],
    ) -> None:
        self._runs = found
        self._starts = [run.start for run in found]
        self._disks = disks
        self._at = at
        self._end = end
        self._open_others = others
        self._others: BinaryIO | None = None

    def readable(self) -> bool:
        """It is for reading alone."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer, but for the end of the file and where the worker takes over; 0 at the
        end. Raises `EngineError` where the host cannot read the image.
        """
        view = memoryview(buffer)
        done = 0
        while self._others is None and self._at < self._end and done < len(view):
            if interrupt.pending():
                raise Interrupted("interrupted")
            try:
                stretch = self._stretch(min(len(view) - done, self._end - self._at))
                if stretch is None:
                    self._others = self._open_others(self._at)
                    break
                count = _fill(view[done : done + stretch.length], stretch)
            except EngineError:
                if not done:
                    raise
                break  # what precedes it is given; the next read fails
            done += count
            self._at += count
        if not done and self._others is not None:
            # One part at a time: what precedes an error is not lost.
            return self._others.readinto1(buffer)  # type: ignore[attr-defined, no-any-return]
        return done

    def _stretch(self, length: int) -> ByteRange | None:
        index = bisect_right(self._starts, self._at) - 1
        if index < 0 or self._runs[index].end <= self._at:
            following = index + 1
            hole = self._starts[following] if following < len(self._starts) else self._end
            return ByteRange(None, 0, min(length, hole - self._at))
        run = self._runs[index]
        clusters = self._disks[run.disk]
        if clusters is None:
            return None
        with _of_the_image():
            return clusters.at(run.at + self._at - run.start, min(length, run.end - self._at))


@contextlib.contextmanager
def _of_the_image() -> Iterator[None]:
    """Errors of the host's system calls are the image's."""
    try:
        yield
    except OSError as error:
        raise EngineError(f"the image cannot be read: {error.strerror}") from error


def _fill(view: memoryview, stretch: ByteRange) -> int:
    if stretch.descriptor is None:
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            part[:] = _ZEROS[: len(part)]
        return len(view)
    with _of_the_image():
        count = os.preadv(stretch.descriptor, [view], stretch.offset)
    if not count:
        raise EngineError("the image has become shorter")
    return count
