"""Work on an image that was cut off: which state is there, and how it is finished or undone."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from imgtool.errors import Force, ImageError, ImgtoolError, Reason, RefusedError
from imgtool.image import headers, qcow2
from imgtool.image.ages import kept_younger
from imgtool.image.chain import Chain, open_chain
from imgtool.image.checking import CheckResult, check_metadata
from imgtool.image.holdings import Since, holdings_of, since
from imgtool.image.info import ImageInfo, Snapshot, probe
from imgtool.image.locks import PATIENCE, refuse_if_in_use
from imgtool.image.places import Places, printable
from imgtool.image.qemu_img import Locked, qemu_img, same_content
from imgtool.image.reading import remove_unread
from imgtool.image.record import Record, is_temporary_of, opened, written_down
from imgtool.image.repairing import WouldLose, repair_tables
from imgtool.image.unfinished import (
    is_committed,
    lost,
    overlay_of,
    refuse_another_file,
    refuse_strange_overlay,
    stands_on,
    unfinished_commit,
)

Dirs = Sequence[str | Path]

# Made beside the image and then renamed: either it has its name, or it is removed.
NEW_FILES = ("create", "convert")
REPLACED_FILES = ("flatten", "compact")
# Done in the file itself in an order in which every moment reads as before or as after; what can
# be left over is space that nothing uses, and flags that QEMU's own check sets right.
IN_PLACE = ("rebase", "snapshot create", "snapshot delete", "resize")


def settle(
    record: Record, *, finish: bool, backing_dirs: Dirs = (), force: Force = ()
) -> str | None:
    """Bring an image to its old or its new state and remove the record; a line that says which.

    What takes long, the rest of a commit, is done only with `finish`; without, the record stays,
    and the line says so. A revert is finished with it, and undone without. With `Reason.COPY` in
    `force` also of an image that is a copy of the one that the record was written of.
    """
    operation, image = record.operation, record.image
    name = printable(image)
    line: str | None
    if operation is None:
        record.remove()
        return None
    if operation not in NEW_FILES and not image.exists():
        raise _gone(record)
    if operation in NEW_FILES or operation in REPLACED_FILES:
        line = _settle_file(record)
    elif operation in (*IN_PLACE, "repair", "revert") and is_untouched(record):
        line = f"an interrupted {operation} of {name} was undone: nothing had been written yet"
    elif operation == "repair":
        line = _settle_repair(record)
    elif operation in IN_PLACE:
        mend(image, format=_format(record))
        line = f"an interrupted {operation} left {name} sound, as before it or as after it"
    elif operation == "revert":
        line = _settle_revert(record, finish=finish)
    elif operation == "commit":
        if not finish and record.facts.get("step") != "proved" and not is_untouched(record):
            overlay = printable(record.text("overlay"))
            return (
                f"{name} holds a part of what was to be committed, {overlay} all of it:"
                " repeat the command to finish"
            )
        line = _settle_commit(record, finish=finish, backing_dirs=backing_dirs, force=force)
    elif operation == "write" and is_committed(image, record.facts):
        if not finish:
            return (
                f"{name} holds a part of what was written, and is read through what holds all of"
                f" it: imgtool recover {name}"
            )
        if Reason.COPY not in force:
            refuse_another_file(image, record.facts)
        _settle_others_first(record, backing_dirs, force)
        finish_write(record, backing_dirs, cut_off=True)
        return f"an interrupted write to {name} was finished"
    elif operation == "write":
        _settle_others_first(record, backing_dirs, force)
        temporary = _overlay(record)
        line = None
        if os.path.lexists(temporary):
            temporary.unlink()
            line = f"an interrupted write to {name} was undone"
    else:
        raise RefusedError(
            "work of a kind that this imgtool does not know was interrupted:"
            f" {printable(str(operation))}",
            subject=name,
            hint="use the imgtool that began it",
        )
    now = _since(record)
    record.remove()
    _refuse_if_gone(now, image)
    return f"{line}; {_spoilt(now)}" if line and now.spoilt else line


def _since(record: Record) -> Since:
    """What the image lacks by now of what it has to hold, by its record."""
    if "holds" not in record.facts:
        return Since()
    return since(record.facts["holds"], holdings_of(record.image, "qcow2"))


def _refuse_if_gone(now: Since, image: Path) -> None:
    if now.gone:
        raise ImgtoolError(
            f"after an interruption it lacks what it held: {'; '.join(now.gone)}",
            subject=printable(image),
            hint="its content is whole; please report this",
        )


def _spoilt(now: Since) -> str:
    return f"a backup by its {'; '.join(now.spoilt)} has to begin anew"


def _settle_others_first(record: Record, backing_dirs: Dirs, force: Force) -> None:
    """The record of the first of several disks goes last: what it says goes for the others."""
    folder, own = record.image.resolve().parent, record.image.resolve()
    first, *others = [(folder / name).resolve() for name in record.texts("images")]
    if own != first:
        return
    for other in others:
        written = written_down(other)
        if written is not None and written.facts.get("id") == record.facts.get("id"):
            recover(other, backing_dirs=backing_dirs, below=False, force=force)


def recover(
    image: Path, *, backing_dirs: Dirs = (), below: bool = True, force: Force = ()
) -> str | None:
    """Finish or undo what was interrupted on an image; a line that says so, None if nothing was.

    With `below` a commit of the image into its base is finished too. With `force` also where the
    image is a copy of the one that was written to.
    """
    line = None
    if below and (base := pending_below(image, backing_dirs)) is not None:
        line = recover(base, backing_dirs=backing_dirs, below=False, force=force)
    with opened(image, create=False) as record:
        settled = None
        if record is not None:
            settled = settle(record, finish=True, backing_dirs=backing_dirs, force=force)
    return "; ".join(part for part in (line, settled) if part) or None


def pending_below(overlay: Path, backing_dirs: Dirs = ()) -> Path | None:
    """The base of an overlay, if a commit of this very overlay into it was interrupted.

    A base that the chain rule does not allow is not looked at.
    """
    try:
        header = headers.read(overlay)
        base = headers.base_of(header) if header is not None else None
        if base is None or not Places.around(overlay, backing_dirs).hold(base.resolve()):
            return None
        if (unfinished := unfinished_commit(base)) is not None:
            return base if unfinished.samefile(overlay) else None
    except RefusedError:
        raise
    except (OSError, ValueError, RuntimeError, ImageError):
        pass  # whoever opens it says what is wrong with it
    return None


def _overlay(record: Record) -> Path:
    """The overlay that a record names. Raises `RefusedError` where it may not name that one."""
    refuse_strange_overlay(record.image, record.facts, record.owner)
    overlay = overlay_of(record.image, record.facts)
    return overlay if overlay is not None else Path(record.text("overlay"))  # which says why not


def finish_write(record: Record, backing_dirs: Dirs = (), *, cut_off: bool = False) -> None:
    """Write down what a committed overlay holds; then overlay and record go.

    Where that was `cut_off` before, QEMU may have left clusters that nothing uses.
    """
    overlay = _overlay(record)
    if record.facts.get("step") != "written":
        if not stands_on(overlay, record.image):
            raise lost(record.image, record.facts)
        if cut_off:
            mend(record.image, as_named_in=overlay)
        _commit(record.image, overlay, backing_dirs)
        if cut_off:
            mend(record.image, as_named_in=overlay)
        record.note(step="written")  # without the overlay, that it is done with is known from this
    now = _since(record)
    if os.path.lexists(overlay):
        remove_unread(overlay)
    record.remove()
    _refuse_if_gone(now, record.image)


def _gone(record: Record) -> ImageError:
    left = [record.path]
    if isinstance(record.facts.get("temporary"), str) and (made := _temporary(record)).exists():
        left.append(made)
    names = " ".join(printable(path) for path in left)
    return ImageError(
        f"it is not there any more, and a {record.operation} of it was interrupted",
        subject=printable(record.image),
        hint=f"bring it back and repeat this; or, if nothing of it is needed: rm {names}",
    )


def _temporary(record: Record) -> Path:
    """The file that was to become the image: in the image's folder, wherever that is now."""
    name = Path(record.text("temporary")).name
    if not is_temporary_of(record.image, name):
        raise RefusedError(
            f"the record of work on it names a file that is not imgtool's: {printable(name)}",
            subject=printable(record.image),
            hint=f"look at it, then remove it: {printable(record.path)}",
        )
    return record.path.with_name(name)


