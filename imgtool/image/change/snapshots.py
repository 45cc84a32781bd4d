"""Internal snapshots of a qcow2 image: made, gone back to, deleted."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from imgtool.errors import Force, ImageError, NotInGuestError, Reason, RefusedError, UsageError
from imgtool.formats import qcow2
from imgtool.formats.qcow2_refcounts import used_ranges
from imgtool.formats.qcow2_snapshots import read_snapshots, same_as_active
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.holdings import Holdings, bitmaps_in
from imgtool.image.chain.info import ImageInfo, Snapshot
from imgtool.image.change.changes import marks
from imgtool.image.change.guards import (
    refuse_bitmaps,
    refuse_encrypted,
    refuse_second_file,
    refuse_several_names,
    refuse_to_write,
)
from imgtool.image.change.mending import on_snapshots, try_on_snapshots
from imgtool.image.change.plan import Plan, Seen, Work
from imgtool.image.intent.marks import snapshots_of
from imgtool.image.locking.host_file import open_host_file
from imgtool.text import printable

Dirs = Sequence[str | Path]
_LONGEST_NAME = 255  # bytes, what QEMU keeps of a name


def with_snapshots(path: Path, *, format: str | None = None, backing_dirs: Dirs = ()) -> Chain:
    """The chain of an image that can have internal snapshots; `ImageError` if it cannot."""
    chain = open_chain(path, format=format, backing_dirs=backing_dirs)
    if chain.active.format != "qcow2":
        raise ImageError(
            f"a {chain.active.format} image cannot have internal snapshots",
            subject=printable(path),
            hint="'imgtool overlay create' makes an overlay on it, 'imgtool convert' a qcow2",
        )
    refuse_encrypted(chain)
    refuse_second_file(chain.active)
    return chain


def present_in(chain: Chain) -> Snapshot | None:
    """The internal snapshot that holds the present state, made of the same clusters; or None."""
    path = chain.active.path
    with open_host_file(path) as file:
        header = qcow2.read_header(file)
        rows = read_snapshots(file, header) if header else None
        for row in rows or ():
            if header and same_as_active(file, header, row):
                return chain.snapshot(row.id.decode(errors="replace"))
    return None


def _check_name(chain: Chain, name: str) -> None:
    if not name or len(name.encode()) > _LONGEST_NAME or "\0" in name:
        raise UsageError(
            f"a name of a snapshot has 1 to {_LONGEST_NAME} bytes", subject=printable(name)
        )
    if any(name in (snapshot.name, snapshot.id) for snapshot in chain.active.snapshots):
        raise RefusedError(
            f"it has a snapshot '{printable(name)}' already",
            subject=printable(chain.active.path),
            hint="choose another name, or delete that one first",
        )


def _refuse_single_references(chain: Chain) -> None:
    """Raise `ImageError` for an image that counts to one: a snapshot shares its clusters."""
    with open_host_file(chain.active.path) as file:
        header = qcow2.read_header(file)
    if header is not None and header.refcount_bits == 1:
        raise ImageError(
            "it was made to have no internal snapshots (refcount_bits=1)",
            subject=printable(chain.active.path),
            hint="make an overlay on it: imgtool overlay create; or another image of it: imgtool"
            " convert",
        )


def _plan_on_list(
    operation: str,
    path: Path,
    lines: tuple[str, ...],
    option: str,
    name: str,
    after: Callable[[Holdings], Holdings],
    backing_dirs: Dirs,
    image: ImageInfo,
) -> Plan:
    """A plan for the list of snapshots alone: a guest sees the same afterwards."""

    def do(work: Work) -> None:
        with work.step(operation.removeprefix("snapshot ")):
            on_snapshots(path, option, name)

    return Plan(
        operation,
        path.absolute(),
        lines,
        do,
        "qcow2",
        seen=Seen.of(path),
        in_place=(image,),
        writes_to=(path,),
        same_in=path,
        backing_dirs=backing_dirs,
        after=after,
        rehearsal=lambda node: try_on_snapshots(node, path, option, name),
    )


def plan_create(
    path: Path,
    name: str,
    *,
    format: str | None = None,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Keep the present state under a name."""
    chain = with_snapshots(path, format=format, backing_dirs=backing_dirs)
    _refuse_single_references(chain)
    # What stands on it sees no change.
    refuse_to_write(chain, backing_dirs, force={*force, Reason.IS_BASE})
    refuse_several_names(path)
    _check_name(chain, name)

    return _plan_on_list(
        "snapshot create",
        path,
        (f"keep the present state of {printable(path)} as '{printable(name)}'",),
        "-c",
        name,
        lambda holdings: holdings.with_snapshot(name),
        backing_dirs,
        chain.active,
    )


