"""Work on an image that was cut off: which state is there, and how it is finished or undone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from imgtool.errors import Force, ImageError, ImgtoolError, Reason, RefusedError
from imgtool.image import headers
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.holdings import Since, holdings_of, since
from imgtool.image.chain.info import probe
from imgtool.image.chain.reading import remove_unread
from imgtool.image.chain.steady import bind_images, bind_paths
from imgtool.image.change.changes import (
    is_intact,
    marks,
    noted_mark,
    refuse_if_changed,
    why_needed,
)
from imgtool.image.change.keeping import is_made, keep
from imgtool.image.change.mending import repair_metadata
from imgtool.image.change.renaming import name_anew
from imgtool.image.change.repairing import repair_tables
from imgtool.image.change.reverting import settle_revert
from imgtool.image.checks.ages import kept_as_noted
from imgtool.image.intent.intent_log import (
    Record,
    is_temporary_of,
    load_intent,
    open_record,
    records_of_devices,
)
from imgtool.image.intent.intent_state import (
    is_committed,
    lost,
    overlay_of,
    refuse_another_file,
    refuse_strange_overlay,
    stands_no_longer,
    stands_on,
    to_keep,
    unproved_record,
)
from imgtool.image.intent.marks import is_as_noted, is_same_file
from imgtool.image.locking.held import is_one_file, real_path, remove_file, way_to
from imgtool.image.locking.locks import PATIENCE, held_for_writing, refuse_if_in_use
from imgtool.image.policy import AllowedDirs
from imgtool.image.qemu.qemu_img import Locked, qemu_img, same_content
from imgtool.text import printable, typed

Dirs = Sequence[str | Path]

# Made beside the image and then renamed: either it has its name, or it is removed.
NEW_FILES = ("create", "convert")
REPLACED_FILES = ("flatten", "compact")
# Done in the file itself in an order in which every moment reads as before or as after; what can
# be left over is space that nothing uses, and flags that QEMU's own check sets right.
IN_PLACE = ("rebase", "snapshot create", "snapshot delete", "resize")


def resolve_intent(
    record: Record, *, finish: bool, backing_dirs: Dirs = (), force: Force = ()
) -> str | None:
    """Bring an image to its old or its new state and remove the record; a line that says which.

    What takes long, the rest of a commit, is done only with `finish`; without, the record stays,
    and the line says so. A revert is finished with it, and undone without. Raises `RefusedError`,
    and does nothing, where that could lose what was written since, or the record may not be meant
    for these files; `force` gives up `Reason.CHANGED`, `COPY` and `UNPROVED`.
    """
    operation, image = record.operation, record.image
    name = printable(image)
    if operation is None:
        record.remove()
        return None
    if not record.proved and Reason.UNPROVED not in force:
        raise unproved_record(image, record.facts, record.owner)
    if operation not in NEW_FILES and not way_to(image).exists():
        raise _gone(record)
    if operation not in NEW_FILES and operation not in REPLACED_FILES:
        refuse_another_file(image, record.facts, force=force)
    if operation in NEW_FILES or operation in REPLACED_FILES:
        line = _settle_file(record, force)
    elif _was_not_begun(record):
        line = f"an interrupted {operation} of {name} was undone: nothing had been written yet"
    elif operation == "repair":
        line = _settle_repair(record)
    elif operation in IN_PLACE:
        repair_metadata(image, format=_format(record))
        line = f"an interrupted {operation} left {name} sound, as before it or as after it"
    elif operation == "revert":
        with held_for_writing([image]):
            line = settle_revert(record, finish=finish, backing_dirs=backing_dirs)
    elif operation == "commit":
        return _settle_commit(record, finish=finish, backing_dirs=backing_dirs, force=force)
    elif operation == "write":
        return _settle_write(record, finish=finish, backing_dirs=backing_dirs, force=force)
    else:
        raise RefusedError(
            f"work of a kind that this imgtool does not know was interrupted: {operation}",
            subject=name,
            hint=f"use the imgtool that began it; {to_keep(image)}",
        )
    return _end_record(record, line)


def _was_not_begun(record: Record) -> bool:
    """Whether work in the image itself was cut off, or locked out, before its first step."""
    in_the_image = record.operation in (*IN_PLACE, "repair", "revert")
    return in_the_image and record.facts.get("step") is None and is_untouched(record)


def _end_record(record: Record, line: str | None) -> str | None:
    """The record of work that was settled goes; the line, and what else became of the image."""
    now, operation = _since(record), record.operation
    record.remove()
    _refuse_if_gone(now, record.image)
    if not now.spoilt:
        return line
    line = line or f"an interrupted {operation} to {printable(record.image)} was finished"
    return f"{line}; {_spoilt(now)}"


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


def _settle_write(record: Record, *, finish: bool, backing_dirs: Dirs, force: Force) -> str | None:
    image, name = record.image, printable(record.image)
    if is_committed(image, record.facts, proved=record.proved):
        if not finish:
            return (
                f"{name} holds a part of what was written, and is read through what holds all of"
                f" it: imgtool recover {typed(image)}"
            )
        _settle_others_first(record, backing_dirs, force)
        line = finish_write(record, backing_dirs, cut_off=True, force=force)
        return line or f"an interrupted write to {name} was finished"
    _settle_others_first(record, backing_dirs, force)
    temporary, line = _overlay(record, backing_dirs, force), None
    if os.path.lexists(temporary):
        there = temporary.lstat()
        line = f"an interrupted write to {name} was undone"
        if is_made(record, temporary, force) and _is_of(record, temporary, force):
            remove_file(temporary, there)
        else:
            line += f"; {printable(temporary)} stays, since it is not the file that was made for it"
    record.remove()
    return line


def _is_of(record: Record, overlay: Path, force: Force) -> bool:
    """Whether an overlay is that of this very image, and not of the one that it is a copy of."""
    if Reason.COPY not in force:
        return True
    beside = overlay.resolve().parent == record.path.parent.resolve()
    return stands_on(overlay, record.image) or (beside and not overlay.stat().st_size)


def _settle_others_first(record: Record, backing_dirs: Dirs, force: Force) -> None:
    """The record of the first of several disks goes last: what it says goes for the others."""
    folder, own = real_path(record.image).parent, real_path(record.image)
    images = [(folder / name).resolve() for name in record.texts("images")]
    number = record.facts.get("number")
    if (own != images[0]) if number is None else (number != 0):
        return
    for other in images:
        written = load_intent(other) if other != own else None
        if written is not None and written.facts.get("id") == record.facts.get("id"):
            recover(other, backing_dirs=backing_dirs, below=False, force=force)
    for name, written in records_of_devices(record.image):
        of_another = f".{name}." not in record.path.name
        if of_another and written.facts.get("id") == record.facts.get("id"):
            raise RefusedError(
                "a write to it and to other devices was interrupted, which have other names now",
                subject=printable(record.image),
                hint="first, for each of the others: imgtool recover DEVICE;"
                f" {to_keep(record.image)}",
            )


def recover(
    image: Path,
    *,
    backing_dirs: Dirs = (),
    below: bool = True,
    force: Force = (),
    end: bool = False,
) -> str | None:
    """Finish or undo what was interrupted on an image; a line that says so, None if nothing was.

    With `below` a commit of the image into its base is finished too. `force` as for
    `resolve_intent`. To `end` it is neither: the record goes, and all that is there is kept.
    """
    line = None
    if below and (base := pending_below(image, backing_dirs)) is not None:
        line = recover(base, backing_dirs=backing_dirs, below=False, force=force, end=end)
    with open_record(image, create=False) as record:
        settled = None
        if record is not None and record.operation is not None and end:
            settled = keep(record)
        elif record is not None:
            try:
                with _bound(record), _kept_younger(record, backing_dirs):
                    settled = resolve_intent(
                        record, finish=True, backing_dirs=backing_dirs, force=force
                    )
            except RefusedError:
                raise  # which says what to do
            except ImgtoolError as error:
                error.hint = "; ".join(filter(None, (error.hint, to_keep(image))))
                raise
    return "; ".join(part for part in (line, settled) if part) or None


@contextlib.contextmanager
def _bound(record: Record) -> Iterator[None]:
    """What is settled in the block is the very files that are there now. Whether those are the ones
    of the record is looked at in it."""
    files = [] if record.operation in (*NEW_FILES, *REPLACED_FILES) else [record.image]
    if files and (overlay := overlay_of(record.image, record.facts)) is not None:
        files.append(overlay)
    with bind_paths(files):
        yield


@contextlib.contextmanager
def _kept_younger(record: Record, backing_dirs: Dirs) -> Iterator[None]:
    """What is settled in the block changes nothing for overlays, where the work was such."""
    image: Path | None = record.image
    if record.operation == "commit":
        image = overlay_of(record.image, record.facts)
    if "younger" not in record.facts or image is None or not way_to(image).exists():
        yield
        return
    with kept_as_noted(record, image, backing_dirs):
        yield


def pending_below(overlay: Path, backing_dirs: Dirs = ()) -> Path | None:
    """The base of an overlay, if a commit of this very overlay into it was interrupted.

    A base that the chain rule does not allow is not looked at.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        # Whoever opens it says what is wrong with it.
        header = headers.read(overlay)
        base = headers.base_of(header) if header is not None else None
        if base is None or not AllowedDirs.around(overlay, backing_dirs).hold(real_path(base)):
            return None
        written = load_intent(base)
        if written is None or written.facts.get("operation") != "commit":
            return None
        named = overlay_of(base, written.facts)
        pending = written.facts.get("step") != "proved"
        if pending and named is not None and is_one_file(named, overlay):
            return base
    return None


