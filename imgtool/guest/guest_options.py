"""How a guest is to be opened: each option is spelled here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from imgtool.errors import UsageError

if TYPE_CHECKING:
    from imgtool.guest.keys import Key
    from imgtool.guest.model import Mount


class GuestKeywords(TypedDict):
    """The fields of `GuestOptions`, as what opens a guest takes them by name."""

    add: Sequence[str | Path]
    format: str | None
    snapshot: str | None
    mounts: Sequence[Mount | str]
    root: str | None
    keys: Sequence[Key | str]
    engine: str
    backing_dirs: Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class GuestOptions:
    """What says how a guest is read.

    `add` are further disks; `format` is that of all images, None to probe each; `snapshot` shows
    the disks as they were at that internal one. `mounts` is a layout in the place of the one that
    would be looked for, `root` says which operating system, `keys` open what is encrypted: mounts
    and keys are values, or text as it is typed. `engine` is `direct`, `libguestfs`, or `auto`:
    directly if the guest allows it, otherwise through the appliance. `backing_dirs` are further
    folders that backing files may be in.
    """

    add: Sequence[str | Path] = ()
    format: str | None = None
    snapshot: str | None = None
    mounts: Sequence[Mount | str] = ()
    root: str | None = None
    keys: Sequence[Key | str] = ()
    engine: str = "auto"
    backing_dirs: Sequence[str | Path] = ()

    def keywords(self) -> GuestKeywords:
        """These options alone, whatever a class below adds: what opens a guest takes them so."""
        return {
            "add": self.add,
            "format": self.format,
            "snapshot": self.snapshot,
            "mounts": self.mounts,
            "root": self.root,
            "keys": self.keys,
            "engine": self.engine,
            "backing_dirs": self.backing_dirs,
        }

    def parsed_mounts(self) -> list[Mount]:
        """The layout that is asked for; `UsageError` for a mount that is none."""
        from imgtool.guest.mounts import parse_mount

        return [parse_mount(one) if isinstance(one, str) else one for one in self.mounts]

    def parsed_keys(self) -> list[Key]:
        """The keys, read from their files; errors as `parse_key` raises them."""
        from imgtool.guest.keys import parse_key

        return [parse_key(one) if isinstance(one, str) else one for one in self.keys]

    def refuse_direct(self) -> None:
        """Raise `UsageError` where a guest that is to be changed is to be so by the direct engine
        alone."""
        if self.engine == "direct":
            raise UsageError(
                "the direct engine does not write",
                subject="--engine direct",
                hint="leave --engine out: what is only read is read directly where that can be",
            )
