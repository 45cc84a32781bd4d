"""A file of the host that is, or is part of, an image: opened with care, and named to QEMU."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import ImageError, ImagePermissionError, RefusedError
from imgtool.image.locking.held import is_held, way_to
from imgtool.image.policy import AllowedDirs
from imgtool.text import printable

Identity = tuple[int, int]  # device and inode


def qemu_name(path: Path) -> str:
    """The name by which QEMU opens this very file."""
    way = way_to(path)
    return str(path.resolve() if way == path else way)


def file_node(path: Path, driver: str, name: str | None = None) -> dict[str, object]:
    """The lowest level of a description for QEMU: this very file and nothing else; `name` is what
    QEMU sees it as, if that is not its own."""
    name = qemu_name(path) if name is None else name
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ImageError(
            "QEMU cannot be given a path that is not UTF-8",
            subject=printable(path),
            hint="rename it, or make a symlink to it with a plain name and folder",
        ) from error
    node: dict[str, object] = {"driver": driver, "filename": name}
    return {**node, "locking": "off"} if is_held(path) else node


def open_host_file(
    path: Path, *, within: AllowedDirs | None = None, noted: Identity | None = None
) -> BinaryIO:
    """Open an image for reading, if it is a file or a block device; raise `ImageError` if not.

    Raises `RefusedError` if what was opened is not `within` the folders that a chain may use, or
    is another file than the one that was `noted`: its name was looked at before.
    """
    file = _open_regular(path)
    try:
        status = os.fstat(file.fileno())
        if noted not in (None, (status.st_dev, status.st_ino)) or not _is_within(file, within):
            raise exchanged_file(path)
    except BaseException:
        file.close()
        raise
    return file


def _is_within(file: BinaryIO, places: AllowedDirs | None) -> bool:
    if places is None:
        return True
    try:
        real = os.readlink(f"/proc/self/fd/{file.fileno()}")  # noqa: PTH115
    except FileNotFoundError:  # no /proc: the look at the name has to do
        return True
    return places.hold(Path(real))


def exchanged_file(path: Path) -> RefusedError:
    """The error for a file that is another one than when its name was looked at."""
    return RefusedError(
        "it was exchanged for another file while it was being opened",
        subject=printable(path),
        hint="repeat the command; where others write to that folder, work on a copy elsewhere",
    )


def _open_regular(path: Path) -> BinaryIO:
    shown = printable(path)
    try:
        # Looked at before it is opened: a fifo would block, a tape would rewind.
        way = way_to(path)
        kind = way.stat().st_mode
        if stat.S_ISDIR(kind):
            raise ImageError("a directory, not an image", subject=shown)
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise ImageError("neither a file nor a block device", subject=shown)
        descriptor = os.open(way, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError("not a path", subject=shown) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise not_allowed(path) from error
        raise ImageError((error.strerror or "cannot be opened").lower(), subject=shown) from error
    return os.fdopen(descriptor, "rb")


def not_allowed(path: Path) -> ImagePermissionError:
    """The error for an image that this user may not read."""
    return ImagePermissionError(
        "permission denied", subject=printable(path), hint="run imgtool as a user who may read it"
    )


def node_driver(path: Path) -> str:
    """QEMU's driver for the file at `path` below any format: file or host_device."""
    return "host_device" if way_to(path).is_block_device() else "file"
