"""What `find` looks at: a path and all below it, parents first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from imgtool.errors import NotInGuestError
from imgtool.guest.guest import Guest, OnProblem
from imgtool.guest.model import Entry

_MOST_DEPTH = 250  # directories in one another; what is deeper is not searched by levels


@dataclass(frozen=True, slots=True)
class Visited:
    """One entry, how many directories below the path at which the search began it is, and that
    path."""

    entry: Entry
    depth: int
    start: bytes


class Visit:
    """A search below one path, which can be told not to go into a directory.

    `deepest` is how many directories below it the search goes at most; with `one_filesystem` it
    stays on that of the path. What cannot be read is told to `on_problem`.
    """

    def __init__(
        self,
        guest: Guest,
        start: Entry,
        *,
        deepest: int | None,
        one_filesystem: bool,
        on_problem: OnProblem,
    ) -> None:
        self._guest = guest
        self._start = start
        self._deepest = deepest
        self._one_filesystem = one_filesystem
        self._on_problem = on_problem
        self._left_out: bytes | None = None

    def prune(self, entry: Entry) -> None:
        """Do not go into this directory, the last that was given."""
        self._left_out = entry.path.rstrip(b"/") + b"/"

    def entries(self) -> Iterator[Visited]:
        """The path itself, and what is below it."""
        start = self._start
        yield Visited(start, 0, start.path)
        if start.type != "directory" or self._left_out is not None:
            return
        above = start.path.rstrip(b"/").count(b"/")
        for entry in self._below():
            if self._left_out is not None:
                if entry.path.startswith(self._left_out):
                    continue
                self._left_out = None
            if self._one_filesystem and entry.device != start.device:
                self.prune(entry)  # what is mounted there is shown, as find(1) does, not entered
            yield Visited(entry, entry.path.count(b"/") - above, start.path)

    def _below(self) -> Iterator[Entry]:
        if self._deepest is None:
            yield from self._guest.walk(self._start.path, on_problem=self._on_problem)
        elif self._deepest > 0:
            yield from self._level(self._start, min(self._deepest, _MOST_DEPTH), ())

    def _level(
        self, directory: Entry, depth: int, above: tuple[tuple[int, int], ...]
    ) -> Iterator[Entry]:
        if directory.inode and (directory.device, directory.inode) in above:
            self._on_problem(directory.path, "a directory that contains itself")
            return
        above = (*above, (directory.device, directory.inode))
        try:
            for entry in self._guest.entries(directory.path, on_problem=self._on_problem):
                yield entry
                left_out = self._left_out is not None and (entry.path + b"/") == self._left_out
                if entry.type == "directory" and depth > 1 and not left_out:
                    yield from self._level(entry, depth - 1, above)
        except NotInGuestError as error:  # what is mounted there is not shown
            self._on_problem(directory.path, error.message)
