"""What a record means for whoever reads its image: whether the image is whole, or what is.

A commit that was cut off leaves a part of an overlay in the image. Until it is finished the image
is read through that overlay, which has all of it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from imgtool.errors import Force, ImageError, Reason, RefusedError
from imgtool.image import headers
from imgtool.image.intent.intent_log import (
    Written,
    is_name,
    is_temporary_of,
    load_intent,
    not_believed,
    operation_of,
    record_path,
    records_of_devices,
    worker_on,
)
from imgtool.image.intent.marks import is_as_noted, is_same_file
from imgtool.image.locking.held import is_one_file, real_path, way_to
from imgtool.text import printable, typed

_LONGEST_SHOWN = 200


def stands_on(overlay: Path, base: Path) -> bool:
    """Whether the header of an overlay names this base. Raises `PermissionError`."""
    try:
        header = headers.read(overlay)
        below = headers.base_of(header) if header is not None else None
        return below is not None and is_one_file(below, base)
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def overlay_of(image: Path, facts: dict[str, object]) -> Path | None:
    """The overlay that a record of work on an image names; None where it names none.

    A name that is not absolute starts in the image's folder, which can be moved as a whole.
    """
    name = facts.get("overlay")
    if not is_name(name):
        return None
    return real_path(image).parent / name


def has_another_name(image: Path, facts: dict[str, object], overlay: Path) -> bool:
    """Whether an overlay is the one that a record was written of, and only the name in it of the
    device that it stands on is no longer that one's."""
    if not way_to(image).is_block_device() or not os.path.lexists(overlay):
        return False
    if not is_noted_overlay(overlay, facts) or not is_same_file(facts.get("identity"), image):
        return False
    try:
        header = headers.read(overlay)
        below = headers.base_of(header) if header is not None else None
        there = None if below is None else below.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    if there is None or not stat.S_ISBLK(there.st_mode):
        return False
    return there.st_rdev != way_to(image).stat().st_rdev


def refuse_strange_overlay(image: Path, facts: dict[str, object], owner: int) -> None:
    """Raise `RefusedError` if a record names an overlay of which its owner has no say.

    Such a record would have a file of another user read, written into the image, and removed.
    """
    overlay = overlay_of(image, facts)
    if overlay is None:
        return
    wrong = None
    if facts.get("operation") == "write" and not is_temporary_of(image, overlay.name):
        wrong = "a file that is not imgtool's"
    try:
        status = overlay.lstat()
    except OSError:
        status = None  # there is nothing to be wrong about
    if status is not None and owner not in (0, os.geteuid(), status.st_uid):
        wrong = "a file of another user"
    elif status is not None and facts.get("operation") == "write":
        wrong = wrong if stat.S_ISREG(status.st_mode) else "what is not a file"
    if wrong is not None:
        raise RefusedError(
            f"the record of work on it names {wrong}: {printable(overlay)}",
            subject=printable(image),
            hint=f"look at it, then remove it: {printable(record_path(image))}",
        )


def is_noted_overlay(overlay: Path, facts: dict[str, object]) -> bool:
    """Whether a file is the overlay that a record was written of, whatever is in it by now."""
    noted = facts.get("noted")
    mark = noted.get("overlay") if isinstance(noted, dict) else None
    known = mark.get("identity") if isinstance(mark, dict) else facts.get("made")
    return is_same_file(known, overlay)


def refuse_another_file(
    image: Path, facts: dict[str, object], overlay: Path | None = None, *, force: Force = ()
) -> None:
    """Raise `RefusedError` if the record was written of another file that had the same name, or
    with another overlay."""
    same = is_same_file(facts.get("identity"), image)
    if not same and way_to(image).is_block_device():
        # Nothing tells the two apart but a name, and no device is a copy by itself.
        raise RefusedError(
            f"a {operation_of(facts)} was interrupted, of a device that had this name then; it may"
            " be another one, since neither has a serial number or the like that says which it is",
            subject=printable(image),
            hint=f"if it is another one, nothing is lost without the record: {to_keep(image)}",
        )
    if Reason.COPY in force:
        return
    what = None
    if not same:
        what = "of another file that had this name then"
    elif overlay is not None and os.path.lexists(overlay) and not is_noted_overlay(overlay, facts):
        what = f"with another file that had the name {printable(overlay)} then"
    if what is not None:
        shown = printable(image)
        raise RefusedError(
            f"a {operation_of(facts)} was interrupted, {what}",
            subject=shown,
            hint="if this is a copy of all as it was left:"
            f" imgtool recover {typed(image)} --force {Reason.COPY}; {to_keep(image)}",
        )


