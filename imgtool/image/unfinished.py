"""What a record means for whoever reads its image: whether the image is whole, or what is.

A commit that was cut off leaves a part of an overlay in the image. Until it is finished the image
is read through that overlay, which has all of it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from imgtool.errors import ImageError, Reason, RefusedError
from imgtool.image import headers
from imgtool.image.places import printable
from imgtool.image.record import (
    Written,
    identity_of,
    is_temporary_of,
    not_believed,
    record_path,
    written_down,
)


def stands_on(overlay: Path, base: Path) -> bool:
    """Whether the header of an overlay names this base. Raises `PermissionError`."""
    try:
        header = headers.read(overlay)
        below = headers.base_of(header) if header is not None else None
        return below is not None and below.samefile(base)
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def overlay_of(image: Path, facts: dict[str, Any]) -> Path | None:
    """The overlay that a record of work on an image names; None where it names none.

    A name that is not absolute starts in the image's folder, which can be moved as a whole.
    """
    name = facts.get("overlay")
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    return image.resolve().parent / name


def refuse_strange_overlay(image: Path, facts: dict[str, Any], owner: int) -> None:
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


def refuse_another_file(image: Path, facts: dict[str, Any]) -> None:
    """Raise `RefusedError` if the record was written of another file that had the same name."""
    noted = facts.get("identity")
    if noted is not None and noted != identity_of(image):
        shown = printable(image)
        raise RefusedError(
            f"a {facts.get('operation')} was interrupted, of another file that had this name then",
            subject=shown,
            hint="if this one is a copy of it as it was left:"
            f" imgtool recover {shown} --force {Reason.COPY}; to take it as it is, remove"
            f" {printable(record_path(image))}",
        )


def unfinished_commit(image: Path) -> Path | None:
    """The overlay that has all of an image while a commit into the image is incomplete.

    Raises `ImageError` if that overlay is not there any more: then nothing has all of it; and
    `RefusedError` where it may not be read, or the record is not to be believed.
    """
    while (written := written_down(image)) is not None:
        try:
            return _holding_all(image, written)
        except (ImageError, RefusedError):
            if written_down(image) == written:  # it was not finished just now
                raise
    return None


def _holding_all(image: Path, written: Written) -> Path | None:
    facts = written.facts
    if not is_unfinished(image, facts):
        return None
    if not written.believed:
        raise not_believed(image)
    refuse_strange_overlay(image, facts, written.owner)
    overlay = overlay_of(image, facts)
    try:
        if overlay is None or not stands_on(overlay, image):
            raise lost(image, facts)
    except PermissionError as error:
        raise RefusedError(
            "it holds a part of what another user wrote, and what holds all may not be read",
            subject=printable(image),
            hint="that user or root can finish it: imgtool recover",
        ) from error
    refuse_another_file(image, facts)
    return overlay


def lost(image: Path, facts: dict[str, Any]) -> ImageError:
    """The error for an image of which nothing has all."""
    named = printable(str(facts.get("overlay")))
    return ImageError(
        f"a {facts.get('operation')} into it was interrupted, so it holds a part of an overlay"
        f" that is not there any more, or no longer stands on it: {named}",
        subject=printable(image),
        hint="bring the overlay back; or, to take the image as it is, remove"
        f" {printable(record_path(image))}",
    )


def is_unfinished(image: Path, facts: dict[str, Any]) -> bool:
    """Whether an image may hold a part of what an overlay has all of."""
    if facts.get("operation") == "commit":
        return facts.get("step") != "proved"
    return is_committed(image, facts) and facts.get("step") != "written"


def is_committed(image: Path, facts: dict[str, Any]) -> bool:
    """Whether a write is to be kept: the record of the first of its images says so for all.

    That record goes last. Raises `RefusedError` where it should be there and is not.
    """
    if facts.get("operation") != "write":
        return False
    if facts.get("step") != "ready":
        return facts.get("step") in ("commit", "written")
    images = facts.get("images")
    first = images[0] if isinstance(images, list) and images else None
    if not isinstance(first, str) or "\0" in first:
        return False
    folder = image.resolve().parent
    of_first = written_down(folder / first)
    if of_first is None or of_first.facts.get("id") != facts.get("id"):
        raise RefusedError(
            "a write to it was interrupted, and whether it was to be kept only the record of"
            f" {printable(first)} knows, which is not there any more",
            subject=printable(image),
            hint="bring that disk and its record back; or, to take this one as it is, remove"
            f" {printable(record_path(image))}",
        )
    return of_first.facts.get("step") == "commit"