def _overlay(record: Record, backing_dirs: Dirs, force: Force) -> Path:
    """The overlay that a record names. Raises `RefusedError` where it may not name that one."""
    refuse_strange_overlay(record.image, record.facts, record.owner)
    overlay = overlay_of(record.image, record.facts)
    if overlay is None:
        return Path(record.text("overlay"))  # which says why not
    places = AllowedDirs.around(record.image, backing_dirs)
    if not record.proved and not places.hold(real_path(overlay)):
        raise RefusedError(
            f"the record of work on it names a file elsewhere: {printable(overlay)}",
            subject=printable(record.image),
            hint=f"if you know that one: --backing-dir {typed(overlay.parent)};"
            f" {to_keep(record.image)}",
        )
    return overlay


def finish_write(
    record: Record, backing_dirs: Dirs = (), *, cut_off: bool = False, force: Force = ()
) -> str | None:
    """Write down what a committed overlay holds; then overlay and record go. A line if not.

    Where that was `cut_off` before, QEMU may have left clusters that nothing uses.
    """
    image, overlay = record.image, _overlay(record, backing_dirs, force)
    if record.facts.get("step") != "written":
        name_anew(record, overlay, backing_dirs, force)
        if not stands_on(overlay, image):
            raise lost(image, record.facts)
        if cut_off:
            refuse_another_file(image, record.facts, overlay, force=force)
            refuse_if_changed(record, overlay, backing_dirs, force)
        with held_for_writing([overlay, image]), record.at_work():
            if cut_off:
                repair_metadata(image, as_named_in=overlay)
            _commit(image, overlay, backing_dirs)
            if cut_off:
                repair_metadata(image, as_named_in=overlay)
            record.note(step="written", noted=marks(image, overlay))
    line = None
    if os.path.lexists(overlay):
        same = Reason.COPY in force or is_as_noted(noted_mark(record, "overlay"), overlay)
        if same and _is_of(record, overlay, force):
            remove_unread(overlay)
        else:
            line = f"{printable(image)} is whole; {printable(overlay)} was changed, and stays"
    return _end_record(record, line)


