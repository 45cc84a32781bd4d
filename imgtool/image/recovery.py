"""Work on an image that was cut off: which state is there, and how it is finished or undone."""

from __future__ import annotations

import os
from pathlib import Path

from imgtool.errors import ImgtoolError, RefusedError
from imgtool.image.chain import Chain, open_chain
from imgtool.image.checking import check_metadata
from imgtool.image.info import probe
from imgtool.image.places import printable
from imgtool.image.qemu_img import qemu_img, same_content
from imgtool.image.record import Record, is_committed, opened

# Made beside the image and then renamed: either it has its name, or it is removed.
WHOLE_FILES = ("create", "flatten", "compact", "convert")
# Done in the file itself in an order in which every moment reads as before or as after; what can
# be left over is space that nothing uses, and flags that QEMU's own check sets right.
IN_PLACE = ("rebase", "snapshot create", "snapshot delete", "resize", "repair")


def settle(record: Record, *, finish: bool) -> str | None:
    """Bring an image to its old or its new state and remove the record; a line that says which.

    What takes long, the rest of a commit, is done only with `finish`; without, the record stays,
    and the line says so.
    """
    operation, image = record.operation, record.image
    name = printable(image)
    line: str | None
    if operation is None:
        line = None
    elif operation in WHOLE_FILES:
        line = _settle_file(Path(record.facts["temporary"]), f"{operation} of {name}")
    elif operation in IN_PLACE:
        mend(image)
        line = f"an interrupted {operation} left {name} sound, as before it or as after it"
    elif operation == "revert":
        line = _settle_revert(record)
    elif operation == "commit":
        overlay = Path(record.facts["overlay"])
        if not finish:
            return (
                f"{name} holds a part of what was to be committed, {printable(overlay)} all of it:"
                " repeat the command to finish"
            )
        _finish_commit(image, overlay)
        line = f"an interrupted commit of {printable(overlay)} into {name} was finished"
    elif operation == "write" and is_committed(record.facts):
        if not finish:
            return (
                f"{name} holds a part of what was written, and is read through what holds all of"
                f" it: imgtool recover {name}"
            )
        for other in record.facts["images"]:
            if other == record.facts["images"][0] != str(image.resolve()):
                break  # only the first waits for the others
            if other != str(image.resolve()):
                recover(Path(other))
        finish_write(record)
        return f"an interrupted write to {name} was finished"
    elif operation == "write":
        line = _settle_file(Path(record.facts["overlay"]), f"write to {name}")
    else:
        raise RefusedError(
            f"work of a kind that this imgtool does not know was interrupted: {operation}",
            subject=name,
            hint="use the imgtool that began it",
        )
    record.remove()
    record.facts.clear()
    return line


def recover(image: Path) -> str | None:
    """Finish or undo what was interrupted on an image; a line that says so, None if nothing was."""
    with opened(image, create=False) as record:
        return settle(record, finish=True) if record is not None else None


def finish_write(record: Record) -> None:
    """Write down what a committed overlay holds; then overlay and record go."""
    overlay = Path(record.facts["overlay"])
    if overlay.exists():
        _commit(record.image, overlay)
        overlay.unlink()
    record.remove()
    record.facts.clear()


def _settle_file(temporary: Path, what: str) -> str | None:
    if not temporary.exists():
        return None  # not begun, or it has its name
    temporary.unlink()
    return f"an interrupted {what} was undone"


def mend(image: Path) -> None:
    """Have QEMU set its tables right after it was killed at work; no guest data are touched."""
    link = probe(image)
    if link.format == "qcow2" and not check_metadata(link, repair="all").sound:
        raise ImgtoolError(
            "its tables are damaged after an interruption",
            subject=printable(image),
            hint="imgtool chain check says more",
        )


def _settle_revert(record: Record) -> str:
    facts, image = record.facts, record.image
    saved = facts.get("saved")
    finished = facts.get("step") == "apply"
    if finished:
        qemu_img(["snapshot", "-q", "-a", facts["to"], image], image=image)
    there = any(snapshot.name == saved for snapshot in probe(image).snapshots)
    if there and (facts.get("temporary") or not finished):
        qemu_img(["snapshot", "-q", "-d", str(saved), image], image=image)
    mend(image)
    return f"an interrupted revert of {printable(image)} was {'finished' if finished else 'undone'}"


def _commit(base: Path, overlay: Path) -> Chain:
    """Write all that an overlay holds into its base, which may hold some of it already."""
    chain = open_chain(overlay, format="qcow2", backing_dirs=[base.parent])
    if len(chain.links) < 2 or not chain.links[1].path.samefile(base):
        raise RefusedError(
            f"a commit of {printable(overlay)} was interrupted, which no longer stands on it",
            subject=printable(base),
            hint="restore the base from a backup",
        )
    qemu_img(["commit", "-q", "-d", chain.filename(read_only=False)], image=overlay)
    return chain


def _finish_commit(base: Path, overlay: Path) -> None:
    mend(base)
    chain = _commit(base, overlay)
    if not same_content(chain.filename(), Chain(chain.links[1:]).filename()):
        raise ImgtoolError("the commit did not give the same content", subject=printable(base))
    os.utime(overlay)  # its base is newer, and still fits
