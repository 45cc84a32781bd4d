"""What `rm` removes from a guest, planned before anything is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence

from imgtool.errors import NotInGuestError, RefusedError, UsageError
from imgtool.guest.changes import Changes
from imgtool.guest.globbing import expand
from imgtool.guest.guest import Guest
from imgtool.text import printable


def plan_removal(
    guest: Guest, typed: Sequence[str], *, recursive: bool, missing_ok: bool
) -> Changes:
    """The changes that remove what was named; a link goes itself, not what it leads to.

    Raises `NotInGuestError` for what is not there, unless `missing_ok`, `RefusedError` for a
    directory without `recursive` and for what another filesystem is mounted on, `UsageError` for
    the root.
    """
    changes = Changes(seen={})
    _ = guest.layout  # it tells what is not shown
    missing = (NotInGuestError,) if missing_ok else ()
    for one in typed:
        if ".." in one.replace("\\", "/").split("/") or one.rstrip("/").endswith("/."):
            raise UsageError("rm takes no '.' and '..'", subject=one)
        paths: list[str] = []
        _refuse_unshown(guest, guest.path(one))
        with contextlib.suppress(*missing):
            paths = expand(guest, one)
        for path in paths:
            _refuse_unshown(guest, guest.path(path))
            with contextlib.suppress(*missing):
                _add(guest, changes, path, recursive)
    # What is in a directory that goes needs no mention of its own.
    gone = set(changes.removed)
    changes.removed = [path for path in changes.removed if not _is_below(path, gone)]
    changes.seen = {path: changes.seen[path] for path in changes.removed}
    return changes


def count_entries(guest: Guest, changes: Changes, on_problem: Callable[[bytes, str], None]) -> int:
    """How many files and directories the changes remove."""
    count = 0
    for path in changes.removed:
        entry = changes.seen[path]
        count += 1
        if entry is not None and entry.type == "directory":
            count += sum(1 for _ in guest.walk(os.fsencode(path), on_problem=on_problem))
    return count


def _add(guest: Guest, changes: Changes, typed: str, recursive: bool) -> None:
    path = guest.path(typed)
    if path == b"/":
        raise UsageError("the root of a guest is not removed", subject=typed)
    # The directory without links; what is in it may be one.
    directory, _, name = guest.lstat(path).path.rpartition(b"/")
    real = guest.resolve(directory or b"/").rstrip(b"/") + b"/" + name
    entry = guest.lstat(real)
    if entry.type == "directory" and not recursive:
        raise RefusedError("it is a directory", subject=printable(real), hint="-r removes it too")
    below = real + b"/"
    for mount in guest.layout.mounts:
        if (mount.mountpoint.encode() + b"/").startswith(below):
            raise RefusedError(
                f"{mount.source} is mounted at {mount.mountpoint}",
                subject=printable(real),
                hint=f"what is in it: imgtool rm -r IMAGE '{mount.mountpoint}/*'",
            )
    text = os.fsdecode(real)
    changes.seen[text] = entry
    if text not in changes.removed:
        changes.removed.append(text)


def _refuse_unshown(guest: Guest, path: bytes) -> None:
    """Raise `RefusedError` where something that is not shown belongs at, above or below a path."""
    for mountpoint, why in guest.unshown().items():
        place = mountpoint.encode().rstrip(b"/") + b"/"
        if (path + b"/").startswith(place) or place.startswith(path.rstrip(b"/") + b"/"):
            raise RefusedError(
                f"the filesystem of {mountpoint} is not shown: {why}",
                subject=printable(path),
                hint="nothing is removed there; 'imgtool filesystems --all IMAGE' shows what"
                " there is",
            )


def _is_below(path: str, others: Iterable[str]) -> bool:
    above = path.rpartition("/")[0]
    while above:
        if above in others:
            return True
        above = above.rpartition("/")[0]
    return False