def refuse_if_used_since(record: Record, backing_dirs: Dirs, force: Force) -> None:
    """Raise `RefusedError` if a commit that is to be repeated would go over what somebody wrote
    into the base after it was cut off."""
    overlay = _overlay(record, backing_dirs, force)
    refuse_if_changed(record, overlay, backing_dirs, force, anew=True)


def _gone(record: Record) -> ImageError:
    left = [record.path]
    if isinstance(record.facts.get("temporary"), str) and (made := _temporary(record)).exists():
        left.append(made)
    names = " ".join(typed(path) for path in left)
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


def _settle_file(record: Record, force: Force) -> str | None:
    temporary, image = _temporary(record), record.image
    what = f"an interrupted {record.operation} of {printable(image)}"
    there = os.path.lexists(temporary)
    known = temporary.lstat() if there else None
    if image.exists():
        second = there and temporary.samefile(image)
        if second and known is not None:
            remove_file(temporary, known)
        if second or is_same_file(record.facts.get("made"), image):
            return f"{what} was finished"
        if there and record.operation in REPLACED_FILES:
            refuse_another_file(image, record.facts, force=force)
    if known is None:
        return None  # not begun
    if not is_made(record, temporary, force):
        return (
            f"{what} is over; {printable(temporary)} is not the file that was made for it: it stays"
        )
    remove_file(temporary, known)
    return f"{what} was undone"


