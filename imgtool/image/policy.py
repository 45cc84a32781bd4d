"""Where a chain may go: the folders in which the files that a header names are followed.

A header is written by whoever wrote the image, a guest included. Followed blindly, it makes any
file that this host can read part of the guest's disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import ImageError, RefusedError, join_names
from imgtool.formats.protocols import protocol_of
from imgtool.image.locking.held import real_path
from imgtool.text import printable, typed

LIBVIRT_POOL = Path("/var/lib/libvirt/images")
BACKING_DIRS_VARIABLE = "IMGTOOL_BACKING_DIRS"
_BASE = "backing file"
_MOST_LINKS = 40  # that Linux follows


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:
        return False


def folders_of(path: Path) -> tuple[Path, ...]:
    """The folder of every name by which a file is reached: its own, and those of the links that
    lead from `path` to it. Other links to it, and hard links, are not known."""
    names = [path.absolute()]
    while names[-1].is_symlink() and len(names) < _MOST_LINKS:
        names.append(names[-1].parent / names[-1].readlink())
    return tuple(dict.fromkeys(name.parent.resolve() for name in (*names, path.resolve())))


def in_same_tree(path: Path, folder: Path) -> bool:
    """Whether a folder, which may be moved as a whole, holds or is beside what is at `path`."""
    return path.is_relative_to(folder) or folder.is_relative_to(path.parent)


def name_from(folder: Path, path: Path) -> str:
    """How what is in a folder names the file at `path`, neither with symlinks: relative where both
    may be moved as a whole."""
    return os.path.relpath(path, folder) if in_same_tree(path, folder) else str(path)


def name_beside(image: Path, path: Path) -> str:
    """How a record of work on an image names the file at `path`; neither is a symlink. A device has
    names in several folders, and for it no name is relative."""
    return str(path) if image.is_block_device() else name_from(image.parent, path)


@dataclass(frozen=True)
class AllowedDirs:
    """The folders, symlinks resolved, in which (or below which) named files are followed; in those
    `searched` a base is looked for by its file name too, where it is not at its place."""

    folders: tuple[Path, ...]
    searched: tuple[Path, ...] = ()

    @classmethod
    def around(cls, image: Path, backing_dirs: Sequence[str | Path] = ()) -> AllowedDirs:
        """The image's own folder, libvirt's pool, `backing_dirs` and IMGTOOL_BACKING_DIRS."""
        # A symlinked image has two own folders; both were chosen by the user, not by the header.
        folders = [image.absolute().parent, real_path(image).parent, LIBVIRT_POOL]
        given = [Path(folder) for folder in backing_dirs]
        named = os.environ.get(BACKING_DIRS_VARIABLE, "")
        given += [Path(folder) for folder in named.split(":") if folder]
        allowed = dict.fromkeys(folder.resolve() for folder in (*folders, *given))
        return cls(tuple(allowed), tuple(dict.fromkeys(folder.resolve() for folder in given)))

    def hold(self, real: Path) -> bool:
        """Whether a path without symlinks is in one of the folders, or below."""
        return any(real.is_relative_to(folder) for folder in self.folders)

    def follow(self, name: str, *, of: Path, role: str) -> Path:
        """The absolute path of the file that the header of `of` names as its `role`.

        Relative names start in the folder of `of` (`_named_path`). Nothing is opened. Raises
        `RefusedError` for a name that leaves the allowed folders or is not a plain file name.
        """
        shown = printable(name)
        path = _named_path(name, of, role)
        try:
            real = path.resolve()
            if _is_link(real):  # so far Python 3.13 gets in a circle of links
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        except (OSError, RuntimeError) as error:  # RuntimeError: as before, in older ones
            raise ImageError(
                f"its {role} '{shown}' leads nowhere", subject=printable(of)
            ) from error
        if not self.hold(real):
            folder = typed(real.parent) if _there(real) else "FOLDER, the one that it is in now"
            raise RefusedError(
                f"its {role} '{shown}' is outside the folders that a chain may use",
                subject=printable(of),
                hint=f"if you trust the image: --backing-dir {folder}"
                " (a raw image whose guest wrote this header: --format raw)",
            )
        return path

    def find_base(self, name: str, *, of: Path) -> tuple[Path, str | None]:
        """`follow` for a backing file, and a line for the user where that is not at its place but
        was found by its file name in one of the folders `searched`.

        Raises `RefusedError` where several of them have one.
        """
        path = _named_path(name, of, _BASE)
        if not self.searched or _there(path):
            return self.follow(name, of=of, role=_BASE), None
        found: list[Path] = []
        for folder in self.searched:
            other = folder / path.name
            if path.name and _there(other) and not any(other.samefile(one) for one in found):
                found.append(other)
        if not found:
            return self.follow(name, of=of, role=_BASE), None
        if len(found) > 1:
            raise RefusedError(
                f"its backing file '{printable(name)}' is not there, and of that name are several:"
                f" {join_names(printable(one) for one in found)}",
                subject=printable(of),
                hint="give one alone: "
                + " or ".join(f"--backing-dir {typed(one.parent)}" for one in found),
            )
        if not self.hold(found[0].resolve()):
            raise RefusedError(
                f"{printable(found[0])} leads out of the folders that a chain may use",
                subject=printable(of),
                hint=f"if you trust it: --backing-dir {typed(found[0].resolve().parent)}",
            )
        line = (
            f"its backing file '{printable(name)}' is not there: {printable(found[0])} is used, by"
            f" its name ({printable(of)})"
        )
        return found[0], line


def _there(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _named_path(name: str, of: Path, role: str) -> Path:
    """The path that the header of `of` names as its `role`.

    A relative name starts where the file itself is; only if there is nothing, in the folder of a
    link by which it was reached. QEMU, which is given the link, looks there alone: so where both
    are there, and are not the same file, it is for the user to say which. Raises `RefusedError`.
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
            hint="if you trust it, copy what it names into this folder, and write the name of"
            f" that: imgtool overlay rebase --unsafe {typed(of)} COPY",
        )
    if not name or "\0" in name:
        raise ImageError(f"its {role} has no usable name: '{shown}'", subject=printable(of))
    path, by_link = real_path(of).parent / name, of.absolute().parent / name
    if path == by_link or not _there(by_link):
        return path
    if not _there(path):
        return by_link
    if not path.samefile(by_link):
        raise RefusedError(
            f"its {role} '{shown}' is one file beside the link and another beside the image itself",
            subject=printable(of),
            hint=f"for the latter, give the image by its own name: {typed(of.resolve())}",
        )
    return path
