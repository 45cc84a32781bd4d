"""Loop devices, by the kernel's own calls (linux/loop.h).

`losetup` chooses a device and attaches it in one go: killed in between, nobody could tell whose
the device is. Here its number is known, and written down, before it is attached, and it carries a
mark of its own, by which it is recognised whatever else has the same number or the same image.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from imgtool.errors import HostError, RefusedError
from imgtool.image.locking.host_file import exchanged_file
from imgtool.mount.kernel import PATIENCE, wait_until

_CLR_FD, _GET_STATUS64, _SET_DIRECT_IO, _CONFIGURE = 0x4C01, 0x4C05, 0x4C08, 0x4C0A
_GET_FREE = 0x4C82
_READ_ONLY, _AUTOCLEAR = 1, 4
# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encryption, its key's size,
# flags; file name, encryption's name and key; init.
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
_CONFIG = struct.Struct("=2I")
_TRIES = 64


def _node(number: int) -> Path:
    return Path(f"/dev/loop{number}")


def free_number() -> int:
    """The number of a loop device that nobody uses at this moment."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"the kernel offers no loop devices: {error.strerror}",
            subject="/dev/loop-control",
            hint="modprobe loop, or --via fuse",
        ) from error
    try:
        number = fcntl.ioctl(control, _GET_FREE)
    finally:
        os.close(control)
    node = _node(number)
    if not node.exists():  # where no udev makes it
        with contextlib.suppress(FileExistsError):
            os.mknod(node, 0o060660, os.makedev(7, number))
    return int(number)


def mark_of(number: int) -> str | None:
    """The mark, or file name, of what is attached to a loop device; None if nothing is."""
    try:
        descriptor = os.open(_node(number), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = fcntl.ioctl(descriptor, _GET_STATUS64, bytes(_INFO.size))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    name: bytes = _INFO.unpack(raw)[9]
    return name.rstrip(b"\0").decode("utf-8", "replace")


def attach(
    number: int,
    path: str | Path,
    *,
    offset: int,
    size: int,
    writable: bool,
    mark: str,
    noted: Sequence[int] | None = None,
) -> int | None:
    """Attach a stretch of a file to a loop device that is free; None if it no longer is.

    Raises `RefusedError` where `noted` is not the file's device and inode.

    The device detaches itself when nothing uses it any more: the returned descriptor keeps it
    until something else does. `size` 0 is the rest of the file.
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    device = os.open(_node(number), access | os.O_CLOEXEC)
    try:
        backing = os.open(path, access | os.O_CLOEXEC)
        try:
            status = os.fstat(backing)
            if noted is not None and (status.st_dev, status.st_ino) != tuple(noted):
                raise exchanged_file(Path(path))
            flags = _AUTOCLEAR | (0 if writable else _READ_ONLY)
            info = _INFO.pack(
                0, 0, 0, offset, size, 0, 0, 0, flags, mark.encode()[:63], b"", b"", 0, 0
            )
            config = _CONFIG.pack(backing, 0) + info + bytes(64)
            fcntl.ioctl(device, _CONFIGURE, config)
        finally:
            os.close(backing)
    except RefusedError:
        os.close(device)
        raise
    except OSError as error:
        os.close(device)
        if error.errno == errno.EBUSY:
            return None
        raise HostError(
            f"the loop device cannot be attached: {error.strerror}", subject=path
        ) from error
    return device


def pass_by_cache(device: int) -> None:
    """Let an attached device, given by a descriptor, read its file without the file's page cache,
    where the kernel can."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(device, _SET_DIRECT_IO, 1)


def detach(number: int, mark: str, limit: float = PATIENCE) -> None:
    """Detach a loop device if it is the marked one, and wait until it is free."""

    def ours() -> bool:
        return mark_of(number) == mark

    if not ours():
        return
    descriptor = os.open(_node(number), os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _CLR_FD)
    finally:
        os.close(descriptor)
    wait_until(lambda: not ours(), f"/dev/loop{number} is still attached", limit)