def _settle_file(record: Record) -> str | None:
    temporary, image = _temporary(record), record.image
    what = f"an interrupted {record.operation} of {printable(image)}"
    there = os.path.lexists(temporary)
    if image.exists():
        in_place = image.stat().st_ino == record.facts.get("inode")
        if in_place or (there and temporary.samefile(image)):
            temporary.unlink(missing_ok=True)  # its second name
            return f"{what} was finished"
    if not there:
        return None  # not begun
    temporary.unlink()
    return f"{what} was undone"


def _format(record: Record) -> str | None:
    """The format that the image was worked on as; None in a record that does not say."""
    return record.text("format") if "format" in record.facts else None


def mend(image: Path, *, format: str | None = None, as_named_in: Path | None = None) -> None:
    """Have QEMU set its tables right after it was killed at work; no guest data are touched.

    The format is the one that is given, or what an overlay on it says: what a guest wrote to a raw
    disk may look like any.
    """
    header = headers.read(as_named_in) if as_named_in is not None else None
    link = probe(image, format=header.backing_format if header is not None else format)
    refuse_if_in_use(Chain((link,)))
    if link.format != "qcow2":
        return
    if link.driver == "file":
        _lengthen(image)  # else a table that lies beyond the end escapes the check
    if not _mended(link).sound:
        raise ImgtoolError(
            "its tables are damaged after an interruption",
            subject=printable(image),
            hint="imgtool chain check says more",
        )
    if link.driver == "file":
        _lengthen(image)


