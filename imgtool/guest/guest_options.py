"""How a guest is to be opened, as it is typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtool.guest.mounts import parse_mount


@dataclass(frozen=True)
class GuestOptions:
    """What says how a guest is read: further disks, the images' format, a snapshot, a layout of
    `DEV[:MOUNTPOINT[:OPTIONS[:FSTYPE]]]`, which operating system, keys, and folders of bases.
    """

    add: Sequence[Path] = ()
    format: str | None = None
    snapshot: str | None = None
    mounts: Sequence[str] = ()
    root: str | None = None
    keys: Sequence[str] = ()
    engine: str = "auto"
    backing_dirs: Sequence[Path] = ()

    def to_write(self) -> dict[str, Any]:
        """The keywords of `open_guest_to_write`; `UsageError` for a mount that is none."""
        return {
            "add": self.add,
            "format": self.format,
            "mounts": [parse_mount(text) for text in self.mounts],
            "root": self.root,
            "keys": self.keys,
            "backing_dirs": self.backing_dirs,
        }

    def to_read(self) -> dict[str, Any]:
        """The keywords of `open_guest`; `UsageError` for a mount that is none."""
        return {**self.to_write(), "snapshot": self.snapshot, "engine": self.engine}