def plan_delete(
    path: Path,
    name: str,
    *,
    format: str | None = None,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Forget an internal snapshot. The file does not shrink; its space is used again."""
    chain = with_snapshots(path, format=format, backing_dirs=backing_dirs)
    refuse_to_write(chain, backing_dirs, force={*force, Reason.IS_BASE})
    refuse_several_names(path)
    snapshot = chain.snapshot(name)
    known_as = _for_delete(chain, snapshot)

    return _plan_on_list(
        "snapshot delete",
        path,
        (
            f"delete the snapshot '{printable(snapshot.name)}' of {printable(path)};"
            " the file does not shrink",
        ),
        "-d",
        known_as,
        lambda holdings: holdings.without_snapshot(snapshot.id),
        backing_dirs,
        chain.active,
    )


def plan_revert(
    path: Path,
    name: str,
    *,
    format: str | None = None,
    discard: bool = False,
    save_as: str | None = None,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Go back to an internal snapshot.

    Raises `RefusedError` where the present state is in no snapshot and would be lost, unless
    `discard`, or `save_as` keeps it under a name first; where overlays stand on the image; and
    where it has dirty bitmaps, with which QEMU does not do it.
    """
    if discard and save_as is not None:
        raise UsageError("--discard and --save-as contradict each other")
    chain = with_snapshots(path, format=format, backing_dirs=backing_dirs)
    refuse_to_write(chain, backing_dirs, force=force)
    refuse_several_names(path)
    snapshot = chain.snapshot(name)
    what = "QEMU does not revert an image that has dirty bitmaps of a backup program"
    refuse_bitmaps(path, bitmaps_in(chain.active), what)
    if save_as is not None:
        _check_name(chain, save_as)
    elif not discard and present_in(chain) is None:
        raise RefusedError(
            "the present state is in no snapshot and would be lost",
            subject=printable(path),
            hint="keep it with --save-as NAME, or give it up with --discard",
        )
    # Until the revert is complete the present state is kept in any case: it can be undone.
    saved = save_as or f"imgtool-before-revert-{secrets.token_hex(4)}"
    lines = [f"make '{printable(snapshot.name)}' the present state of {printable(path)}"]
    if save_as is not None:
        lines.insert(0, f"keep the present state as '{printable(save_as)}'")
    argument = _for_revert(snapshot)

    def do(work: Work) -> None:
        with work.step("save"):
            on_snapshots(path, "-c", saved)
        work.record.note(step="apply", noted=marks(path))
        with work.step("revert"):
            on_snapshots(path, "-a", argument)
        work.record.note(step="applied", noted=marks(path))
        if save_as is None:
            with work.step("tidy up"):
                on_snapshots(path, "-d", saved)

    def after(holdings: Holdings) -> Holdings:
        reverted = holdings.after_revert(snapshot.id)
        return reverted if save_as is None else reverted.with_snapshot(save_as)

    def rehearsal(node: dict[str, object]) -> None:
        try_on_snapshots(node, path, "-c", saved)
        try_on_snapshots(node, path, "-a", argument)
        if save_as is None:
            try_on_snapshots(node, path, "-d", saved)

    return Plan(
        "revert",
        path.absolute(),
        tuple(lines),
        do,
        "qcow2",
        facts={
            "to": argument,
            "saved": saved,
            "temporary": save_as is None,
            "others": snapshots_of(path),
        },
        seen=Seen.of(path),
        in_place=(chain.active,),
        writes_to=(path,),
        after=after,
        rehearsal=rehearsal,
    )


def _for_revert(snapshot: Snapshot) -> str:
    """How qemu-img is told to go back to this very snapshot: it looks for ids first, then names."""
    return snapshot.id


def _for_delete(chain: Chain, snapshot: Snapshot) -> str:
    """How qemu-img is told to delete this very snapshot: it looks for names alone."""
    same = [other for other in chain.active.snapshots if other.name == snapshot.name]
    if same[0] is not snapshot:
        raise NotInGuestError(
            f"several snapshots are called '{printable(snapshot.name)}', and QEMU deletes the"
            f" first of them, with id {same[0].id}",
            subject=printable(chain.active.path),
            hint=f"delete {same[0].id} first",
        )
    return snapshot.name


def space_to_give_back(path: Path) -> int:
    """How many bytes of an image's file hold nothing: about what `compact` gives back."""
    with open_host_file(path) as file:
        header = qcow2.read_header(file)
        if header is None:
            return 0
        used = sum(length for _, length in used_ranges(file, header))
    return max(path.stat().st_blocks * 512 - used, 0)
