"""Moving and merging folders of any depth, by descriptors and without following a link.

A guest can nest folders deeper than Python recurses, than a path can be long, and than a process
has descriptors: nothing here recurses, and only a few descriptors are open at a time. What comes
from a guest may also be read-only for a user who is not root; in a private folder of our own that
is changed where it is in the way.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Cursor:
    """Opens folders below `root`, never through a link. The last one opened stays open."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._parts: tuple[bytes, ...] = ()
        self._current: int | None = None

    def open(self, parts: tuple[bytes, ...]) -> int:
        """A descriptor of a folder, good until the next call."""
        known = len(self._parts)
        if self._current is None or parts[:known] != self._parts:
            known = 0
        current = os.dup(self._root if self._current is None or not known else self._current)
        try:
            for part in parts[known:]:
                below = os.open(part, OPEN_FOLDER, dir_fd=current)
                os.close(current)
                current = below
        except BaseException:
            os.close(current)
            raise
        self.close()
        self._parts, self._current = parts, current
        return current

    def close(self) -> None:
        """Close the last folder."""
        if self._current is not None:
            os.close(self._current)
            self._current = None


def is_folder(name: bytes, folder: int) -> bool:
    """Whether a name is there and is a directory itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode)
    except FileNotFoundError:
        return False


def change_mode(name: bytes | str, folder: int, mode: int) -> None:
    """Give a directory another mode; `OSError` where the name is no directory itself.

    chmod(2) by name would follow a link that somebody has put in its place.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        # fchmod(2) takes no descriptor that was opened without the right to read.
        Path(f"/proc/self/fd/{descriptor}").chmod(mode)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def movable(name: bytes, folder: int) -> Iterator[None]:
    """While the block runs, a name of a private folder can be moved elsewhere.

    Moving a directory writes its `..`, so its mode must allow that; it gets its own mode back.
    """
    mode = os.lstat(name, dir_fd=folder).st_mode
    if not stat.S_ISDIR(mode) or mode & 0o700 == 0o700:
        yield
        return
    change_mode(name, folder, stat.S_IMODE(mode) | 0o700)
    current = os.open(name, OPEN_FOLDER, dir_fd=folder)
    try:
        yield
    finally:
        # By descriptor: where it is now, others may put a link in its place.
        os.fchmod(current, stat.S_IMODE(mode))
        os.close(current)


@dataclass(frozen=True)
class _Pair:
    """A folder that both trees have, and what is in ours but not a folder in both."""

    parts: tuple[bytes, ...]
    source: int
    target: int
    names: tuple[bytes, ...]


def _pairs(source: int, target: int) -> Iterator[_Pair]:
    ours, theirs = Cursor(source), Cursor(target)
    pending: list[tuple[bytes, ...]] = [()]
    try:
        while pending:
            parts = pending.pop()
            here, there = ours.open(parts), theirs.open(parts)
            names: list[bytes] = []
            for name in map(os.fsencode, os.listdir(here)):  # noqa: PTH208 - a descriptor
                if is_folder(name, here) and is_folder(name, there):
                    # What is merged is thrown away: only the folder that was there stays.
                    change_mode(name, here, 0o700)
                    pending.append((*parts, name))
                else:
                    names.append(name)
            yield _Pair(parts, here, there, tuple(names))
    finally:
        ours.close()
        theirs.close()


def conflict(source: int, target: int, look: Callable[[bytes, int, bytes], None]) -> bytes | None:
    """A path at which one tree has a directory and the other has something else, if any.

    `look` is called with all that would be replaced: its path, its folder's descriptor, its name.
    """
    for pair in _pairs(source, target):
        for name in pair.names:
            try:
                there = os.lstat(name, dir_fd=pair.target)
            except FileNotFoundError:
                continue
            path = b"/".join((*pair.parts, name))
            if is_folder(name, pair.source) or stat.S_ISDIR(there.st_mode):
                return path
            look(path, pair.target, name)
    return None


def merge(source: int, target: int) -> None:
    """Move what is in a private folder into another: files replace files, folders are merged."""
    for pair in _pairs(source, target):
        for name in pair.names:
            with movable(name, pair.source):
                os.rename(name, name, src_dir_fd=pair.source, dst_dir_fd=pair.target)
