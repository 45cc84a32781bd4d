"""What keeps a command from ruining an image, a chain or another's work: one place for all."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from imgtool.errors import Force, HostError, ImageError, Reason, RefusedError, join_names
from imgtool.formats.qcow2_bitmaps import Bitmap
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.holdings import bitmaps_in
from imgtool.image.chain.info import ImageInfo
from imgtool.image.chain.writable import refuse_unmended, refuse_unwritable, refuse_without_key
from imgtool.image.change.recovery import pending_below
from imgtool.image.checks.dependants import refuse_if_base
from imgtool.image.checks.doubts import refuse_doubtful, refuse_elsewhere
from imgtool.image.intent.intent_log import is_ours
from imgtool.image.intent.intent_state import unfinished_commit
from imgtool.image.locking.locks import refuse_if_in_use
from imgtool.text import printable, typed


def refuse_if_not_writable(path: Path) -> None:
    """Raise `HostError` if this user may not write to the file, `RefusedError` if nobody should.

    Root may write to any file; that its owner took away the right to write says what he wants.
    """
    shown = printable(path)
    if not path.stat().st_mode & 0o222:
        raise RefusedError(
            "its file is read-only, for everybody",
            subject=shown,
            hint=f"if it was protected and is to be changed all the same: chmod u+w {typed(path)}",
        )
    if not os.access(path, os.W_OK):
        raise HostError(
            "this user may not write to it", subject=shown, hint="run imgtool as its owner"
        )


def refuse_several_names(image: Path) -> None:
    """Raise `RefusedError` for a file with hard links, which is to be written to: by its other
    names it would be read, and written to, as if there were no record of that."""
    status = image.stat()
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise RefusedError(
            f"its file has {status.st_nlink} names (hard links), and would change under all",
            subject=printable(image),
            hint=f"make it a file of its own: cp -p {typed(image)} NEW, then mv NEW {typed(image)}",
        )


def refuse_to_replace(chain: Chain, *, force: Force = ()) -> None:
    """Raise unless another file can take the place of the active image's without harm.

    `RefusedError` if it, or something below it, is in use, if it is no plain file, or has several
    names, or would change its owner, or is doubtful; `force` overrides the last three, and devices.
    """
    path = chain.active.path
    refuse_if_in_use(chain, force=force)
    refuse_if_unfinished(chain)
    refuse_if_not_writable(path)
    status = path.stat()
    if chain.active.driver != "file":
        raise ImageError("a block device cannot be replaced by a file", subject=printable(path))
    if status.st_nlink > 1 and Reason.HARD_LINKS not in force:
        raise RefusedError(
            f"its file has {status.st_nlink} names (hard links): the others would keep the old one",
            subject=printable(path),
            hint="remove the other names first",
            reason=Reason.HARD_LINKS,
        )
    groups = (os.getegid(), *os.getgroups())
    kept = status.st_uid == os.geteuid() and status.st_gid in groups
    if os.geteuid() != 0 and not kept and Reason.OWNER not in force:
        raise RefusedError(
            "the new file could not be given to the owner of the old one",
            subject=printable(path),
            hint="run imgtool as its owner or as root",
            reason=Reason.OWNER,
        )
    refuse_doubtful(chain, force=force)


def refuse_if_unfinished(chain: Chain) -> None:
    """Raise `RefusedError` for an overlay of which a commit into its base was interrupted.

    What of it is in the base already would show through, or be nowhere, if it were changed.
    """
    overlay = chain.active.path
    base = pending_below(overlay, [link.path.parent for link in chain.links[1:2]])
    if base is not None:
        raise RefusedError(
            f"a commit of it into {printable(base)} was interrupted",
            subject=printable(overlay),
            hint=f"finish it first: imgtool recover {typed(overlay)}",
        )


def refuse_if_interrupted(image: Path) -> None:
    """Raise `RefusedError` for an image that holds a part of what was being written to it."""
    if unfinished_commit(image) is not None:
        raise RefusedError(
            "work on it was interrupted",
            subject=printable(image),
            hint=f"finish or undo it first: imgtool recover {typed(image)}",
        )


def refuse_encrypted(*chains: Chain) -> None:
    """Raise `ImageError` for a chain of which QEMU would need a key."""
    for link in (link for chain in chains for link in chain.links):
        if link.encrypted:
            raise ImageError(
                "it is encrypted by QEMU; imgtool cannot give QEMU the key to work on it",
                subject=printable(link.path),
                hint="qemu-img can, with --object secret and --image-opts",
            )


def refuse_second_file(*links: ImageInfo) -> None:
    """Raise `ImageError` for images of which the data, or a part of it, are in another file."""
    for link in links:
        if len(link.files) > 1:
            raise ImageError(
                f"its data are in another file: {printable(link.files[1])}",
                subject=printable(link.path),
                hint="imgtool convert makes an image in one file of it",
            )


def refuse_to_write(
    chain: Chain,
    backing_dirs: Sequence[str | Path] = (),
    *,
    force: Force = (),
    but_for: Path | None = None,
    repair: bool = False,
) -> None:
    """Raise unless the active image can be written to without harm.

    `RefusedError` if it, or something below it, is in use, or if an image other than `but_for`
    stands on it, or if it is doubtful, which `force` overrides, or if it is of a format that is not
    written in place, or not mended, for a `repair`, or if QEMU would need a key; `HostError` if
    this user may not.
    """
    refuse_if_in_use(chain, force=force)
    if repair:
        refuse_unmended(chain.active)
    else:
        refuse_without_key(chain.links)
        refuse_unwritable(chain.active)
    refuse_if_unfinished(chain)
    refuse_if_base(chain, backing_dirs, but_for=but_for, force=force)
    refuse_if_not_writable(chain.active.path)
    refuse_doubtful(chain, force=force)


def refuse_if_too_little_space(folder: Path, needed: int, *, force: Force = ()) -> None:
    """Raise `RefusedError` if the file system of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free and Reason.SPACE not in force:
        raise RefusedError(
            f"too little space: up to {needed} bytes are needed, {free} are free",
            subject=printable(folder),
            hint="make room",
            reason=Reason.SPACE,
        )


