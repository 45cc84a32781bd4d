"""Temporary files and folders: where large ones go, and folders that are known as imgtool's own.

These go with the block that made them; what an imgtool that was killed has left `imgtool cleanup`
finds. Each is locked for as long as it is in use: a lock that is free tells of one that is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_ON_DISK = Path("/var/tmp")
_PREFIX = "imgtool-"
_LONGEST_BEFORE_SOCKET = 64
_SOCKETS = "sockets"  # names a folder that another library made for what is in this one
_LONGEST_NAME = 4096
_NEW = 10.0  # seconds in which a folder may not be locked yet


def large_files() -> str | None:
    """The folder for temporary files that may become large; None is the usual one.

    On many hosts /tmp is memory, and /var/tmp never is. A TMPDIR is the user's own choice.
    """
    if os.environ.get("TMPDIR") or not os.access(_ON_DISK, os.W_OK | os.X_OK):
        return None
    return str(_ON_DISK)


def for_sockets() -> str | None:
    """Where a scratch folder is made that gets a socket, of which the whole name may have 107
    bytes: None where temporary ones have a name that is short enough."""
    return None if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_BEFORE_SOCKET else "/tmp"


def is_in_use(folder: int) -> None:
    """Say of a folder, by its descriptor, that it is in use for as long as that is open."""
    with contextlib.suppress(OSError):  # a file system without locks, where none is ever removed
        fcntl.flock(folder, fcntl.LOCK_EX)


def is_left(folder: int) -> bool:
    """Whether nobody uses a folder any more, given by its descriptor, and this user may remove it.

    Root may of every user. From then on it is locked.
    """
    status = os.fstat(folder)
    if os.geteuid() not in (0, status.st_uid) or time.time() - status.st_ctime < _NEW:
        return False
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def scratch_folder(purpose: str, inside: str | None = None) -> Iterator[Path]:
    """A folder for its owner's eyes alone, `inside` another or where temporary ones are; gone with
    the block."""
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{purpose}-", dir=inside) as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            is_in_use(descriptor)
            yield Path(name)
        finally:
            os.close(descriptor)


def goes_with(folder: Path, other: str) -> None:
    """Note in a scratch folder that another one goes with it."""
    (folder / _SOCKETS).write_text(other)


def remove_left_behind(*also: str) -> list[Path]:
    """Remove the scratch folders that nobody uses any more, `also` inside other folders than the
    usual; those that are gone. Of other users only root removes them.
    """
    gone = []
    for top in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", *also)):
        for folder in sorted(Path(top).glob(f"{_PREFIX}*-*")):
            with contextlib.suppress(OSError):  # it went meanwhile, or may not be looked into
                gone += _remove_if_left(folder, also)
    return gone


def _remove_if_left(folder: Path, also: Sequence[str]) -> list[Path]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _remove(folder, also) if is_left(descriptor) else []
    finally:
        os.close(descriptor)


def _remove(folder: Path, also: Sequence[str]) -> list[Path]:
    owner = folder.lstat().st_uid
    others = []
    with contextlib.suppress(OSError, ValueError):
        note = folder / _SOCKETS
        other = Path(_note(note))
        status = other.lstat()
        ours = other.name.startswith("libguestfs") and status.st_uid == owner
        if owner != os.geteuid():
            # The folders on the way to it can be exchanged by another user, but for these.
            tops = {Path(top) for top in (tempfile.gettempdir(), "/tmp", "/var/tmp", *also)}
            ours = ours and other.parent in tops
        if ours and stat.S_ISDIR(status.st_mode):
            others.append(other)
    for path in (*others, folder):  # the note goes last
        shutil.rmtree(path)
    return [*others, folder]


def _note(path: Path) -> str:
    """What a file says that another user may have written; `OSError` where it is none."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(path)
        return os.fsdecode(os.pread(descriptor, _LONGEST_NAME, 0))
    finally:
        os.close(descriptor)
