"""Disks that were cut into numbered files (NAME.001, NAME.002), as imagers and split(1) do."""

from __future__ import annotations

import contextlib
import re
import stat
from pathlib import Path

from imgtool.errors import ImageError
from imgtool.text import printable, typed

_NUMBERED = re.compile(r"(.*\.)(\d{3,4})", re.DOTALL)
_MOST_NAMED = 8


def parts_of(path: Path) -> list[Path]:
    """The files that may be one disk with this one, in their order; none where it is not one of
    several.

    They are numbered from 0 or 1 on; all but the last are equally long, and that is no longer.
    """
    named = _NUMBERED.fullmatch(path.name)
    if named is None:
        return []
    stem, width = named[1], len(named[2])
    found: list[Path] = []
    sizes: list[int] = []
    first = 0 if path.with_name(f"{stem}{0:0{width}}").exists() else 1
    with contextlib.suppress(OSError):
        while True:
            part = path.with_name(f"{stem}{first + len(found):0{width}}")
            status = part.stat()
            size = status.st_size
            if not stat.S_ISREG(status.st_mode) or not size:
                break
            if sizes and (size > sizes[0] or sizes[-1] != sizes[0]):
                break
            found.append(part)
            sizes.append(size)
    return found if len(found) > 1 and path in found else []


def is_a_part(path: Path, parts: list[Path]) -> ImageError:
    """The refusal to take one of these for a disk."""
    if len(parts) <= _MOST_NAMED:
        names = " ".join(map(typed, parts))
    else:
        named = _NUMBERED.fullmatch(path.name)
        assert named is not None
        names = typed(path.with_name(named[1])) + "[0-9]" * len(named[2])
    return ImageError(
        f"it is part {parts.index(path) + 1} of {len(parts)} of a disk that was split",
        subject=printable(path),
        hint=f"join them: cat {names} > NEW, then look at NEW",
    )
