"""The bytes of disks, partitions and logical volumes, inside the worker."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from imgtool.engines.direct.worker.fs.base import ReadFailed, Source

_LARGEST_READ = 16 << 20
# Metadata is read in small pieces that lie together: whole blocks are read and kept.
_BLOCK = 128 << 10
_KEPT_BLOCKS = 256
# Of every stretch QEMU says in which link of the chain it is: 0 in none, 1 in the active image.
# docs/interop/nbd.txt in QEMU
_DEPTH = "qemu:allocation-depth"
_ASKED = 1 << 30
_ZEROS = bytes(32 << 10)
_LARGEST_MAPPED = 16 << 40
_FILLED = 512  # of what cannot be read as a whole, this much is tried at a time


class CannotOpen(Exception):
    """QEMU does not open the image; why is on standard error."""


class DiskServerGone(Exception):
    """QEMU is gone: nothing can be read any more, which is no damage of what was asked for."""


class Disk:
    """A disk, read through a socket that is connected to a qemu-nbd of its own, which has to be
    waited for.
    """

    def __init__(self, connection: int) -> None:
        import nbd

        self._error: type[Exception] = nbd.Error
        self._nbd: Any = nbd.NBD()
        self._nbd.set_strict_mode(self._nbd.get_strict_mode() & ~nbd.STRICT_FLAGS)
        self._whole = nbd.CMD_FLAG_DF
        # Bytes of a read that failed are not looked at: libnbd need not clear them before.
        self._nbd.set_pread_initialize(False)
        self._nbd.add_meta_context(_DEPTH)
        self._size = 0
        self._lost: Sequence[tuple[int, int]] = ()
        try:
            self._nbd.aio_connect_socket(connection)
        except nbd.Error as error:
            raise CannotOpen(str(error)) from error
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def wait(self) -> None:
        """Wait until the image is open; `CannotOpen` if QEMU does not open it."""
        try:
            while self._nbd.aio_is_connecting():
                self._nbd.poll(-1)
            self._size = int(self._nbd.get_size())
            # A read that is answered in fragments and fails in the middle ends the connection.
            if not self._nbd.can_df():
                self._whole = 0
        except self._error as error:
            raise CannotOpen(str(error)) from error

    def lose(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These parts of the disk, from start to end and in their order, are not there."""
        self._lost = ranges

    @property
    def has_lost(self) -> bool:
        """Whether parts of it are not there."""
        return bool(self._lost)

    def _refuse_lost(self, offset: int, length: int) -> None:
        at = bisect_right(self._lost, (offset, self._size))
        for start, end in self._lost[max(at - 1, 0) : at + 1]:
            if start < offset + length and offset < end:
                raise ReadFailed("this part of the image is not there: its file was cut off")

    def _explain(self, error: Exception) -> Exception:
        if self._nbd.aio_is_ready() or self._nbd.aio_is_processing():
            return ReadFailed("a part of the image cannot be read")
        return DiskServerGone("QEMU has gone away")

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; `ReadFailed` past the end or where QEMU cannot."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ReadFailed("past the end of the disk")
        first, last = offset // _BLOCK, (offset + length - 1) // _BLOCK
        if 0 < length <= _BLOCK and last - first < 2:
            start = offset - first * _BLOCK
            try:
                if first == last:
                    return self._block(first)[start : start + length]
                return (self._block(first) + self._block(last))[start : start + length]
            except ReadFailed:
                pass  # what cannot be read may lie beside what was asked for
        if 0 < length <= _LARGEST_READ:
            return self._fetch(offset, length)
        return b"".join(
            self._fetch(at, min(_LARGEST_READ, offset + length - at))
            for at in range(offset, offset + length, _LARGEST_READ)
        )

    @property
    def overlaps(self) -> bool:
        """Whether `start` is there: older bindings know no memory but their own."""
        major, minor = self._nbd.get_version().split(".")[:2]
        return (int(major), int(minor)) >= (1, 14)

    def start(self, offset: int, buffer: memoryview) -> int:
        """Begin to read as many bytes as `buffer` has into it; gives what `finish` takes."""
        if offset < 0 or offset + len(buffer) > self._size:
            raise ReadFailed("past the end of the disk")
        if self._lost:
            self._refuse_lost(offset, len(buffer))
        try:
            return int(self._nbd.aio_pread(buffer, offset, flags=self._whole))
        except self._error as error:
            raise self._explain(error) from error

    def finish(self, started: int) -> None:
        """Wait for what was begun; `ReadFailed` where QEMU cannot."""
        try:
            while not self._nbd.aio_command_completed(started):
                self._nbd.poll(-1)
        except self._error as error:
            raise self._explain(error) from error

    def written_stretches(self, links: int, most: int) -> list[tuple[int, int]] | None:
        """The stretches (start, end) in bytes that come from the topmost `links` of the chain.

        None if QEMU does not tell, or if there are more than `most`.
        """
        found: list[tuple[int, int]] = []
        if not links:
            return found
        if self._size > _LARGEST_MAPPED or not self._nbd.can_meta_context(_DEPTH):
            return None
        at = 0

        def take(context: str, offset: int, pairs: Sequence[int], error: object) -> int:
            nonlocal at
            for length, depth in zip(pairs[::2], pairs[1::2], strict=True):
                if 0 < depth <= links:
                    begin = found.pop()[0] if found and found[-1][1] == at else at
                    found.append((begin, at + length))
                at += length
            return 0

        while at < self._size:
            asked = at
            try:
                self._nbd.block_status(min(_ASKED, self._size - at), at, take)
            except self._error:
                return None
            if at == asked or len(found) > most:
                return None
        return found

    def _block(self, number: int) -> bytes:
        kept = self._kept.get(number)
        if kept is None:
            start = number * _BLOCK
            kept = bytes(self._fetch(start, min(_BLOCK, self._size - start)))
            self._kept[number] = kept
            if len(self._kept) > _KEPT_BLOCKS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(number)
        return kept

    def _fetch(self, offset: int, length: int) -> bytes:
        if self._lost:
            self._refuse_lost(offset, length)
        try:
            # A bytearray, which is as good as bytes here and need not be copied.
            return self._nbd.pread(length, offset, flags=self._whole)  # type: ignore[no-any-return]
        except self._error as error:
            raise self._explain(error) from error