def _format(record: Record) -> str | None:
    """The format that the image was worked on as; None in a record that does not say."""
    return record.text("format") if "format" in record.facts else None


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


def is_untouched(record: Record) -> bool:
    """Whether work was cut off before it had written anything."""
    return is_as_noted(noted_mark(record, "image"), record.image)


def _settle_commit(record: Record, *, finish: bool, backing_dirs: Dirs, force: Force) -> str | None:
    base, overlay = record.image, _overlay(record, backing_dirs, force)
    name = f"an interrupted commit of {printable(overlay)} into {printable(base)} was"
    if record.facts.get("step") == "proved":
        left = finish_commit(record, overlay, backing_dirs, force)
        return _end_record(record, left or f"{name} finished")
    if is_untouched(record) and (not finish or not is_intact(record, overlay, force)):
        record.remove()
        return f"{name} undone: nothing had been written yet"
    if not finish:
        return (
            f"{printable(base)} holds a part of what was to be committed, {printable(overlay)} all"
            " of it: repeat the command to finish"
        )
    name_anew(record, overlay, backing_dirs, force)
    if not stands_on(overlay, base):
        raise stands_no_longer(base, overlay)
    refuse_another_file(base, record.facts, overlay, force=force)
    refuse_if_changed(record, overlay, backing_dirs, force)
    with held_for_writing([overlay, base]), record.at_work():
        repair_metadata(base, as_named_in=overlay)
        chain = _commit(base, overlay, backing_dirs)
        if not same_content(chain.filename(), Chain(chain.links[1:]).filename()):
            raise ImgtoolError("the commit did not give the same content", subject=printable(base))
        repair_metadata(base, as_named_in=overlay)  # what was counted twice over shows only now
        if not record.facts.get("remove"):
            repair_metadata(overlay)  # QEMU writes down its bitmaps too
        left = finish_commit(record, overlay, backing_dirs, force)
    return _end_record(record, left or f"{name} finished")


def finish_commit(
    record: Record, overlay: Path, backing_dirs: Dirs = (), force: Force = ()
) -> str | None:
    """The base is proved to have all of an overlay: say so, then end what the overlay is for.

    A line if it stays where it was to be removed, since somebody needs it or used it since.
    """
    base = record.image
    if record.facts.get("step") != "proved":
        record.note(step="proved", noted=marks(base, overlay))
    if not stands_on(overlay, base):
        return None
    if not record.facts.get("remove"):
        if is_intact(record, overlay):
            os.utime(way_to(overlay))  # its base is newer, and still fits
        return None
    try:
        with held_for_writing([overlay, base]):
            why = why_needed(record, overlay, backing_dirs, force)
            if why is None:
                remove_unread(overlay)
    except RefusedError as error:
        why = str(error)
    if why is None:
        return None
    return f"all of {printable(overlay)} is in {printable(base)}, and yet it stays: {why}"


def _commit(base: Path, overlay: Path, backing_dirs: Dirs) -> Chain:
    """Write all that an overlay holds into its base, which may hold some of it already."""
    if not stands_on(overlay, base):
        raise stands_no_longer(base, overlay)
    dirs = [*backing_dirs, base.absolute().parent]
    chain = open_chain(overlay, format="qcow2", backing_dirs=dirs)
    if len(chain.links) < 2 or not is_one_file(chain.links[1].path, base):
        raise stands_no_longer(base, overlay)
    with bind_images(chain.links):
        _commit_chain(chain, overlay)
    return chain


def _commit_chain(chain: Chain, overlay: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            words = ["commit", "-d", chain.filename(read_only=False)]
            qemu_img(words, image=overlay, new_group=True)
        except Locked:
            # A reader that came just now is gone in a moment.
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return
