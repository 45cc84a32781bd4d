"""Where a chain may go: the folders in which the files that a header names are followed.

A header is written by whoever wrote the image, a guest included. Followed blindly, it makes any
file that this host can read part of the guest's disk.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import ImageError, RefusedError

LIBVIRT_POOL = Path("/var/lib/libvirt/images")
BACKING_DIRS_VARIABLE = "IMGTOOL_BACKING_DIRS"


def printable(name: str | Path) -> str:
    """A name out of a header, on one line and unable to steer a terminal."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in str(name)
    )


def typed(path: Path) -> str:
    """A path in a command that somebody may type as it stands: one word."""
    return shlex.quote(printable(path))


def in_same_tree(path: Path, folder: Path) -> bool:
    """Whether a folder, which may be moved as a whole, holds or is beside what is at `path`."""
    return path.is_relative_to(folder) or folder.is_relative_to(path.parent)


def name_from(folder: Path, path: Path) -> str:
    """How what is in a folder names the file at `path`, neither with symlinks: relative where both
    may be moved as a whole."""
    return os.path.relpath(path, folder) if in_same_tree(path, folder) else str(path)


def protocol_of(name: str) -> str | None:
    """The protocol of a file name, by QEMU's rule: what stands before a colon before any slash."""
    head, colon, _ = name.partition("/")[0].partition(":")
    return head if colon else None


@dataclass(frozen=True)
class Places:
    """The folders, symlinks resolved, in which (or below which) named files are followed."""

    folders: tuple[Path, ...]

    @classmethod
    def around(cls, image: Path, backing_dirs: Sequence[str | Path] = ()) -> Places:
        """The image's own folder, libvirt's pool, `backing_dirs` and IMGTOOL_BACKING_DIRS."""
        # A symlinked image has two own folders; both were chosen by the user, not by the header.
        folders = [image.absolute().parent, image.resolve().parent, LIBVIRT_POOL]
        folders += [Path(folder) for folder in backing_dirs]
        named = os.environ.get(BACKING_DIRS_VARIABLE, "")
        folders += [Path(folder) for folder in named.split(":") if folder]
        return cls(tuple(dict.fromkeys(folder.resolve() for folder in folders)))

    def hold(self, real: Path) -> bool:
        """Whether a path without symlinks is in one of the folders, or below."""
        return any(real.is_relative_to(folder) for folder in self.folders)

    def follow(self, name: str, *, of: Path, role: str) -> Path:
        """The absolute path of the file that the header of `of` names as its `role`.

        Relative names start in the folder of `of`. Nothing is opened. Raises `RefusedError` for a
        name that leaves the allowed folders or is not a plain file name.
        """
        shown = printable(name)
        protocol = protocol_of(name)
        if protocol == "file":
            name = name.removeprefix("file:")
        elif protocol is not None:
            what = "a json: pseudo-name" if protocol == "json" else f"protocol '{protocol}'"
            raise RefusedError(
                f"its {role} '{shown}' is not a local file but {printable(what)}",
                subject=printable(of),
                hint="rebase it on a local file first, if you trust it",
            )
        if not name or "\0" in name:
            raise ImageError(f"its {role} has no usable name: '{shown}'", subject=printable(of))
        path = of.absolute().parent / name
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks
            raise ImageError(
                f"its {role} '{shown}' leads nowhere", subject=printable(of)
            ) from error
        if not self.hold(real):
            raise RefusedError(
                f"its {role} '{shown}' is outside the folders that a chain may use",
                subject=printable(of),
                hint=f"if you trust the image: --backing-dir {printable(real.parent)}"
                " (a raw image whose guest wrote this header: --format raw)",
            )
        return path
