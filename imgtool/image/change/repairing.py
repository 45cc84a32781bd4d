"""Repair of an image's tables by QEMU, without losing what the image holds besides its content.

`qemu-img check -r` opens a qcow2 image without its table of snapshots. Where it has to write the
header when it opens it (for a dirty bitmap that is valid, for flags that it does not know), it
writes that there are none, and then frees their clusters (QEMU 2.12 to 10). A QEMU that merely
opens an image that is marked as dirty makes the same repair with all tables read. So a repair is
rehearsed first, over the image, on a throw-away file, and done in the way that loses nothing.
"""

from __future__ import annotations

from typing import Literal

from imgtool.errors import ImageError, ImgtoolError, RefusedError
from imgtool.host.process import Limits, ProgramFailed, run
from imgtool.image.chain.holdings import holdings_of, lost
from imgtool.image.chain.info import ImageInfo
from imgtool.image.change.rehearsing import Way, json_name, no_room, rehearse
from imgtool.image.checks.checking import CHECK_MEMORY, CheckResult, check_metadata, check_node
from imgtool.image.locking.held import descriptors
from imgtool.image.locking.host_file import file_node
from imgtool.text import printable, typed

What = Literal["leaks", "all"]
_FEATURES_AT, _DIRTY, _CORRUPT = 79, 1 << 0, 1 << 1  # of the header; the lowest byte of them


class WouldLose(RefusedError):
    """The repair would lose what the image holds; nothing was done."""


def repair_tables(link: ImageInfo, what: What) -> CheckResult:
    """Have QEMU mend the tables of an image; what was found before, or what is wrong still.

    Raises `WouldLose` where that would lose snapshots, bitmaps or names of other files,
    `ImageError` where QEMU cannot do it, and `HostError` where there is no room to try it out.
    """
    before = holdings_of(link.path, link.format)
    if before is None or not before.more_than_content:
        try:
            return check_metadata(link, repair=what)
        except ImageError:
            _refuse_if_more(link, what, check_metadata(link))
            raise
    found = check_metadata(link)
    if found.sound and not found.leaks and not link.dirty and not link.corrupt:
        return found
    if before.snapshots is None or before.bitmaps is None:
        raise _would_lose(link, what, "its table of snapshots or of bitmaps cannot be read", found)
    said: list[str] = []
    for way in _ways(link, what, found):
        try:
            missing = rehearse(link, way, before)
        except ProgramFailed as error:
            _refuse_if_full(error)
            continue
        if missing:
            said += missing
            continue
        file = file_node(link.path, link.driver)
        try:
            way(check_node(link, file), file)
        except ProgramFailed as error:
            raise _not_completed(link, "the repair of its tables was not completed") from error
        now = holdings_of(link.path, link.format)
        if gone := lost(before, now):
            raise ImgtoolError(
                f"the repair lost what it held: {'; '.join(gone)}",
                subject=printable(link.path),
                hint="please report this",
            )
        return check_metadata(link)
    if said:
        raise _would_lose(link, what, "; ".join(dict.fromkeys(said)), found)
    _refuse_if_more(link, what, found)
    raise _not_completed(link, "QEMU cannot repair its tables; nothing was changed")


def _refuse_if_more(link: ImageInfo, what: What, found: CheckResult) -> None:
    """For what QEMU could not do: it frees no lost space where its counts are wrong themselves."""
    if what == "leaks" and not found.sound:
        raise ImageError(
            "more is wrong with its tables than lost space; nothing was changed",
            subject=printable(link.path),
            hint=f"to mend all that is wrong: imgtool check --repair all {typed(link.path)}",
        )


def _refuse_if_full(error: ProgramFailed) -> None:
    """What could not be tried for want of room says nothing of the image."""
    if "No space left" in error.stderr:
        raise no_room() from error


def _not_completed(link: ImageInfo, what: str) -> ImageError:
    return ImageError(what, subject=printable(link.path), hint="imgtool chain check says more")


def _would_lose(link: ImageInfo, what: What, lost: str, found: CheckResult) -> WouldLose:
    more_helps = what == "leaks" and not found.sound and link.compat != "0.10"
    word = typed(link.path)
    return WouldLose(
        f"QEMU's repair would lose what the image holds: {lost}",
        subject=printable(link.path),
        hint=f"to mend all that is wrong loses nothing: imgtool check --repair all {word}"
        if more_helps
        else f"in a copy, which then lacks it: cp {word} COPY, then qemu-img check -r {what} COPY",
    )


def _ways(link: ImageInfo, what: What, found: CheckResult) -> list[Way]:
    def by_check(node: dict[str, object], file: dict[str, object]) -> None:
        run(_check(node, what), limits=_LIMITS, ok=_COMPLETED, pass_fds=descriptors())

    ways: list[Way] = [by_check]
    # What an opened image gets is always the repair of all.
    if link.compat != "0.10" and (what == "all" or found.sound):
        ways.append(_by_opening)
    return ways


_LIMITS = Limits(memory=CHECK_MEMORY)  # no limit of time: a repair is never stopped halfway
# Of a check: nothing is wrong any more, damage is left, or lost space. One that was not completed
# may not have come to what loses something yet.
_COMPLETED = (0, 2, 3)


def _check(node: dict[str, object], what: What) -> list[str]:
    return ["qemu-img", "check", "-r", what, json_name(node)]


def _by_opening(node: dict[str, object], file: dict[str, object]) -> None:
    """Mark the image as dirty, and have it opened.

    One that is marked as corrupt is not opened. If it ends here, whoever opens it next repairs it.
    """
    raw = json_name({"driver": "raw", "file": file})
    shown = run(["qemu-io", "-r", "-c", f"read -v {_FEATURES_AT} 1", raw], limits=_LIMITS)
    features = int(shown.stdout.split(b":", 1)[1].split()[0], 16)
    value = features & ~_CORRUPT | _DIRTY
    held = descriptors()
    mark = f"write -P {value} {_FEATURES_AT} 1"
    run(["qemu-io", "-c", mark, raw], limits=_LIMITS, pass_fds=held)
    run(["qemu-io", "-c", "length", json_name(node)], limits=_LIMITS, pass_fds=held)
