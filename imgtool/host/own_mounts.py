"""Which mount of imgtool's a process serves: it, or one that it was started by, names the folder of
a mount's journal.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

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
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with (folder / JOURNAL).open() as file:
                found = json.loads(file.read(_LONGEST))["mountpoint"]
            return found if isinstance(found, str) else None
    return None
