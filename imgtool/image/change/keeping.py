"""Work on an image that was cut off and is to be ended as it is: nothing of it is lost."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from imgtool.errors import Force, Reason
from imgtool.image.intent.intent_log import Record, is_name, is_temporary_of
from imgtool.image.intent.intent_state import may_be_torn, overlay_of, stands_on
from imgtool.image.intent.marks import is_same_file
from imgtool.text import printable, typed


def is_made(record: Record, path: Path, force: Force = ()) -> bool:
    """Whether a file is the one that was made for the work: nothing else is removed.

    Before its identity is noted it is empty.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return False
    if Reason.COPY in force or not status.st_size:
        return True
    return is_same_file(record.facts.get("made"), path)


def keep(record: Record) -> str:
    """End work without finishing or undoing it: the record goes, and what was made for it gets a
    name of its own. A line that says so."""
    image, operation = record.image, record.operation
    line = f"the record of a {operation} of {printable(image)} is gone, and nothing else"
    path = _made_for(record)
    if path is not None and operation != "commit":
        path = _rename(path, ".qcow2" if operation == "write" else "")
        line = f"the record of a {operation} is gone; what was made is {printable(path)}"
    if may_be_torn(image, record.facts):
        line += f"; by itself {printable(image)} may hold a part of what was to be written"
        named = path or overlay_of(image, record.facts)
        if path is not None:
            line += (
                f", and all of it is in {printable(path)}: imgtool overlay commit {typed(path)}"
                f" --force {Reason.BASE_NEWER}"
            )
        elif named is not None and not os.path.lexists(named):
            line += f", and what has all of it is not at its place: {printable(named)[:200]}"
    record.remove()
    return line


def _rename(path: Path, end: str) -> Path:
    """Give a file that is imgtool's own a name that is seen, and that nothing has."""
    stem, _, number = path.name.removeprefix(".").rpartition(".imgtool-")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for more in ("", *(f"-{count}" for count in range(1, 100))):
            kept = path.with_name(f"{stem}.kept-{number}{more}{end}")
            if not os.path.lexists(kept):
                break
        os.rename(path.name, kept.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)
    return kept


def _made_for(record: Record) -> Path | None:
    """What was made for the work, or the overlay that is committed; None where that is not there,
    or may be something else."""
    image, facts = record.image, record.facts
    if "temporary" in facts:
        name = facts["temporary"]
        path = record.path.with_name(Path(name).name) if is_name(name) else None
    else:
        path = overlay_of(image, facts)
    if path is None or not os.path.lexists(path):
        return None
    status, named = path.lstat(), is_temporary_of(image, path.name)
    # By its backing file it is known without any proof: nothing is lost by another name.
    with contextlib.suppress(PermissionError):
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        known = record.proved if record.operation == "commit" else named
        if own and known and stands_on(path, image):
            return path
    if not named or not record.proved or not is_made(record, path):
        return None
    own = record.operation != "write" or is_same_file(facts.get("identity"), image)
    return path if own else None
