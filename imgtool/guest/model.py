"""What a guest is made of, as plain frozen data.

Guest paths are `bytes`: a name in a Linux guest is any bytes but NUL and `/`. Sizes and offsets are
bytes, times are nanoseconds since 1970 UTC.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

from imgtool.formats.application import Application
from imgtool.formats.xattrs import Xattrs

FILE_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a guest: what `lstat` says of it, its target, and its checksum if asked for.

    `mode` is the whole `st_mode`; `blocks` counts 512-byte units really allocated. `extent_digest`
    stands for where a file's data are on the disks, where that was asked for
    (`Guest.walk_unshared`). `xattrs` are the extended attributes, if asked for and readable.
    """

    path: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    blocks: int = 0
    nlink: int = 1
    inode: int = 0
    device: int = 0
    rdev: int = 0
    target: bytes | None = None
    checksum: str | None = None
    extent_digest: str | None = None
    xattrs: Xattrs | None = None

    @property
    def type(self) -> str:
        """`file directory symlink char block fifo socket`."""
        return FILE_TYPES.get(stat.S_IFMT(self.mode), "file")

    @property
    def name(self) -> bytes:
        """The last component of the path."""
        return self.path.rsplit(b"/", 1)[-1]


@dataclass(frozen=True, slots=True)
class DiskExtent:
    """`length` bytes of a file, from `offset` on, which lie on a disk of the guest (0 for the
    first one) from `position` on."""

    offset: int
    length: int
    disk: int
    position: int


@dataclass(frozen=True)
class Device:
    """A row of `filesystems`: a filesystem, or with `--all` something that it stands on.

    `kind` is filesystem, partition, lv, vg, pv or device; `size` is the block device's, in bytes;
    `parents` are the devices that it stands on.
    """

    kind: str
    device: str
    type: str | None = None
    label: str | None = None
    uuid: str | None = None
    size: int | None = None
    mountpoint: str | None = None
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpaceUsage:
    """A row of `df`: the numbers of statvfs in bytes, or `error` where it cannot be read.

    `available` is what an unprivileged user can still write. `use_percent` is rounded up, as df(1)
    does it.
    """

    image: str
    device: str
    mountpoint: str | None
    type: str | None
    size: int | None = None
    used: int | None = None
    available: int | None = None
    inodes: int | None = None
    inodes_used: int | None = None
    error: str | None = None

    @property
    def use_percent(self) -> int | None:
        """Used space in percent of what users can use, rounded up; None where nothing is known."""
        if self.used is None or self.available is None:
            return None
        total = self.used + self.available
        return -(-100 * self.used // total) if total else 0


@dataclass(frozen=True)
class Mount:
    """One line of a layout: mount `source` at `mountpoint` with `options` (comma-separated).

    `source` is a device, or libguestfs's name of a btrfs subvolume (`btrfsvol:/dev/sda2/@home`).
    """

    source: str
    mountpoint: str
    options: str = ""
    fstype: str | None = None


@dataclass(frozen=True)
class Unshown:
    """A mount point whose filesystem is not shown, and why.

    `needed` if the guest mounts it by itself, so that what lies in the folder is hidden there;
    `optional` if the guest starts without it too (`nofail`).
    """

    mountpoint: str
    why: str
    needed: bool = True
    optional: bool = False

    @property
    def is_said(self) -> bool:
        """Whether it is worth a warning to who has not asked for it."""
        return self.needed and not self.optional


@dataclass(frozen=True)
class Layout:
    """Which filesystem of the guest is mounted where, parents before children.

    `root` is the device of the operating system's root filesystem, or None for a data disk or a
    layout given by the user. `os_type` is linux, windows or None. `problems` are lines for the
    user: fstab entries that name nothing in the guest, and the like; `unshown` the mount points
    where something belongs that is not there.
    """

    mounts: tuple[Mount, ...]
    root: str | None = None
    os_type: str | None = None
    problems: tuple[str, ...] = ()
    unshown: tuple[Unshown, ...] = ()

    @property
    def missed(self) -> dict[str, str]:
        """The mount points where the guest mounts what is not shown, and why it is not."""
        return {one.mountpoint: one.why for one in self.unshown if one.needed}

    @property
    def optional(self) -> frozenset[str]:
        """Those of `missed` without which the guest starts too."""
        return frozenset(one.mountpoint for one in self.unshown if one.optional)


@dataclass(frozen=True)
class OperatingSystem:
    """What `inspect` says of one operating system in the guest."""

    root: str
    type: str
    distribution: str | None
    version: str | None
    product_name: str | None
    architecture: str | None
    hostname: str | None
    package_format: str | None
    package_management: str | None = None
    mountpoints: dict[str, str] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    applications: tuple[Application, ...] | None = None
