"""Who uses an image through the kernel: loop devices over its files, and the mounts of a device.

These take none of QEMU's locks. A loop device is told by what the kernel says of its backing file
(linux/loop.h); to an ordinary user it says no more than a name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.host.mountinfo import MountInfo, mounts
from imgtool.image.locking.held import way_to

_GET_STATUS64 = 0x4C05
_LOOP_INFO_SIZE = 232  # struct loop_info64
_LOOP_INFO_START = struct.Struct("=3Q")  # device, inode, rdevice
_BLOCK = Path("/sys/block")
_DEEPEST = 16  # devices on one another: partitions, device-mapper, RAIDs


@dataclass(frozen=True)
class Attached:
    """A block device of this host that is the image, or stands on it.

    `program` is what it is, with the directories where it is mounted. `writes`: whoever uses it
    can write to the image.
    """

    program: str
    writes: bool


def _same_file(node: Path, status: os.stat_result) -> bool | None:
    """Whether a loop device stands on this file or device; None if the kernel does not tell."""
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = fcntl.ioctl(descriptor, _GET_STATUS64, bytes(_LOOP_INFO_SIZE))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    device, inode, rdevice = _LOOP_INFO_START.unpack_from(raw)
    if stat.S_ISBLK(status.st_mode):
        return bool(rdevice == status.st_rdev)
    return (device, inode) == (status.st_dev, status.st_ino)


def _same_name(folder: Path, status: os.stat_result) -> bool:
    name = (folder / "loop/backing_file").read_bytes().removesuffix(b"\n")
    found = os.stat(name)  # noqa: PTH116
    if stat.S_ISBLK(status.st_mode):
        return stat.S_ISBLK(found.st_mode) and found.st_rdev == status.st_rdev
    return os.path.samestat(found, status)


def _loops(status: os.stat_result) -> Iterator[Path]:
    """The folders in sysfs of the loop devices over this file or device."""
    for folder in sorted(_BLOCK.glob("loop*")):
        if not (folder / "loop/backing_file").exists():  # nothing is attached
            continue
        same = _same_file(Path("/dev", folder.name), status)
        with contextlib.suppress(OSError):  # detached since, or its file has another name by now
            if same or (same is None and _same_name(folder, status)):
                yield folder


def looped_inodes() -> set[int]:
    """The inode numbers of the files that loop devices of this host stand on.

    To choose, of thousands of files, those that `attached_to` is worth asking about.
    """
    found = set()
    for file in _BLOCK.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached since, or its file has another name by now
            found.add(os.stat(file.read_bytes().removesuffix(b"\n")).st_ino)  # noqa: PTH116
    return found


def _number(folder: Path) -> str:
    return (folder / "dev").read_text().strip()


def _and_above(folder: Path, left: int = _DEEPEST) -> Iterator[Path]:
    """A device's folder in sysfs, and those of its partitions and of what stands on either."""
    yield folder
    if left:
        parts = [part.parent for part in folder.glob("*/partition")]
        for above in (*parts, *folder.glob("holders/*")):
            yield from _and_above(above.resolve(), left - 1)


def _mounts_of(folder: Path, rows: Sequence[MountInfo]) -> list[MountInfo]:
    """The mounts of a device and of what stands on it."""
    numbers, nodes = set(), set()
    for device in _and_above(folder):
        with contextlib.suppress(OSError):  # gone since it was listed
            numbers.add(_number(device))
            nodes.add(f"/dev/{device.name}")
            nodes.add("/dev/mapper/" + (device / "dm/name").read_text().strip())
    # By the name too, since a btrfs has a number of its own.
    return [row for row in rows if row.device in numbers or row.source in nodes]


def _describe(what: str, mounted: Sequence[MountInfo]) -> str:
    places = list(dict.fromkeys(row.target for row in mounted))
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return f"{what}, mounted at {', '.join(places[:3])}{more}" if places else what


def attached_to(path: Path) -> list[Attached]:
    """The loop devices over the file or device at `path`, and if it is a device that is mounted,
    itself or what stands on it, that."""
    status = way_to(path).stat()
    rows: list[MountInfo] | None = None
    found = []
    for folder in _loops(status):
        rows = mounts() if rows is None else rows
        with contextlib.suppress(OSError):
            read_only = (folder / "ro").read_text().strip() == "1"
            text = _describe(f"the loop device /dev/{folder.name}", _mounts_of(folder, rows))
            found.append(Attached(text, writes=not read_only))
    if stat.S_ISBLK(status.st_mode):
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        mounted = _mounts_of(Path("/sys/dev/block", number).resolve(), mounts())
        if mounted:
            writes = any(not row.read_only for row in mounted)
            found.append(Attached(_describe("the host", mounted), writes))
    return found