def _shown(name: object) -> str:
    """A name out of a record, fit to be shown whatever it is."""
    return printable(str(name))[:_LONGEST_SHOWN]


def to_keep(image: Path) -> str:
    """The part of a hint that says how work is ended without being finished or undone."""
    return f"to end it and keep all that is there: imgtool recover {typed(image)} --keep"


def would_do(image: Path, facts: dict[str, object]) -> str:
    """What `recover` does where a record says this, for a user who has to decide."""
    shown, operation = printable(image), facts.get("operation")
    overlay = _shown(overlay_of(image, facts) or facts.get("overlay"))
    if operation == "commit":
        end = f", and remove {overlay}" if facts.get("remove") else ""
        into = "" if facts.get("step") == "proved" else f"write what {overlay} holds into {shown}"
        return f"{into}{end}".removeprefix(", and ") or "change nothing"
    if operation == "write":
        if facts.get("step") in ("commit", "ready"):
            return f"write what {overlay} holds into {shown}, and remove {overlay}"
        return f"remove {overlay}"
    if operation == "revert":
        to, saved = (_shown(facts.get(name)) for name in ("to", "saved"))
        return f"make the snapshot '{to}' the present state of {shown}, or remove '{saved}'"
    if "temporary" in facts:
        return f"remove {_shown(facts['temporary'])}"
    return f"have QEMU repair the tables of {shown}"


def unproved_record(image: Path, facts: dict[str, object], owner: int) -> RefusedError:
    """The error for a record of which it cannot be known that this user's imgtool wrote it."""
    shown = printable(image)
    whose = "this user's imgtool did not write, or before its secret was lost"
    if owner != os.geteuid():
        whose = "another user wrote"
    return RefusedError(
        f"beside it lies a record of work that {whose}; it would {would_do(image, facts)}",
        subject=shown,
        hint=f"to have that done: imgtool recover {typed(image)} --force {Reason.UNPROVED};"
        f" {to_keep(image)}",
    )


def line_on(image: Path) -> str | None:
    """A line for whoever looks at an image beside which a record of work lies; None for the own
    work of this process, and where there is none."""
    written = load_intent(image)
    if written is None or not written.facts:
        return None
    shown = printable(image)
    worker = worker_on(image)
    if worker is not None:
        own = worker == os.getpid()
        return None if own else f"another imgtool, process {worker}, is at work on it ({shown})"
    if load_intent(image) != written:
        return line_on(image)  # it went on, or ended, just now
    if not written.believed or not written.proved:
        return (
            "beside it lies a record of work that this user's imgtool did not write, or before its"
            f" secret was lost; imgtool recover {typed(image)} says what it would do ({shown})"
        )
    return (
        f"a {operation_of(written.facts)} of it was interrupted: imgtool recover {typed(image)}"
        f" ({shown})"
    )


def refuse_other_format(image: Path, overlay: Path, format: str | None) -> None:
    """Raise `RefusedError` if an image is to be read in another format than the one in which it
    was being written to."""
    header = headers.read(overlay)
    _refuse_format(image, header.backing_format if header is not None else None, format)


def refuse_format_of_record(image: Path, format: str | None) -> None:
    """Raise `RefusedError` if an image is to be written to in another format than the one in which
    work on it was cut off."""
    written = load_intent(image)
    if written is not None and written.believed and written.proved:
        known = written.facts.get("format")
        if isinstance(known, str):
            _refuse_format(image, known, format)


def _refuse_format(image: Path, known: str | None, format: str | None) -> None:
    if format is not None and format != known:
        raise RefusedError(
            f"it was being written to as {known or 'an image of no named format'}, not as {format},"
            " when that was interrupted",
            subject=printable(image),
            hint=f"leave --format out; {to_keep(image)}",
        )


def unfinished_commit(image: Path) -> Path | None:
    """The overlay that has all of an image while a commit into the image is incomplete.

    Raises `ImageError` if that overlay is not there any more: then nothing has all of it; and
    `RefusedError` where it may not be read, or the record is not to be believed.
    """
    while (written := load_intent(image)) is not None:
        try:
            return _holding_all(image, written)
        except (ImageError, RefusedError):
            if load_intent(image) == written:  # it was not finished just now
                raise
    return None


