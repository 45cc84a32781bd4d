"""Repair of an image's tables by QEMU, without losing what the image holds besides its content.

`qemu-img check -r` opens a qcow2 image without its table of snapshots. Where it has to write the
header when it opens it (for a dirty bitmap that is valid, for flags that it does not know), it
writes that there are none, and then frees their clusters (QEMU 2.12 to 10). A QEMU that merely
opens an image that is marked as dirty makes the same repair with all tables read. So a repair is
rehearsed first, over the image, on a throw-away file, and done in the way that loses nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from imgtool.errors import HostError, ImageError, ImgtoolError, RefusedError
from imgtool.host.process import Limits, ProgramFailed, run
from imgtool.host.scratch import large_files, scratch_folder
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.holdings import Holdings, ReadAt, holdings_of, lost, read_holdings
from imgtool.image.chain.info import ImageInfo, probe
from imgtool.image.checks.checking import CHECK_MEMORY, CheckResult, check_metadata, check_node
from imgtool.image.locking.held import descriptors
from imgtool.image.locking.host_file import file_node, node_driver, open_host_file
from imgtool.image.qemu.disk_reader import open_contents
from imgtool.image.qemu.qemu_img import qemu_img
from imgtool.text import printable, typed

What = Literal["leaks", "all"]
# A repair of the image that is described by these nodes: that of the image, and that of its file.
_Way = Callable[[dict[str, Any], dict[str, Any]], None]

_FEATURES_AT, _DIRTY, _CORRUPT = 79, 1 << 0, 1 << 1  # of the header; the lowest byte of them
# What a repair may need beyond the end of the file: new refcounts of all of it.
_GROWS_BY, _GROWS_BY_PART = 64 << 20, 32


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
            missing = _rehearse(link, way, before)
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
        raise _no_room() from error


def _no_room() -> HostError:
    return HostError(
        "there is no room to try the repair out before it is made",
        subject=large_files() or tempfile.gettempdir(),
        hint="make room there, or name another folder: TMPDIR=FOLDER",
    )


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


def _ways(link: ImageInfo, what: What, found: CheckResult) -> list[_Way]:
    def by_check(node: dict[str, Any], file: dict[str, Any]) -> None:
        run(_check(node, what), limits=_LIMITS, ok=_COMPLETED, pass_fds=descriptors())

    ways: list[_Way] = [by_check]
    # What an opened image gets is always the repair of all.
    if link.compat != "0.10" and (what == "all" or found.sound):
        ways.append(_by_opening)
    return ways


_LIMITS = Limits(memory=CHECK_MEMORY)  # no limit of time: a repair is never stopped halfway
# Of a check: nothing is wrong any more, damage is left, or lost space. One that was not completed
# may not have come to what loses something yet.
_COMPLETED = (0, 2, 3)


def _check(node: dict[str, Any], what: What) -> list[str]:
    return ["qemu-img", "check", "-r", what, "json:" + json.dumps(node)]


def _by_opening(node: dict[str, Any], file: dict[str, Any]) -> None:
    """Mark the image as dirty, and have it opened.

    One that is marked as corrupt is not opened. If it ends here, whoever opens it next repairs it.
    """
    raw = "json:" + json.dumps({"driver": "raw", "file": file})
    shown = run(["qemu-io", "-r", "-c", f"read -v {_FEATURES_AT} 1", raw], limits=_LIMITS)
    features = int(shown.stdout.split(b":", 1)[1].split()[0], 16)
    value = features & ~_CORRUPT | _DIRTY
    held = descriptors()
    mark = f"write -P {value} {_FEATURES_AT} 1"
    run(["qemu-io", "-c", mark, raw], limits=_LIMITS, pass_fds=held)
    run(["qemu-io", "-c", "length", "json:" + json.dumps(node)], limits=_LIMITS, pass_fds=held)


def _rehearse(link: ImageInfo, way: _Way, before: Holdings) -> list[str]:
    """What of the image would be lost, tried on throw-away files over its own.

    Raises `ProgramFailed` where QEMU does not come to an end with it.
    """
    with scratch_folder("repair", large_files()) as folder:
        over = _over(link.path, link.driver, folder / "image")
        file = over.blockdev(read_only=False)
        data = None
        if link.data_path is not None:
            driver = node_driver(link.data_path)
            data = _over(link.data_path, driver, folder / "data").blockdev(read_only=False)
        node = check_node(link, file, data)
        way(node, file)
        with open_contents(over) as (read, size):
            now = read_holdings(cast(BinaryIO, ReadAt(read, size)))
        return lost(before, now)


def _over(path: Path, driver: str, new: Path) -> Chain:
    """A throw-away overlay on a file as it is, whatever format that holds."""
    with open_host_file(path) as file:
        size, status = file.seek(0, os.SEEK_END), os.fstat(file.fileno())
    grown = size + (_GROWS_BY + size // _GROWS_BY_PART if driver == "file" else 0)
    grown = -(-grown // 512) * 512
    words: list[str | Path] = ["create", "-f", "qcow2", new, str(grown)]
    try:
        qemu_img(words, image=new)
    except HostError as error:  # its room is that of the folder, not that of the image
        raise _no_room() from error
    above = probe(new, format="qcow2")
    below = ImageInfo(
        path=path,
        format="raw",
        virtual_size=size,
        actual_size=size,
        driver=driver,
        inodes=((path, (status.st_dev, status.st_ino)),),
    )
    return Chain((replace(above, backing=str(path), backing_format="raw"), below))