def need_space(folder: Path, needed: int) -> None:
    """Raise `HostError` if the file system of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HostError(
            f"the host has no room for what is written: up to {needed} bytes, {free} are free",
            subject=printable(folder),
            hint="make room, then repeat the command",
        )


def refuse_snapshots(chain: Chain, what: str, *, force: Force = ()) -> None:
    """Raise `RefusedError` if the active image has internal snapshots, which `what` would ruin."""
    if chain.active.snapshots and Reason.SNAPSHOTS not in force:
        names = join_names(printable(snapshot.name) for snapshot in chain.active.snapshots)
        raise RefusedError(
            f"{what} would lose its internal snapshots: {names}",
            subject=printable(chain.active.path),
            hint="delete them first with 'imgtool snapshot delete'",
            reason=Reason.SNAPSHOTS,
        )


def refuse_bitmaps(
    image: Path,
    bitmaps: Sequence[Bitmap],
    what: str,
    *,
    force: Force = (),
    reason: Reason | None = None,
) -> None:
    """Raise `RefusedError` if there are such dirty bitmaps in an image; `what` says what happens
    to them."""
    if not bitmaps or (reason is not None and reason in force):
        return
    names = [printable(bitmap.name.decode(errors="replace")) for bitmap in bitmaps]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    each = "" if len(names) == 1 else ", for each of them"
    name = shlex.quote(names[0]) if len(names) == 1 else "NAME"
    spoilt = all(bitmap.in_use for bitmap in bitmaps)
    cost = "they hold no more" if spoilt else "the next backup is a full one then"
    raise RefusedError(
        f"{what}: {', '.join(names[:5])}{more}",
        subject=printable(image),
        hint=f"qemu-img bitmap --remove {typed(image)} {name}{each}; {cost}",
        reason=reason,
    )


def refuse_to_resize(link: ImageInfo) -> None:
    """Raise `RefusedError` for a qcow2 image of which QEMU does not change the size."""
    if link.compat == "0.10" and link.snapshots:
        raise RefusedError(
            "QEMU does not resize an image of version 0.10 that has snapshots",
            subject=printable(link.path),
            hint="delete its snapshots first: imgtool snapshot delete",
        )
    spoilt = [bitmap for bitmap in bitmaps_in(link) if bitmap.in_use]
    what = "QEMU does not resize an image with dirty bitmaps of which the writer was killed"
    refuse_bitmaps(link.path, spoilt, what)


def refuse_existing(path: Path) -> None:
    """Raise `RefusedError` if there is something at the path of a new image, or if its name is one
    that imgtool gives to files of its own."""
    if is_ours(path.name):
        raise RefusedError(
            "a name that imgtool gives to what it removes itself",
            subject=printable(path),
            hint="choose another name",
        )
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
    refuse_elsewhere(chain)
    for link in chain.links:
        if link.data_file is not None and not link.data_file.startswith("/"):
            raise RefusedError(
                "its data are in another file, which it names by a relative name: QEMU would take"
                " that from the current folder",
                subject=printable(link.path),
                hint=f"make an image in one file of it: imgtool convert {typed(link.path)} NEW",
            )
    for overlay, base in itertools.pairwise(chain.links):
        if overlay.backing_format is None:
            raise RefusedError(
                "it does not say which format its base has: QEMU would guess, which a guest with a"
                " raw disk can forge",
                subject=printable(overlay.path),
                hint=f"write it down, {base.format} if that is what it is: imgtool overlay rebase"
                f" --unsafe --base-format {base.format} {typed(overlay.path)} {typed(base.path)}",
            )
