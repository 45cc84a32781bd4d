"""What keeps a command from ruining an image, a chain or another's work: one place for all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from imgtool.errors import HostError, RefusedError
from imgtool.image.chain import Chain
from imgtool.image.dependants import refuse_if_base
from imgtool.image.locks import refuse_if_in_use
from imgtool.image.places import printable


def refuse_if_not_writable(path: Path) -> None:
    """Raise `HostError` if this user may not write to the file."""
    if not os.access(path, os.W_OK):
        raise HostError(
            "this user may not write to it",
            subject=printable(path),
            hint=f"run imgtool as its owner; or, if it was protected: chmod u+w {printable(path)}",
        )


def refuse_to_write(
    chain: Chain,
    backing_dirs: Sequence[str | Path] = (),
    *,
    force: bool = False,
    but_for: Path | None = None,
) -> None:
    """Raise unless the active image can be written to without harm.

    `RefusedError` if it, or something below it, is in use, or if an image other than `but_for`
    stands on it, which `force` overrides; `HostError` if this user may not.
    """
    refuse_if_in_use(chain)
    if not force:
        refuse_if_base(chain, backing_dirs, but_for=but_for)
    refuse_if_not_writable(chain.active.path)


def refuse_if_too_little_space(folder: Path, needed: int, *, force: bool = False) -> None:
    """Raise `RefusedError` if the file system of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free and not force:
        raise RefusedError(
            f"too little space: up to {needed} bytes are needed, {free} are free",
            subject=printable(folder),
            hint="make room, or add --force if you know that it needs less",
        )


def refuse_snapshots(chain: Chain, what: str, *, force: bool = False) -> None:
    """Raise `RefusedError` if the active image has internal snapshots, which `what` would ruin."""
    if chain.active.snapshots and not force:
        names = ", ".join(printable(snapshot.name) for snapshot in chain.active.snapshots[:5])
        raise RefusedError(
            f"{what} would lose its internal snapshots: {names}",
            subject=printable(chain.active.path),
            hint="delete them first with 'imgtool snapshot delete', or add --force",
        )


def refuse_existing(path: Path) -> None:
    """Raise `RefusedError` if there is something at the path of a new image."""
    if os.path.lexists(path):
        raise RefusedError(
            "it exists already",
            subject=printable(path),
            hint="choose another name, or remove it first",
        )
    if not path.absolute().parent.is_dir():
        raise HostError("no such folder", subject=printable(path.absolute().parent))


def refuse_to_guess(chain: Chain) -> None:
    """Raise `RefusedError` for a chain that QEMU could not open for writing by the names in it."""
    if not chain.safe_by_name:
        raise RefusedError(
            "QEMU would have to guess a format, or open a file by a relative name, to write this",
            subject=printable(chain.active.path),
            hint="write the format of its base into it: imgtool overlay rebase --unsafe",
        )