class SourceRange:
    """A part of another source: a partition."""

    def __init__(self, source: Source, offset: int, size: int) -> None:
        self._source = source
        self._offset = offset
        self._size = size

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; `ReadFailed` past the end."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ReadFailed("past the end of the partition")
        return self._source.read(self._offset + offset, length)


class Filled:
    """A source with zeros for what cannot be read of it: enough to see what it was."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._source.size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`."""
        try:
            return self._source.read(offset, length)
        except ReadFailed:
            pass
        pieces = []
        for at in range(offset, offset + length, _FILLED):
            wanted = min(_FILLED, offset + length - at)
            try:
                pieces.append(bytes(self._source.read(at, wanted)))
            except ReadFailed:
                pieces.append(bytes(wanted))
        return b"".join(pieces)


class Joined:
    """Stretches of other sources one after the other: a linear logical volume."""

    def __init__(self, parts: Sequence[tuple[Source, int, int]]) -> None:
        self._parts = []
        start = 0
        for source, offset, length in parts:
            self._parts.append((start, length, source, offset))
            start += length
        self._starts = [part[0] for part in self._parts]
        self._size = start

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; `ReadFailed` past the end."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ReadFailed("past the end of the volume")
        pieces = []
        first = max(0, bisect_right(self._starts, offset) - 1)
        for start, size, source, at in islice(self._parts, first, None):
            if not length:
                break
            if start <= offset < start + size:
                wanted = min(length, start + size - offset)
                pieces.append(source.read(at + offset - start, wanted))
                offset += wanted
                length -= wanted
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


_scratch: int | None = None


def use_scratch(descriptor: int | None) -> None:
    """Where nothing can be written to: memory of the parent's, which looks after its size."""
    global _scratch
    _scratch = descriptor


@contextlib.contextmanager
def excerpt(size: int, parts: Iterable[tuple[int, bytes]]) -> Iterator[int]:
    """A file descriptor of a file of this size that has only these parts (offset, bytes)."""
    if _scratch is None:
        # In /tmp, whose size is limited; memory without a name is not.
        descriptor = os.open("/tmp", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    else:
        descriptor = _scratch
    try:
        os.ftruncate(descriptor, size)
        for offset, data in parts:
            for start in range(0, len(data), len(_ZEROS)):
                piece = data[start : start + len(_ZEROS)]
                if piece != _ZEROS[: len(piece)]:
                    os.pwrite(descriptor, piece, offset + start)
        yield descriptor
    finally:
        if _scratch is None:
            os.close(descriptor)
        else:
            os.ftruncate(descriptor, 0)
