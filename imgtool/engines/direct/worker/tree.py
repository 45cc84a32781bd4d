"""One tree of names over mounted filesystems: paths, symbolic links, mount points, walks.

What the kernel does for a process whose root directory is the guest's: links are followed inside
the guest, `..` stops at its root, mount points hide what is below them.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Filesystem, Node, PathNotFound, ReadFailed

MOST_LINKS = 40
MOST_DEPTH = 2000
_LONGEST_PATH = 1 << 20
# Each name at the end of a long path repeats it: a small image could fill the host's disk.
_LONGEST_WALKED = 16 << 10
_CACHED_DIRECTORIES = 64
_CACHED_NAMES = 20_000


class InodeRef(NamedTuple):
    """An object: the number of its filesystem in the tree, and its inode there."""

    mount: int
    inode: int


class Found(NamedTuple):
    """A name in the tree: its path, where it is, what lstat says, the target if it is a link."""

    path: bytes
    place: InodeRef
    node: Node
    target: bytes | None


def _upper(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape").upper()


class Tree:
    """Filesystems by the order in which they were mounted; the first one is the root."""

    def __init__(self, root: Filesystem) -> None:
        self._filesystems: list[Filesystem | str] = [root]
        self._over: dict[InodeRef, int] = {}  # the directory that a mount hides
        self._mountpoints: dict[int, bytes] = {0: b"/"}
        # The names of directories, and why there may be more.
        self._names: OrderedDict[InodeRef, tuple[dict[bytes, int], ReadFailed | None]] = (
            OrderedDict()
        )

    def mount(self, mountpoint: bytes, filesystem: Filesystem | str) -> None:
        """Mount on an existing directory. A string mounts a refusal: its reason, once touched.

        Raises `PathNotFound` where there is no such directory, `Unsupported` where links lead
        there.
        """
        path, place = self.resolve(mountpoint)
        if path != mountpoint:
            raise Unsupported(f"the mount point {mountpoint!r} leads through a symbolic link")
        if not stat.S_ISDIR(self.filesystem(place).stat(place.inode).mode):
            raise PathNotFound(mountpoint)
        number = len(self._filesystems)
        self._filesystems.append(filesystem)
        self._over[place] = number
        self._mountpoints[number] = path

    def filesystem(self, place: InodeRef) -> Filesystem:
        """The filesystem that a place is in."""
        found = self._filesystems[place.mount]
        if isinstance(found, str):
            raise Unsupported(found)
        return found

    def top(self) -> InodeRef:
        """The root directory."""
        return self._cross_mount(InodeRef(0, self.filesystem(InodeRef(0, 0)).root))

    def _cross_mount(self, place: InodeRef) -> InodeRef:
        """The root of what is mounted on a place, or the place itself."""
        while (number := self._over.get(place)) is not None:
            place = InodeRef(number, self.filesystem(InodeRef(number, 0)).root)
        return place

    def _lookup(self, place: InodeRef, name: bytes) -> InodeRef:
        filesystem = self.filesystem(place)
        kept = self._names.get(place)
        if kept is None:
            kept = self._read_names(filesystem, place)
            if kept is None:
                return self._search(filesystem, place, name)
            self._names[place] = kept
            if len(self._names) > _CACHED_DIRECTORIES:
                self._names.popitem(last=False)
        else:
            self._names.move_to_end(place)
        names, damage = kept
        known = names.get(filesystem.fold(name))
        if known is None and filesystem.ignores_case:  # FAT has aliases that are not listed
            return self._search(filesystem, place, name)
        if known is None and damage is not None:
            raise damage
        if known is None:
            raise PathNotFound(name)
        return InodeRef(place.mount, known)

    @staticmethod
    def _read_names(
        filesystem: Filesystem, place: InodeRef
    ) -> tuple[dict[bytes, int], ReadFailed | None] | None:
        """The names of a directory as they are compared; None if they are too many to be kept."""
        names: dict[bytes, int] = {}
        try:
            for found, inode in filesystem.names(place.inode):
                names.setdefault(filesystem.fold(found), inode)
                if len(names) > _CACHED_NAMES:
                    return None
        except ReadFailed as error:
            return names, error
        return names, None

    @staticmethod
    def _search(filesystem: Filesystem, place: InodeRef, name: bytes) -> InodeRef:
        try:
            return InodeRef(place.mount, filesystem.lookup(place.inode, name))
        except PathNotFound as error:
            raise PathNotFound(name) from error

    def _node(self, place: InodeRef) -> Node:
        return self.filesystem(place).stat(place.inode)

    def _steps(self, path: bytes, follow_last: bool) -> tuple[bytes, InodeRef]:
        """The real path (of the last name's directory, if that is not followed) and the place."""
        if len(path) > _LONGEST_PATH:
            raise PathNotFound(path[:80])
        trail: list[tuple[bytes, InodeRef]] = [(b"", self.top())]
        waiting = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
        links = 0
        while waiting:
            part = waiting.pop()
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            if part == b".":
                continue
            here = trail[-1][1]
            if not stat.S_ISDIR(self._node(here).mode):
                raise PathNotFound(path)
            child = self._cross_mount(self._lookup(here, part))
            if (waiting or follow_last) and stat.S_ISLNK(self._node(child).mode):
                links += 1
                if links > MOST_LINKS:
                    raise ReadFailed("too many levels of symbolic links")
                target = self.filesystem(child).target(child.inode)
                if not target:
                    raise PathNotFound(path)
                if target.startswith(b"/"):
                    del trail[1:]
                parts = [part for part in target.split(b"/") if part not in (b"", b".")]
                if len(waiting) + len(parts) > _LONGEST_PATH:
                    raise PathNotFound(path[:80])
                waiting.extend(reversed(parts))
                if target.endswith(b"/") and not waiting:
                    waiting.append(b".")
                continue
            trail.append((part, child))
        # A trailing slash asks for a directory.
        if path.endswith(b"/") and not stat.S_ISDIR(self._node(trail[-1][1]).mode):
            raise PathNotFound(path)
        return b"/" + b"/".join(name for name, _ in trail[1:]), trail[-1][1]

    def resolve(self, path: bytes) -> tuple[bytes, InodeRef]:
        """The path without symbolic links, and what it names; `PathNotFound`, `ReadFailed`."""
        return self._steps(path, follow_last=True)

    def spelling(self, path: bytes) -> bytes:
        """The path in the case in which it is written on disk, as far as it exists."""
        parts = [part for part in path.split(b"/") if part]
        done = b""
        for number, part in enumerate(parts):
            try:
                _, place = self.resolve(done or b"/")
                names = [name for name, _ in self.filesystem(place).read_names(place.inode)[0]]
            except (PathNotFound, ReadFailed):
                return b"/".join((done, *parts[number:]))
            if part not in names:
                wanted = _upper(part)
                part = next((name for name in sorted(names) if _upper(name) == wanted), part)
            done += b"/" + part
        return done or b"/"

    def lstat(self, path: bytes) -> Found:
        """The object itself, under the path as given; a trailing slash follows a link."""
        _, place = self._steps(path, follow_last=path.endswith(b"/"))
        return self._found(path, place)

    def _found(self, path: bytes, place: InodeRef) -> Found:
        node = self._node(place)
        target = None
        if stat.S_ISLNK(node.mode):
            target = self.filesystem(place).target(place.inode)
        return Found(path, place, node, target)

    def children(
        self, path: bytes, place: InodeRef, problem: Callable[[bytes, str], None]
    ) -> Iterator[Found]:
        """What is in a directory, sorted by name; what cannot be read goes to `problem`, the
        directory itself, if it is damaged, before what could be read of it.
        """
        prefix = path.rstrip(b"/") + b"/"
        listed, damage = self.filesystem(place).read_names(place.inode)
        if damage is not None:
            problem(path, str(damage))
        listed.sort()
        for name, inode in listed:
            try:
                yield self._found(prefix + name, self._cross_mount(InodeRef(place.mount, inode)))
            except ReadFailed as error:
                problem(prefix + name, str(error))

    def walk(
        self, path: bytes, place: InodeRef, problem: Callable[[bytes, str], None]
    ) -> Iterator[Found]:
        """Everything below a directory: parents first, siblings sorted by name as bytes."""
        above = {place}
        # A directory with two names, and each below it too, would make a walk as good as endless.
        seen: dict[int, set[int]] = {}
        stack = [(place, self.children(path, place, problem))]
        while stack:
            child = next(stack[-1][1], None)
            if child is None:
                above.discard(stack.pop()[0])
                continue
            yield child
            if not stat.S_ISDIR(child.node.mode):
                continue
            if child.place in above or len(stack) >= MOST_DEPTH:
                problem(child.path, "a directory that contains itself, or nested too deeply")
                continue
            if len(child.path) > _LONGEST_WALKED:
                raise Unsupported(f"a path of more than {_LONGEST_WALKED} bytes")
            entered = seen.setdefault(child.place.mount, set())
            if child.place.inode in entered:
                raise Unsupported("a directory that has two names")
            entered.add(child.place.inode)
            above.add(child.place)
            stack.append((child.place, self.children(child.path, child.place, problem)))

    def touches_refused(self, path: bytes) -> str | None:
        """The reason if something below a real path is mounted that may not be read here."""
        prefix = path.rstrip(b"/") + b"/"
        for number, reason in enumerate(self._filesystems):
            if isinstance(reason, str) and (self._mountpoints[number] + b"/").startswith(prefix):
                return reason
        return None
