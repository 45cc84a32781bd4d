"""A guest as it will be: its files, and over them in memory all that the steps want to change.

Nothing is written here. Steps read and change a `View`; when every step could be taken, what is
different is written in one go (`imgtool.inject.writing`). So a step that fails has touched nothing,
and a guest that is as it should be is not even opened to be written.

Links are followed inside the guest, component by component: an absolute target begins at the
guest's root, and `..` never leads above it.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from imgtool.errors import ImgtoolError, NotInGuestError
from imgtool.guest.model import Entry

# As Linux: more links than these on the way are a loop.
_MOST_LINKS = 40
# The largest file that is read into memory to be changed.
LARGEST = 16 << 20
_BLOCK = 1 << 20

Owner = tuple[int, int]
# The content of a file: bytes, or a file of the host that is read when it is written.
Content = bytes | Path


class Files(Protocol):
    """What a view needs of a guest."""

    def lstat(self, path: str | bytes) -> Entry:
        """One path as it is; `NotInGuestError` if there is none."""

    def entries(self, path: str | bytes) -> Iterator[Entry]:
        """What is in a directory."""

    def open(self, path: str | bytes) -> AbstractContextManager[BinaryIO]:
        """A regular file's bytes as a stream."""

    def read_bytes(self, path: str | bytes, limit: int | None = None) -> bytes:
        """A whole small file."""


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


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _above(path: str) -> Iterator[str]:
    """The path and each folder above it but the root."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def _size(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


class View:
    """The files of a guest with the changes so far. Paths are absolute; links are followed in all
    their folders, and in the last component where a method says so.

    Every method that changes something says whether it was different before.
    """

    def __init__(self, base: Files) -> None:
        self._base = base
        self._seen: dict[str, Entry | None] = {}
        self._now: dict[str, Entry | None] = {}
        self._contents: dict[str, Content] = {}
        self._removed: dict[str, None] = {}
        self.relabel = False

    # Looking

    def _entry(self, path: str) -> Entry | None:
        if path in self._now:
            return self._now[path]
        if any(above in self._removed for above in _above(path)):
            return None
        if path not in self._seen:
            try:
                self._seen[path] = self._base.lstat(os.fsencode(path))
            except NotInGuestError:
                self._seen[path] = None
        return self._seen[path]

    def real(self, path: str, *, follow: bool = False) -> str:
        """The path without links; what is at its end may be missing, its folder may not.

        With `follow` a link at the end is followed too. Raises `NotInGuestError` for a folder that
        is not there, `ImgtoolError` for links in a loop.
        """
        left, done, links = _parts(path)[::-1], "", 0
        while left:
            name = left.pop()
            if name == "..":
                done = done.rpartition("/")[0]
                continue
            here = f"{done}/{name}"
            entry = self._entry(here)
            if entry is None:
                if left:
                    raise NotInGuestError("no such folder in the guest", subject=here)
                return here
            if entry.type == "symlink" and (left or follow):
                links += 1
                if links > _MOST_LINKS:
                    raise ImgtoolError("too many symbolic links", subject=path)
                target = os.fsdecode(entry.target or b"")
                if target.startswith("/"):
                    done = ""
                left += _parts(target)[::-1]
                continue
            if left and entry.type != "directory":
                raise NotInGuestError("not a folder of the guest", subject=here)
            done = here
        return done or "/"

    def lstat(self, path: str, *, follow: bool = False) -> Entry | None:
        """What is at a path; None for nothing, or if a folder on the way is not there."""
        try:
            return self._entry(self.real(path, follow=follow))
        except NotInGuestError:
            return None

    def kind(self, path: str) -> str | None:
        """The type of what is at a path, links followed; None for nothing."""
        entry = self.lstat(path, follow=True)
        return None if entry is None else entry.type

    def names(self, path: str) -> list[str]:
        """The names in a folder, sorted; none if there is no such folder."""
        if self.kind(path) != "directory":
            return []
        folder = self.real(path, follow=True)
        prefix = folder.rstrip("/") + "/"
        found = set()
        if not any(above in self._removed for above in _above(folder)):
            for entry in self._base.entries(os.fsencode(folder)):
                here = prefix + os.fsdecode(entry.name)
                self._seen[here] = entry
                found.add(here)
        found |= {here for here in self._now if here.rpartition("/")[0] + "/" == prefix}
        return sorted(here[len(prefix) :] for here in found if self._entry(here) is not None)

    def read(self, path: str, limit: int = LARGEST) -> bytes | None:
        """A regular file, links followed; None if there is none.

        Raises `ImgtoolError` for what is something else, or longer than `limit`.
        """
        entry = self.lstat(path, follow=True)
        if entry is None:
            return None
        here = self.real(path, follow=True)
        if entry.type != "file":
            raise ImgtoolError(f"not a regular file but a {entry.type}", subject=path)
        if entry.size > limit:
            raise ImgtoolError(f"the file is longer than {limit} bytes", subject=path)
        content = self._contents.get(here)
        if content is None:
            return self._base.read_bytes(os.fsencode(here), limit)
        return content.read_bytes() if isinstance(content, Path) else content

    def _same(self, here: str, entry: Entry, content: Content) -> bool:
        if entry.size != _size(content):
            return False
        held = self._contents.get(here)
        if isinstance(content, bytes):
            return self.read(here, len(content)) == content
        if held is not None:
            raw = held.read_bytes() if isinstance(held, Path) else held
            return raw == content.read_bytes()
        with content.open("rb") as one, self._base.open(os.fsencode(here)) as other:
            while block := one.read(_BLOCK):
                if other.read(len(block)) != block:
                    return False
        return True

    # Changing

    def _make(
        self,
        here: str,
        kind: int,
        mode: int,
        owner: Owner,
        *,
        size: int = 0,
        target: bytes | None = None,
    ) -> None:
        name = os.fsencode(here)
        self._now[here] = Entry(name, kind | mode, *owner, size=size, mtime_ns=0, target=target)

    def _folder_of(self, here: str) -> None:
        folder = here.rpartition("/")[0]
        entry = self._entry(folder) if folder else None
        if folder and (entry is None or entry.type != "directory"):
            raise NotInGuestError("no such folder in the guest", subject=folder)

    def write(
        self,
        path: str,
        content: Content,
        *,
        mode: int | None = None,
        owner: Owner | None = None,
        new_mode: int = 0o644,
        new_owner: Owner = (0, 0),
    ) -> bool:
        """Have a regular file with this content; a link at the end is followed.

        A file that is there stays the same file, with its mode and owner but for what `mode` and
        `owner` say; a new one otherwise gets `new_mode` and `new_owner`.
        """
        here = self.real(path, follow=True)
        entry = self._entry(here)
        if entry is None:
            self._folder_of(here)
            bits = new_mode if mode is None else mode
            self._make(here, stat.S_IFREG, bits, owner or new_owner, size=_size(content))
            self._contents[here] = content
            return True
        if entry.type != "file":
            raise ImgtoolError(f"not a regular file but a {entry.type}", subject=path)
        different = not self._same(here, entry, content)
        if different:
            self._now[here] = dataclasses.replace(entry, size=_size(content))
            self._contents[here] = content
        if mode is not None:
            different |= self.chmod(here, mode)
        if owner is not None:
            different |= self.chown(here, owner)
        return different

    def folder(
        self,
        path: str,
        *,
        mode: int | None = None,
        owner: Owner | None = None,
        new_mode: int = 0o755,
        new_owner: Owner = (0, 0),
    ) -> bool:
        """Have a folder, and those above it; `mode` and `owner` are of the last one."""
        parent = path.rstrip("/").rpartition("/")[0]
        different = False
        if parent and self.kind(parent) is None:
            different = self.folder(parent, new_owner=new_owner)
        here = self.real(path, follow=True)
        entry = self._entry(here) if here != "/" else None
        if here != "/" and entry is None:
            bits = new_mode if mode is None else mode
            self._make(here, stat.S_IFDIR, bits, owner or new_owner)
            return True
        if entry is not None and entry.type != "directory":
            raise ImgtoolError(f"not a folder but a {entry.type}", subject=path)
        if mode is not None:
            different |= self.chmod(here, mode)
        if owner is not None:
            different |= self.chown(here, owner)
        return different

    def symlink(self, path: str, target: str, *, owner: Owner = (0, 0)) -> bool:
        """Have a symbolic link with this target, in the place of what is no folder."""
        here = self.real(path)
        entry = self._entry(here)
        wanted = os.fsencode(target)
        if entry is not None:
            if entry.type == "symlink" and entry.target == wanted:
                return False
            if entry.type == "directory":
                raise ImgtoolError("a folder is where the link is to be", subject=path)
            self.delete(here)
        self._folder_of(here)
        self._make(here, stat.S_IFLNK, 0o777, owner, size=len(wanted), target=wanted)
        return True

    def delete(self, path: str) -> bool:
        """Have nothing at a path; a folder goes with all that is in it, a link alone."""
        try:
            here = self.real(path)
        except NotInGuestError:
            return False
        if here == "/":
            raise ImgtoolError("the root of the guest is not deleted", subject=path)
        if self._entry(here) is None:
            return False
        for made in [one for one in self._now if one == here or one.startswith(here + "/")]:
            del self._now[made]
            self._contents.pop(made, None)
        if self._entry(here) is not None:
            self._removed[here] = None
        return True

    def chmod(self, path: str, mode: int) -> bool:
        """Have this mode, of twelve bits, on what a path leads to; links are followed."""
        here, entry = self._there(path, follow=True)
        if stat.S_IMODE(entry.mode) == mode:
            return False
        self._now[here] = dataclasses.replace(entry, mode=stat.S_IFMT(entry.mode) | mode)
        return True

    def chown(self, path: str, owner: Owner, *, follow: bool = True) -> bool:
        """Have this owner on what a path leads to, or on the link itself."""
        here, entry = self._there(path, follow=follow)
        if (entry.uid, entry.gid) == owner:
            return False
        self._now[here] = dataclasses.replace(entry, uid=owner[0], gid=owner[1])
        return True

    def _there(self, path: str, *, follow: bool) -> tuple[str, Entry]:
        here = self.real(path, follow=follow)
        entry = self._entry(here)
        if entry is None:
            raise NotInGuestError("no such file or directory in the guest", subject=path)
        return here, entry

    # What is different in the end

    def changes(self) -> Changes:
        """What has to be written; nothing where changes came to nothing."""
        found = Changes(dict(self._seen), relabel=self.relabel)
        found.removed = list(self._removed)
        for here in sorted(self._now, key=lambda path: path.split("/")):
            entry = self._now[here]
            assert entry is not None
            before = None
            if not any(above in self._removed for above in _above(here)):
                before = self._seen.get(here)
            if before is None:
                found.made.append((entry, self._contents.get(here)))
                continue
            content = self._contents.get(here)
            if content is not None and not self._was(here, before, content):
                found.rewritten.append((here, content))
            owner = (entry.uid, entry.gid)
            moved = owner != (before.uid, before.gid)
            if moved:
                found.owners.append((here, owner))
            mode = stat.S_IMODE(entry.mode)
            # A new owner takes the set-user-ID and set-group-ID bits away.
            if mode != stat.S_IMODE(before.mode) or (moved and mode & 0o6000):
                found.modes.append((here, mode))
        return found

    def _was(self, here: str, before: Entry, content: Content) -> bool:
        """Whether a file that was changed came to what it had been."""
        if not isinstance(content, bytes) or before.size != len(content):
            return False
        return self._base.read_bytes(os.fsencode(here), len(content)) == content
