"""What was done to the files of a record after its work was cut off, by a guest or anybody else.

What is finished then could go over what they wrote. A file that nobody writes to during the work is
as it was noted. One that QEMU was writing to when it was killed is not; but a QEMU that imgtool
started dies with it, and when that was the time of the record's own file says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from imgtool.errors import Force, Reason, RefusedError
from imgtool.formats import qcow2
from imgtool.formats.qcow2_snapshots import read_snapshots, same_as_active
from imgtool.image.checks.dependants import overlays_on
from imgtool.image.intent.intent_log import Record, last_write_time
from imgtool.image.intent.intent_state import to_keep
from imgtool.image.intent.marks import (
    Mark,
    Noted,
    is_as_noted,
    is_same_file,
    mark_of,
    parts_of,
    same_identity,
    snapshots_of,
)
from imgtool.image.locking.held import is_one_file, way_to
from imgtool.image.locking.host_file import open_host_file
from imgtool.text import printable, typed

Dirs = Sequence[str | Path]


def noted_mark(record: Record, which: str) -> object:
    """The mark of the `image` or the `overlay` that was noted last."""
    files = record.facts.get("noted")
    return files.get(which) if isinstance(files, dict) else None


def marks(image: Path, overlay: Path | None = None) -> dict[str, Mark]:
    """What a record notes of its files, at each step."""
    files = {"image": mark_of(image)}
    return files if overlay is None else {**files, "overlay": mark_of(overlay)}


def _what_changed(
    record: Record, overlay: Path, backing_dirs: Dirs, force: Force, anew: bool
) -> str | None:
    """What somebody did to the files of a record after its work was cut off; None for nothing."""
    image = record.image
    if Reason.COPY not in force:
        if not anew and (what := _use_since(record, overlay, "overlay")):
            return what
        if what := _use_since(record, image, "image"):
            return what
    for other in overlays_on(image, backing_dirs):
        new = other.stat().st_ctime_ns > record.touched
        if new and not (way_to(overlay).exists() and is_one_file(other, overlay)):
            return f"{printable(other)} was put on it, or used,"
    return None


def _use_since(record: Record, path: Path, which: str) -> str | None:
    """What somebody did to a file that QEMU had open for writing when it was killed."""
    before = noted_mark(record, which)
    if is_as_noted(before, path) or (which == "image" and not isinstance(before, dict)):
        return None
    if which == "image" and is_as_noted(record.facts.get("left"), path):
        return None
    name = "it" if which == "image" else printable(path)
    if not isinstance(before, dict) or not is_same_file(before.get("identity"), path):
        return f"{name} was replaced"
    if before.get("snapshots") != snapshots_of(path):
        return f"the internal snapshots of {name} were changed"
    now = mark_of(path)
    then_parts, now_parts = parts_of(before), now.get("parts", [])
    if len(then_parts) != len(now_parts):
        return f"a file that holds the data of {name} was replaced"
    for then, there in zip([before, *then_parts], [now, *now_parts], strict=True):
        whose = name if there is now else f"a file that holds the data of {name}"
        if what := _what_became(record, then, there):
            return f"{whose} {what}"
    return None


def _what_became(record: Record, then: Noted, now: Mark) -> str | None:
    """What somebody did to one file, by its mark from before and the one of now."""
    if not same_identity(then.get("identity"), now["identity"]):
        return "was replaced"
    if "written" in now:  # when nobody knows
        same = now["written"] is not None and now["written"] == then.get("written")
        return None if same else "may have been written to"
    if now["mtime"] > last_write_time(record):
        return "was written to"
    mtime = then.get("mtime")
    if isinstance(mtime, int) and now["mtime"] < mtime:  # an older one, copied over it
        return "was replaced"
    return None


def refuse_if_changed(
    record: Record, overlay: Path, backing_dirs: Dirs, force: Force, *, anew: bool = False
) -> None:
    """Raise `RefusedError` if to finish could lose what was written since it was cut off. Where it
    is asked for `anew`, what is in the overlay by now is what is meant."""
    if Reason.CHANGED in force:
        return
    if (what := _what_changed(record, overlay, backing_dirs, force, anew)) is not None:
        shown = printable(record.image)
        raise RefusedError(
            f"{what} since a {record.operation} was interrupted, so that was not finished",
            subject=shown,
            hint=f"{printable(overlay)} holds all that was to be written. To finish it over what"
            " was done since:"
            f" imgtool recover {typed(record.image)} --force {Reason.CHANGED};"
            f" {to_keep(record.image)}",
        )


def is_intact(record: Record, overlay: Path, force: Force = ()) -> bool:
    """Whether an overlay is as it was when its commit began."""
    if Reason.COPY in force or Reason.CHANGED in force:
        return way_to(overlay).exists()
    return is_as_noted(noted_mark(record, "overlay"), overlay)


def why_needed(record: Record, overlay: Path, backing_dirs: Dirs, force: Force) -> str | None:
    """Why an overlay that was committed may not be removed; None where it may."""
    for path, which in ((overlay, "overlay"), (record.image, "image")):
        same = is_as_noted(noted_mark(record, which), path)
        if not same and Reason.COPY not in force and Reason.CHANGED not in force:
            return f"{printable(path)} was used since"
    if not way_to(overlay).is_file():
        return "it is a device"
    if above := overlays_on(overlay, backing_dirs):
        return f"{printable(above[0])} stands on it"
    return None


def present_is(image: Path, *, id: str | None = None, name: str | None = None) -> bool | None:
    """Whether the present state of a qcow2 image is made of the very clusters of the snapshot with
    this id or name; None where it has no such snapshot."""
    with contextlib.suppress(OSError, ValueError), open_host_file(image) as file:
        header = qcow2.read_header(file)
        for row in (read_snapshots(file, header) if header is not None else None) or ():
            known, wanted = (row.name, name) if id is None else (row.id, id)
            if header is not None and known == os.fsencode(wanted or ""):
                return same_as_active(file, header, row)
    return None
