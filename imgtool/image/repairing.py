"""Repair of an image's tables by QEMU, without losing what the image holds besides its content.

`qemu-img check -r` opens a qcow2 image without its table of snapshots. Where it has to write the
header when it opens it (for a dirty bitmap that is valid, for flags that it does not know), it
writes that there are none, and then frees their clusters (QEMU 2.12 to 10). A QEMU that merely
opens an image that is marked as dirty makes the same repair with all tables read. So a repair is
rehearsed first, over the image, on a throw-away file, and done in the way that loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from imgtool.errors import ImgtoolError, RefusedError
from imgtool.image.chain import Chain
from imgtool.image.checking import CHECK_MEMORY, CheckResult, check_metadata, check_node
from imgtool.image.contents import open_contents
from imgtool.image.held import descriptors
from imgtool.image.holdings import Holdings, ReadAt, holdings_of, lost, read_holdings
from imgtool.image.host_file import file_node, node_driver, open_host_file
from imgtool.image.info import ImageInfo, probe
from imgtool.image.places import printable, typed
from imgtool.image.qemu_img import qemu_img
from imgtool.process import Limits, ProgramFailed, run
from imgtool.scratch import large_files, scratch_folder

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

    Raises `WouldLose` where that would lose snapshots, bitmaps or names of other files.
    """
    before = holdings_of(link.path, link.format)
    if before is None or not before.more_than_content:
        return check_metadata(link, repair=what)
    found = check_metadata(link)
    if found.sound and not found.leaks and not link.dirty and not link.corrupt:
        return found
    if before.snapshots is None or before.bitmaps is None:
        raise _would_lose(link, what, "its table of snapshots or of bitmaps cannot be read", found)
    said: list[str] = []
    for way in _ways(link, what, found):
        missing = _rehearse(link, way, before)
        if missing:
            said += missing
            continue
        file = file_node(link.path, link.driver)
        way(check_node(link, file), file)
        now = holdings_of(link.path, link.format)
        if gone := lost(before, now):
            raise ImgtoolError(
                f"the repair lost what it held: {'; '.join(gone)}",
                subject=printable(link.path),
                hint="please report this",
            )
        return check_metadata(link)
    raise _would_lose(link, what, "; ".join(dict.fromkeys(said)), found)


def _would_lose(link: ImageInfo, what: What, lost: str, found: CheckResult) -> WouldLose:
    shown, word = printable(link.path), typed(link.path)
    hint = f"on a copy of the file, which then lacks that: qemu-img check -r {what} COPY"
    if what == "leaks" and not found.sound and link.compat != "0.10":
        hint = f"to mend all that is wrong loses nothing: imgtool check --repair all {word}"
    return WouldLose(
        f"QEMU's repair would lose what the image holds: {lost}", subject=shown, hint=hint
    )


def _ways(link: ImageInfo, what: What, found: CheckResult) -> list[_Way]:
    def by_check(node: dict[str, Any], file: dict[str, Any]) -> None:
        run(_check(node, what), limits=_LIMITS, ok=(0, 1, 2, 3), pass_fds=descriptors())

    ways: list[_Way] = [by_check]
    # What an opened image gets is always the repair of all.
    if link.compat != "0.10" and (what == "all" or found.sound):
        ways.append(_by_opening)
    return ways


_LIMITS = Limits(memory=CHECK_MEMORY)  # no limit of time: a repair is never stopped halfway


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
    """What of the image would be lost, tried on throw-away files over its own."""
    with scratch_folder("repair", large_files()) as folder:
        over = _over(link.path, link.driver, folder / "image")
        file = over.blockdev(read_only=False)
        data = None
        if link.data_path is not None:
            driver = node_driver(link.data_path)
            data = _over(link.data_path, driver, folder / "data").blockdev(read_only=False)
        node = check_node(link, file, data)
        try:
            way(node, file)
        except ProgramFailed:
            return ["QEMU cannot make the repair"]
        with open_contents(over) as (read, size):
            now = read_holdings(cast(BinaryIO, ReadAt(read, size)))
        return lost(before, now)


def _over(path: Path, driver: str, new: Path) -> Chain:
    """A throw-away overlay on a file as it is, whatever format that holds."""
    with open_host_file(path) as file:
        size = file.seek(0, 2)
    grown = size + (_GROWS_BY + size // _GROWS_BY_PART if driver == "file" else 0)
    grown = -(-grown // 512) * 512
    words: list[str | Path] = ["create", "-f", "qcow2", new, str(grown)]
    qemu_img(words, image=new)
    above = probe(new, format="qcow2")
    below = ImageInfo(path=path, format="raw", virtual_size=size, actual_size=size, driver=driver)
    return Chain((replace(above, backing=str(path), backing_format="raw"), below))
