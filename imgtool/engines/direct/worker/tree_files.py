"""The files of a mounted tree, for whoever only looks into a few of them."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

from imgtool.engines.direct.worker.fs.base import Filesystem, PathNotFound, ReadFailed
from imgtool.engines.direct.worker.tree import Found, InodeRef, Tree
from imgtool.formats.files import Undetermined

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_PIECE = 1 << 20
_LEAST = 512  # what a disk gives, or not
_MOST_NAMES = 100_000


def pieces(filesystem: Filesystem, found: Found, offset: int, length: int) -> Iterator[bytes]:
    """The bytes of a regular file, in parts; `ReadFailed` where it cannot be read, or ends before
    its size, after all that precedes it.
    """
    end = min(offset + length, found.node.size)
    most = _PIECE
    while offset < end:
        try:
            data = filesystem.read(found.place.inode, offset, min(most, end - offset))
        except ReadFailed:
            if most <= _LEAST:
                raise
            most = max(most // 16, _LEAST)
            continue
        if not data:
            raise ReadFailed("the file ends too early")
        yield data
        offset += len(data)


class _Reader(io.RawIOBase):
    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._held = self._held or next(self._parts, b"")
        view = memoryview(buffer)
        count = min(len(view), len(self._held))
        view[:count] = self._held[:count]
        self._held = self._held[count:]
        return count


class TreeFiles:
    """`imgtool.formats.files.Files` on a tree; what cannot be read is not there."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def _found(self, path: str) -> tuple[Filesystem, InodeRef] | None:
        try:
            _, place = self._tree.resolve(os.fsencode(path))
            return self._tree.filesystem(place), place
        except (PathNotFound, ReadFailed):
            return None

    def _regular(self, path: str) -> tuple[Filesystem, Found] | None:
        found = self._found(path)
        if found is None:
            return None
        filesystem, place = found
        try:
            node = filesystem.stat(place.inode)
        except ReadFailed:
            return None
        if not stat.S_ISREG(node.mode):
            return None
        return filesystem, Found(os.fsencode(path), place, node, None)

    def read(self, path: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a regular file, links followed; None if there is none."""
        found = self._regular(path)
        if found is None:
            return None
        try:
            return b"".join(pieces(*found, 0, limit))
        except ReadFailed:
            return None

    def file_header(self, path: str, length: int) -> bytes | None:
        """The first `length` bytes of a regular file, links followed; None if there is none."""
        return self.read(path, length)

    def is_dir(self, path: str) -> bool:
        """Whether the path is a directory, links followed."""
        found = self._found(path)
        try:
            return found is not None and stat.S_ISDIR(found[0].stat(found[1].inode).mode)
        except ReadFailed:
            return False

    def names(self, path: str) -> list[bytes]:
        """The names in a directory, as far as it can be read; none if there is no such."""
        found = self._found(path)
        if found is None or not self.is_dir(path):
            return []
        names: list[bytes] = []
        with contextlib.suppress(ReadFailed):
            for name, _ in found[0].names(found[1].inode):
                names.append(name)
                if len(names) > _MOST_NAMES:
                    raise Undetermined(f"{path} has very many entries")
        return names

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """A regular file as a stream, links followed; `Undetermined` if there is none."""
        found = self._regular(path)
        if found is None:
            raise Undetermined(f"{path} is no regular file")
        reader = _Reader(pieces(*found, 0, found[1].node.size))
        try:
            yield cast(BinaryIO, io.BufferedReader(reader, _PIECE))
        except ReadFailed as error:
            raise Undetermined(f"{path}: {error}") from error
