"""How much what is below a path takes: every directory's sum, hard links counted once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from imgtool.guest.guest import Guest, OnProblem
from imgtool.guest.model import Entry


@dataclass(frozen=True, slots=True)
class Usage:
    """What a file takes, or a directory with all below it: bytes as `ls` shows them, bytes that are
    allocated, how many files and directories, and how many directories below the top it is."""

    entry: Entry
    apparent: int
    allocated: int
    files: int
    depth: int


class _Sum:
    """A directory whose content is being counted."""

    def __init__(self, entry: Entry, depth: int) -> None:
        self.entry = entry
        self.depth = depth
        self.apparent = entry.size if entry.type != "directory" else 0
        self.allocated = entry.blocks * 512
        self.files = 1
        self.prefix = entry.path.rstrip(b"/") + b"/"

    def add(self, other: _Sum) -> None:
        self.apparent += other.apparent
        self.allocated += other.allocated
        self.files += other.files

    def usage(self) -> Usage:
        return Usage(self.entry, self.apparent, self.allocated, self.files, self.depth)


def measure(
    guest: Guest,
    top: Entry,
    *,
    one_filesystem: bool = False,
    on_problem: OnProblem,
) -> Iterator[Usage]:
    """The usage of the top and of all below it; a directory comes after what is in it.

    The size of directories themselves counts as allocated alone. A file that has several names
    counts where it is met first.
    """
    if top.type != "directory":
        yield _Sum(top, 0).usage()
        return
    above = [_Sum(top, 0)]
    met: set[tuple[int, int]] = set()
    skipped: bytes | None = None
    for entry in guest.walk(top.path, on_problem=on_problem):
        if skipped is not None and entry.path.startswith(skipped):
            continue
        skipped = None
        if one_filesystem and entry.device != top.device:
            skipped = entry.path + b"/"
            continue
        while not entry.path.startswith(above[-1].prefix):
            yield _close(above)
        one = _Sum(entry, len(above))
        if entry.type == "directory":
            above.append(one)
            continue
        if entry.nlink > 1:
            if (entry.device, entry.inode) in met:
                continue
            met.add((entry.device, entry.inode))
        above[-1].add(one)
        yield one.usage()
    while len(above) > 1:
        yield _close(above)
    yield above[0].usage()


def _close(above: list[_Sum]) -> Usage:
    """End the directory at hand: its sum belongs to the one that it is in."""
    done = above.pop()
    above[-1].add(done)
    return done.usage()