def _mended(link: ImageInfo) -> CheckResult:
    """The check of an image after its repair, or without one where snapshots would be lost by it.

    What is left over then is space that nothing uses.
    """
    try:
        return repair_tables(link, "all")
    except WouldLose:
        found = check_metadata(link)
        if not found.sound:
            raise
        return found


def _lengthen(image: Path) -> None:
    """Make the file hold every cluster that its tables count.

    QEMU counts a cluster before it writes it, and reads zeros where the file has ended before;
    whoever finds an image too short for its tables takes it for a torn copy.
    """
    with image.open("r+b") as file:
        header = qcow2.read_header(file)
        if header is not None:
            needed = qcow2.size_needed(file, header)
            if needed > file.seek(0, os.SEEK_END):
                file.truncate(-(-needed // header.cluster_size) * header.cluster_size)


def on_snapshots(image: Path, option: str, name: str, *, held: bool = False) -> None:
    """`qemu-img snapshot` on one qcow2 file; what it stands on is not opened.

    `held`, the locks on it that QEMU would take are the caller's.
    """
    node = Chain((probe(image, format="qcow2"),)).blockdev(read_only=False)
    if held:
        node["file"]["locking"] = "off"
    alone = "json:" + json.dumps(node, ensure_ascii=False)
    qemu_img(["snapshot", option, name, alone], image=image)


def _settle_repair(record: Record) -> str | None:
    """Repair it again, as much as was asked for; what cannot be repaired is as it was."""
    if record.facts.get("step") == "done":
        return None
    image = record.image
    link = probe(image, format=_format(record))
    refuse_if_in_use(Chain((link,)))
    what = f"an interrupted repair of {printable(image)}"
    with contextlib.suppress(ImgtoolError):
        asked: Literal["leaks", "all"] = "leaks" if record.facts.get("what") == "leaks" else "all"
        if repair_tables(link, asked).sound:
            return f"{what} was finished"
    return f"{what} could not be finished: imgtool chain check says what is wrong with it"


def _settle_revert(record: Record, *, finish: bool) -> str:
    image, saved = record.image, record.text("saved")
    what = f"an interrupted revert of {printable(image)} was"
    mend(image, format="qcow2")
    kept = _named(image, saved)
    begun = record.facts.get("step") == "apply"
    finished = begun and (finish or kept is None)
    if finished and kept is not None:
        on_snapshots(image, "-a", record.text("to"))
    elif begun and kept is not None:
        on_snapshots(image, "-a", kept.id)
    if kept is not None and (record.facts.get("temporary") or not finished):
        on_snapshots(image, "-d", saved)
    mend(image, format="qcow2")
    return f"{what} {'finished' if finished else 'undone'}"


def _named(image: Path, name: str) -> Snapshot | None:
    return next((row for row in probe(image, format="qcow2").snapshots if row.name == name), None)


def as_untouched(base: Path) -> list[int]:
    """What tells whether anything at all was written to a file; times in nanoseconds."""
    status = base.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def is_untouched(record: Record) -> bool:
    """Whether a commit failed before it had written anything; a device does not tell."""
    image = record.image
    return not image.is_block_device() and record.facts.get("before") == as_untouched(image)


def _settle_commit(record: Record, *, finish: bool, backing_dirs: Dirs, force: Force) -> str:
    base, overlay = record.image, _overlay(record)
    name = f"an interrupted commit of {printable(overlay)} into {printable(base)} was"
    if record.facts.get("step") != "proved":
        if not finish:
            return f"{name} undone: nothing had been written yet"
        if not stands_on(overlay, base):
            raise _no_longer(base, overlay)
        if Reason.COPY not in force:
            refuse_another_file(base, record.facts)
        mend(base, as_named_in=overlay)
        chain = _commit(base, overlay, backing_dirs)
        if not same_content(chain.filename(), Chain(chain.links[1:]).filename()):
            raise ImgtoolError("the commit did not give the same content", subject=printable(base))
        mend(base, as_named_in=overlay)  # what was counted twice over shows only now
    committed(record, overlay)
    return f"{name} finished"


def committed(record: Record, overlay: Path) -> None:
    """The base is proved to have all of an overlay: say so, then end what the overlay is for."""
    if record.facts.get("step") != "proved":
        record.note(step="proved")
    if stands_on(overlay, record.image):
        if record.facts.get("remove"):
            remove_unread(overlay)
        else:
            with kept_younger(overlay):
                os.utime(overlay)  # its base is newer, and still fits


def _commit(base: Path, overlay: Path, backing_dirs: Dirs) -> Chain:
    """Write all that an overlay holds into its base, which may hold some of it already."""
    if not stands_on(overlay, base):
        raise _no_longer(base, overlay)
    dirs = [*backing_dirs, base.absolute().parent]
    chain = open_chain(overlay, format="qcow2", backing_dirs=dirs)
    if len(chain.links) < 2 or not chain.links[1].path.samefile(base):
        raise _no_longer(base, overlay)
    until = time.monotonic() + PATIENCE
    while True:
        try:
            words = ["commit", "-d", chain.filename(read_only=False)]
            qemu_img(words, image=overlay, apart=True)
        except Locked:
            # A reader that came just now is gone in a moment.
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return chain


def _no_longer(base: Path, overlay: Path) -> RefusedError:
    return RefusedError(
        f"a commit of {printable(overlay)} was interrupted, which is not there any more or no"
        " longer stands on it",
        subject=printable(base),
        hint="bring that overlay back: without it nothing has all that the base should hold",
    )
