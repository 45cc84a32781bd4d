"""Differences between two guests, a line each: for `diff`, and for what a write would change."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from imgtool.cli import render

if TYPE_CHECKING:
    from imgtool.compare.comparing import Opener
    from imgtool.compare.differences import Difference
    from imgtool.guest.model import Entry


def device_numbers(entry: Entry) -> str | None:
    """`MAJOR,MINOR` of a device node; None for all else."""
    if entry.type not in ("char", "block"):
        return None
    return f"{os.major(entry.rdev)},{os.minor(entry.rdev)}"


def _moments(before: Entry, after: Entry) -> tuple[str, str]:
    """Both times, as exactly as it takes to tell them apart."""
    one, other = (render.timestamp(entry.mtime_ns) for entry in (before, after))
    if one[:19] != other[:19]:
        return one[:19].replace("T", " "), other[:19].replace("T", " ")
    return one[:-1].replace("T", " "), other[:-1].replace("T", " ")


def _value(entry: Entry, field: str, human: bool) -> str:
    if field == "mode":
        return f"{stat.S_IMODE(entry.mode):04o}"
    if field == "size":
        return render.human(entry.size) if human else str(entry.size)
    if field == "target":
        return render.escape(entry.target or b"")
    if field == "rdev":
        return str(device_numbers(entry))
    return str(getattr(entry, field))


def _details(difference: Difference, human: bool) -> str:
    before, after = difference.before, difference.after
    if before is None or after is None:
        entry = difference.entry
        size = f" size {_value(entry, 'size', human)}" if entry.type == "file" else ""
        target = f" -> {render.escape(entry.target)}" if entry.target is not None else ""
        summed = f" {entry.checksum}" if entry.checksum else ""
        mode = _value(entry, "mode", human)
        return f"{mode} {entry.uid}:{entry.gid}{size}{summed}{target}"
    parts = []
    for field in difference.fields:
        if field == "content":
            parts.append(field)
            continue
        if field == "xattrs":
            names = {name for name, _ in set(before.xattrs or ()) ^ set(after.xattrs or ())}
            parts.append(f"xattrs {','.join(map(render.escape, sorted(names)))}")
            continue
        if field == "mtime":
            one, other = _moments(before, after)
        else:
            one, other = (_value(entry, field, human) for entry in (before, after))
        parts.append(f"{field} {one} -> {other}")
    return ", ".join(parts)


def line(difference: Difference, *, human: bool) -> str:
    """A difference as a table shows it."""
    return (
        f"{difference.change:<7}  {difference.entry.type:<9}  {render.escape(difference.path)}"
        f"  {_details(difference, human)}"
    )


def show(before: Opener, after: Opener, on_problem: Callable[[bytes, str], None]) -> None:
    """Print what differs between two guests that can be opened."""
    from imgtool.compare.comparing import compare_trees, open_pair

    with open_pair(before, after) as pair:
        found = compare_trees(
            pair, "/", checksum=None, everything=False, links=None,
            on_problem=(on_problem, on_problem),
        )  # fmt: skip
        for difference in found:
            print(line(difference, human=False))
