"""What is to be written into a guest."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from imgtool.guest.model import Entry

Owner = tuple[int, int]
# The content of a file: bytes, or a file of the host that is read when it is written.
Content = bytes | Path


@dataclass(frozen=True)
class Kept:
    """What a file keeps of the one that it replaces. Its mode never has the set-user-ID and
    set-group-ID bits, as after any other write."""

    user: bool = False
    group: bool = False
    mode: bool = False


@dataclass
class Changes:
    """What is to be written: paths without links, in the order to do it.

    `seen` is what the guest had at each path that was looked at, None for nothing: what was planned
    is right only as long as that is so.
    """

    seen: dict[str, Entry | None]
    removed: list[str] = field(default_factory=list)
    made: list[tuple[Entry, Content | None]] = field(default_factory=list)
    rewritten: list[tuple[str, Content]] = field(default_factory=list)
    modes: list[tuple[str, int]] = field(default_factory=list)
    owners: list[tuple[str, Owner]] = field(default_factory=list)
    relabel: bool = False

    def __bool__(self) -> bool:
        return any((self.removed, self.made, self.rewritten, self.modes, self.owners, self.relabel))

    def add_attributes(self, path: str, before: Entry, after: Entry) -> None:
        """Note the owner and mode of what is there, where they are to be others."""
        owner, mode = (after.uid, after.gid), stat.S_IMODE(after.mode)
        moved = owner != (before.uid, before.gid)
        if moved:
            self.owners.append((path, owner))
        # A new owner takes the set-user-ID and set-group-ID bits away.
        if mode != stat.S_IMODE(before.mode) or (moved and mode & 0o6000):
            self.modes.append((path, mode))

    def touch(self, paths: Collection[str]) -> bool:
        """Whether something is different at one of these paths."""
        made = (os.fsdecode(entry.path) for entry, _ in self.made)
        attributes = (path for path, _ in (*self.modes, *self.owners, *self.rewritten))
        return any(path in paths for path in (*self.removed, *made, *attributes))
