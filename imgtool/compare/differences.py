"""What differs between two trees: a merge of two walks that are in the same order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imgtool.errors import EngineError
from imgtool.text import printable

if TYPE_CHECKING:
    from imgtool.guest.model import Entry

# A side with more paths that cannot be read than this is not worth comparing.
MOST_UNREADABLE = 100_000
MOST_BYTES = 64 << 20  # of their names

ADDED, REMOVED, CHANGED = "added", "removed", "changed"


@dataclass(frozen=True)
class Difference:
    """A path that is not the same on both sides.

    `change` is added, removed or changed; `fields` are what changed: some of type, mode, uid, gid,
    size, mtime, target, xattrs, rdev, content. An entry is None where there is none.
    """

    change: str
    fields: tuple[str, ...]
    before: Entry | None
    after: Entry | None

    @property
    def entry(self) -> Entry:
        """The entry after, or the one that is gone."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def path(self) -> bytes:
        """The path, the same on both sides."""
        return self.entry.path


def _order(path: bytes) -> bytes:
    # NUL is in no name and sorts before everything else: parents come before their children and
    # siblings in the order of their bytes, as a walk gives them.
    return path.replace(b"/", b"\0")


def below(path: bytes, top: bytes) -> bool:
    """Whether a path is this directory, or in it."""
    return path == top or path.startswith(top.rstrip(b"/") + b"/")


class Walk:
    """One side: its entries in the order of a walk, and what of it could not be read.

    `problem` is for whoever makes the entries, who calls it before the entry that follows the
    unreadable path is given.
    """

    def __init__(self, say: Callable[[bytes, str], None]) -> None:
        self.say = say
        self._unreadable: deque[bytes] = deque()  # in the order of the walk
        self._room = MOST_BYTES
        self._hidden: list[bytes] = []
        self._entries: Iterator[Entry] = iter(())
        self._reached = b""
        self.head: Entry | None = None

    def problem(self, path: bytes, line: str) -> None:
        """A path that cannot be read, and why."""
        if len(self._unreadable) >= MOST_UNREADABLE:
            raise EngineError(f"more than {MOST_UNREADABLE} paths cannot be read: not compared")
        self._room -= len(path)
        if self._room < 0:
            raise EngineError("too many long paths cannot be read: not compared")
        self._unreadable.append(path)
        self.say(path, line)

    def hide(self, path: bytes, line: str) -> None:
        """A path where something else belongs than what is there."""
        self._hidden.append(path)
        self.say(path, line)

    def start(self, entries: Iterator[Entry]) -> None:
        """Begin; the first entry is at hand afterwards."""
        self._entries = entries
        self.advance()

    def advance(self) -> None:
        """On to the next entry."""
        self.head = next(self._entries, None)
        if self.head is None:
            return
        # Two walks that are merged tell nothing if one of them goes back.
        order = _order(self.head.path)
        if order < self._reached:
            raise EngineError(
                "its names are not in order: not compared",
                subject=printable(os.fsdecode(self.head.path)),
            )
        self._reached = order

    def hides(self, path: bytes) -> bool:
        """Whether what this side has at a path is not what belongs there."""
        return any(below(path, top) for top in self._hidden)

    def lacks(self, path: bytes) -> bool:
        """Whether a path that is not in the walk is not there. Paths are asked in order."""
        unreadable = self._unreadable
        while unreadable and _order(unreadable[0]) <= _order(path):
            if below(path, unreadable[0]):
                return False
            self._room += len(unreadable.popleft())
        return True


def merge_walks(before: Walk, after: Walk) -> Iterator[tuple[Entry | None, Entry | None]]:
    """The entries of both sides by their paths; None for a side that certainly has none.

    What one side does not know is in no pair: it was said to be unreadable.
    """
    while before.head is not None or after.head is not None:
        one, other = before.head, after.head
        if one is not None and other is not None and one.path != other.path:
            if _order(one.path) < _order(other.path):
                other = None
            else:
                one = None
        found = one or other
        assert found is not None
        certain = not (before.hides(found.path) or after.hides(found.path))
        if one is None:
            certain = before.lacks(found.path) and certain
        if other is None:
            certain = after.lacks(found.path) and certain
        if certain:
            yield one, other
        if one is not None:
            before.advance()
        if other is not None:
            after.advance()


def changed_fields(before: Entry, after: Entry, *, everything: bool = False) -> tuple[str, ...]:
    """What lstat and readlink tell apart.

    A directory's size and time change with what is in it, which is a difference of its own: they
    count only with `everything`, as do those of a symbolic link beside its target.
    """
    if before is after:
        return ()  # nearly every one
    kind = after.type
    same_kind = before.type == kind
    fields = []
    if not same_kind:
        fields.append("type")
    if before.mode & 0o7777 != after.mode & 0o7777:
        fields.append("mode")
    if before.uid != after.uid:
        fields.append("uid")
    if before.gid != after.gid:
        fields.append("gid")
    if same_kind and before.size != after.size and (kind == "file" or everything):
        fields.append("size")
    if before.mtime_ns != after.mtime_ns and (everything or not same_kind or kind != "directory"):
        fields.append("mtime")
    if same_kind and before.target != after.target:
        fields.append("target")
    if before.xattrs is not None and after.xattrs is not None and before.xattrs != after.xattrs:
        fields.append("xattrs")
    if same_kind and before.rdev != after.rdev and kind in ("char", "block"):
        fields.append("rdev")
    return tuple(fields)
