"""OverlayReader at a guest as it will be: its files, and over them what is to be changed.

Links are followed inside the guest, component by component: an absolute target begins at the
guest's root, and `..` never leads above it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from imgtool.errors import ImgtoolError, NotInGuestError
from imgtool.guest.changes import Content
from imgtool.guest.model import Entry

# As Linux: more links than these on the way are a loop.
_MOST_LINKS = 40
# The largest file that is read into memory to be changed.
LARGEST = 16 << 20
_BLOCK = 1 << 20


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


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def above(path: str) -> Iterator[str]:
    """The path and each folder above it but the root."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def size_of(content: Content) -> int:
    """Its bytes."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _bytes(content: Content) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


class OverlayReader:
    """The files of a guest with the changes so far. Paths are absolute; links are followed in all
    their folders, and in the last component where a method says so.
    """

    def __init__(self, base: Files) -> None:
        self._base = base
        self._seen: dict[str, Entry | None] = {}
        self._now: dict[str, Entry | None] = {}
        self._contents: dict[str, Content] = {}
        self._removed: dict[str, None] = {}

    def _entry(self, path: str) -> Entry | None:
        if path in self._now:
            return self._now[path]
        if self._is_removed(path):
            return None
        return self._before(path)

    def _before(self, path: str) -> Entry | None:
        """What the guest has at a path without links."""
        if path not in self._seen:
            try:
                self._seen[path] = self._base.lstat(os.fsencode(path))
            except NotInGuestError:
                self._seen[path] = None
        return self._seen[path]

    def _is_removed(self, path: str) -> bool:
        """Whether what the guest has at a path goes, by itself or with a folder."""
        return any(one in self._removed for one in above(path))

    def real(self, path: str, *, follow: bool = False) -> str:
        """The path without links; what is at its end may be missing, its folder may not.

        With `follow` a link at the end is followed too. Raises `NotInGuestError` for a folder that
        is not there, `ImgtoolError` for links in a loop.
        """
        return self._resolve(path, follow=follow)[0]

    def _resolve(self, path: str, *, follow: bool) -> tuple[str, set[int]]:
        """`real`, and which users but root made links that were followed on the way."""
        left, done, links = _parts(path)[::-1], "", 0
        makers: set[int] = set()
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
                return here, makers
            if entry.type == "symlink" and (left or follow):
                links += 1
                if links > _MOST_LINKS:
                    raise ImgtoolError("too many symbolic links", subject=path)
                if here not in self._now and entry.uid != 0:  # not one that a step made
                    makers.add(entry.uid)
                target = os.fsdecode(entry.target or b"")
                if target.startswith("/"):
                    done = ""
                left += _parts(target)[::-1]
                continue
            if left and entry.type != "directory":
                raise NotInGuestError("not a folder of the guest", subject=here)
            done = here
        return done or "/", makers

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
        before = self._seen.get(folder)
        gone = self._is_removed(folder)
        if before is not None and before.type == "directory" and not gone:
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

    def _holds(self, here: str, content: Content) -> bool:
        """Whether a regular file has this content now."""
        entry = self._entry(here)
        if entry is None or entry.size != size_of(content):
            return False
        held = self._contents.get(here)
        if held is not None:
            return _bytes(held) == _bytes(content)
        return self._held(here, content)

    def _held(self, here: str, content: Content) -> bool:
        """Whether a regular file of the guest, of the right size, has this content."""
        if isinstance(content, bytes):
            return self._base.read_bytes(os.fsencode(here), len(content)) == content
        with content.open("rb") as one, self._base.open(os.fsencode(here)) as other:
            while block := one.read(_BLOCK):
                if other.read(len(block)) != block:
                    return False
        return True
