"""What it takes to make one guest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How to make the image files of one guest.

    `prepare` makes, in its work folder, `NAME.raw` for each `NAME.raw` or `NAME.qcow2` in `files`
    (or the qcow2 itself), and the `helpers`: raw disks that only the making needs. Where there is
    a `fill`, it gets a launched handle and the devices of `files` then `helpers`, and leaves
    nothing mounted; one launch serves all guests. `finish` works on the raw disks afterwards.
    `needs` are guests whose files lie in the work folder too, under their own names.
    """

    name: str
    files: tuple[str, ...]
    prepare: Callable[[Path], None]
    fill: Callable[[Any, Sequence[str], Path], None] | None = None
    finish: Callable[[Path], None] | None = None
    helpers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def disks(self, work: Path) -> list[Path]:
        """The raw disks that the appliance gets."""
        return [work / f"{Path(file).stem}.raw" for file in self.files] + [
            work / helper for helper in self.helpers
        ]