def _holding_all(image: Path, written: Written) -> Path | None:
    facts = written.facts
    if not is_unfinished(image, facts):
        return None
    if not written.believed:
        raise not_believed(image)
    if not written.proved:
        raise unproved_record(image, facts, written.owner)
    if facts.get("step") is None and _is_untouched(image, facts):
        return None  # killed before its first byte
    refuse_strange_overlay(image, facts, written.owner)
    overlay = overlay_of(image, facts)
    if way_to(image).is_block_device():
        refuse_another_file(image, facts)
    if overlay is not None and has_another_name(image, facts, overlay):
        raise RefusedError(
            f"a {operation_of(facts)} to it was interrupted when it had another name, by which"
            f" {printable(overlay)} knows it still",
            subject=printable(image),
            hint=f"imgtool recover {typed(image)} finishes it",
        )
    try:
        if overlay is None or not stands_on(overlay, image):
            raise lost(image, facts)
    except PermissionError as error:
        raise RefusedError(
            "it holds a part of what another user wrote, and what holds all may not be read",
            subject=printable(image),
            hint="that user or root can finish it: imgtool recover",
        ) from error
    refuse_another_file(image, facts, overlay)
    return overlay


def lost(image: Path, facts: dict[str, object]) -> ImageError:
    """The error for an image of which nothing has all."""
    named = _shown(facts.get("overlay"))
    return ImageError(
        f"a {operation_of(facts)} into it was interrupted, so it holds a part of an overlay"
        f" that is not there any more, or no longer stands on it: {named}",
        subject=printable(image),
        hint=f"bring the overlay back; {to_keep(image)}",
    )


def stands_no_longer(base: Path, overlay: Path) -> RefusedError:
    """The error for a commit whose overlay is gone, or stands on another base by now."""
    return RefusedError(
        f"a commit of {printable(overlay)} was interrupted, which is not there any more or no"
        " longer stands on it",
        subject=printable(base),
        hint=f"bring that overlay back; {to_keep(base)}",
    )


def is_unfinished(image: Path, facts: dict[str, object]) -> bool:
    """Whether an image may hold a part of what an overlay has all of."""
    if facts.get("operation") == "commit":
        return facts.get("step") != "proved"
    return is_committed(image, facts) and facts.get("step") != "written"


def _is_untouched(image: Path, facts: dict[str, object]) -> bool:
    noted = facts.get("noted")
    return isinstance(noted, dict) and is_as_noted(noted.get("image"), image)


def may_be_torn(image: Path, facts: dict[str, object]) -> bool:
    """`is_unfinished`, also where the record that would know is not there."""
    try:
        return is_unfinished(image, facts)
    except RefusedError:
        return True


def is_committed(image: Path, facts: dict[str, object], *, proved: bool = True) -> bool:
    """Whether a write is to be kept: the record of the first of its images says so for all.

    That record goes last. Raises `RefusedError` where it should be there and is not, or where it
    should be `proved` as this one is, and is not.
    """
    if facts.get("operation") != "write":
        return False
    if facts.get("step") != "ready":
        return facts.get("step") in ("commit", "written")
    images = facts.get("images")
    first = images[0] if isinstance(images, list) and images else None
    if not is_name(first):
        return False
    folder = real_path(image).parent
    of_first = _record_of_first(image, folder / first, facts)
    if of_first is None or of_first.facts.get("id") != facts.get("id"):
        raise RefusedError(
            "a write to it was interrupted, and whether it was to be kept only the record of"
            f" {_shown(first)} knows, which is not there any more",
            subject=printable(image),
            hint=f"bring that disk and its record back; {to_keep(image)}",
        )
    if proved and not of_first.proved:
        raise unproved_record(folder / first, of_first.facts, of_first.owner)
    return of_first.facts.get("step") == "commit"


def _record_of_first(image: Path, first: Path, facts: dict[str, object]) -> Written | None:
    """The record of the first of the images that a write is to. Of devices that have exchanged
    their names it is not the one at the first one's name."""
    of_first = load_intent(first)
    if of_first is not None and of_first.facts.get("number", 0) == 0:
        return of_first
    for _, written in records_of_devices(image) if way_to(image).is_block_device() else ():
        if written.facts.get("id") == facts.get("id") and written.facts.get("number") == 0:
            return written
    return None
