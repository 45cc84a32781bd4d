"""Which mount of imgtool's a process serves: it, or one that it was started by, names the folder of
a mount's journal.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path

from imgtool.host.mountinfo import mounts
from imgtool.host.process import command_of, parent_of

JOURNAL = "journal.json"
_DEEPEST = 4  # processes that started one another
_LONGEST = 16 << 20


def served_mount(pid: int) -> str | None:
    """The directory of imgtool's mount that a process is a part of; None for any other process.

    What it says is for a message alone: another user can have a process that looks like one.
    """
    for _ in range(_DEEPEST):
        for word in command_of(pid):
            for part in (word, word.partition("=")[2]):
                if part.startswith("/") and (found := _mountpoint(Path(part))) is not None:
                    return found
        above = parent_of(pid)
        if above is None or above <= 1:
            return None
        pid = above
    return None


def _mountpoint(path: Path) -> str | None:
    """The mount point in the journal of a folder, or of the folder that a file is in."""
    if "imgtool" not in str(path):
        return None
    for folder in (path, path.parent):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(_read(folder / JOURNAL))["mountpoint"]
            # Anybody can write one; where nothing is mounted there is nothing to unmount.
            there = isinstance(found, str) and any(one.target == found for one in mounts())
            return found if there else None
    return None


def _read(path: Path) -> bytes:
    """A regular file of this user's or root's. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{path} is somebody else's")
        return file.read(_LONGEST)
