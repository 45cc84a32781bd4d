"""What a filesystem reader is: the interface between the worker and one family of filesystems.

A reader runs in the sandbox. It opens a filesystem only after it has read the superblock itself and
found every feature in its allow-list; all else raises `Unsupported`, with the reason, before a
byte of an answer. What the kernel would say of the same filesystem is what counts as right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.formats.xattrs import Xattrs

MOST_XATTRS = 4 << 20  # bytes of the values of one file's extended attributes


class ReadFailed(Exception):
    """This one thing cannot be read, by the appliance either: damage. The message is the reason,
    `path` the file where it is not the one that was asked for.
    """

    def __init__(self, reason: str, path: bytes | None = None) -> None:
        super().__init__(reason)
        self.path = path


class NeedsReplay(Unsupported):
    """The filesystem can be read once its journal has been replayed, and not before."""


class PathNotFound(Exception):
    """A path leads nowhere, or a directory has no entry of this name."""


class Source(Protocol):
    """The bytes of a volume: a disk, a partition or a logical volume."""

    @property
    def size(self) -> int:
        """The size in bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; `ReadFailed` past the end or where QEMU cannot."""


class Node(NamedTuple):
    """What `lstat` says: `mode` is the whole st_mode, `blocks` counts 512-byte units, times are
    nanoseconds since 1970, `rdev` is Linux's device number of a device node, as makedev(3) has it.
    """

    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    blocks: int
    nlink: int
    rdev: int


class Usage(NamedTuple):
    """What statvfs(3) says of a filesystem mounted read-only, in bytes and inodes."""

    size: int
    used: int
    available: int
    inodes: int
    inodes_used: int


class Filesystem(ABC):
    """One open filesystem. Objects in it are known by the inode number that `names` gives."""

    type: str  # as libblkid names it: ext4, xfs, vfat, ...
    root: int  # the root directory
    ignores_case = False
    can_be_replayed = False  # whether `open` may raise `NeedsReplay`

    @classmethod
    @abstractmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> Filesystem:
        """Check the superblock and open; `Unsupported` for whatever is not on the allow-list.

        `unreplayed`: as it is, without what is in its journal, where it has one.
        """

    @abstractmethod
    def stat(self, inode: int) -> Node:
        """`lstat`; `ReadFailed` for a damaged inode, `Unsupported` for an unsupported one."""

    @abstractmethod
    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """Name and inode of everything in a directory, in any order, without `.` and `..`.

        Only what the kernel lists: nothing deleted, no reader's own virtual entries. Where a part
        of the directory is damaged, `ReadFailed` comes after all that could be read.
        """

    def read_names(self, inode: int) -> tuple[list[tuple[bytes, int]], ReadFailed | None]:
        """What can be read of `names`, and why that is not all of it."""
        found: list[tuple[bytes, int]] = []
        try:
            found.extend(self.names(inode))
        except ReadFailed as error:
            return found, error
        return found, None

    @abstractmethod
    def target(self, inode: int) -> bytes:
        """The target of a symbolic link."""

    def xattrs(self, inode: int) -> Xattrs:
        """The extended attributes of whatever it is, as the kernel gives them to root."""
        return ()

    def oversized_xattrs(self, inode: int) -> int:
        """How many attributes `xattrs` leaves out: they are longer than the kernel gives any."""
        return 0

    @abstractmethod
    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file, fewer past its end; holes are zeros."""

    @abstractmethod
    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        """Where a regular file has data: (offset, length) in bytes, ascending, within its size.

        Holes and unwritten extents are left out.
        """

    def runs(self, inode: int) -> Sequence[tuple[int, int, int]] | None:
        """Where a regular file's data are: offset in the file, offset on the volume, and length in
        bytes, ascending; all else of it is zeros. None where the reader cannot tell.
        """
        return None

    @abstractmethod
    def usage(self) -> Usage:
        """The numbers of statvfs as the kernel computes them; `Unsupported` if not certain."""

    def lookup(self, inode: int, name: bytes) -> int:
        """The inode of one name in a directory; `PathNotFound` if it is certainly not there."""
        wanted = self.fold(name)
        for found, child in self.names(inode):
            if self.fold(found) == wanted:
                return child
        raise PathNotFound

    def fold(self, name: bytes) -> bytes:
        """The name as it is compared."""
        if not self.ignores_case:
            return name
        return name.decode("utf-8", "surrogateescape").upper().encode("utf-8", "surrogateescape")
