"""Overlays: made on a base, committed into it, put on another one, or made to stand alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgtool.errors import ImageError, RefusedError
from imgtool.image.chain import Chain, open_chain
from imgtool.image.dependants import overlays_on, refuse_if_base
from imgtool.image.guards import (
    refuse_existing,
    refuse_if_not_writable,
    refuse_if_too_little_space,
    refuse_snapshots,
    refuse_to_write,
)
from imgtool.image.info import ImageInfo, probe
from imgtool.image.locks import refuse_if_in_use
from imgtool.image.places import Places, printable
from imgtool.image.record import temporary_path
from imgtool.image.work import Plan, Work, put_in_place, replace

Dirs = Sequence[str | Path]


def backing_name(base: Path, overlay: Path) -> str:
    """How an overlay names its base: relative where the one's folder is in the other's.

    So a folder of images can be moved as a whole.
    """
    folder, real = overlay.absolute().parent.resolve(), base.resolve()
    if real.is_relative_to(folder) or folder.is_relative_to(real.parent):
        name = os.path.relpath(real, folder)
        # QEMU takes what stands before a colon for a protocol.
        return f"./{name}" if ":" in name.partition("/")[0] else name
    return str(base.absolute())


def _size_of(chain: Chain) -> int:
    """What a copy of a chain's content can take, in bytes, as far as its links tell."""
    return min(sum(link.actual_size for link in chain.links), chain.active.virtual_size) + (1 << 20)


def plan_create(
    base: Path,
    new: Path,
    *,
    base_format: str | None = None,
    protect_base: bool = False,
    backing_dirs: Dirs = (),
) -> Plan:
    """A linked clone: a new overlay on `base`, which must not be written to from then on.

    Raises `RefusedError` where `new` is there already or the base is being written.
    """
    chain = open_chain(base, format=base_format, backing_dirs=backing_dirs)
    refuse_existing(new)
    refuse_if_in_use(chain)
    name, temporary = backing_name(base, new), temporary_path(new)
    format = chain.active.format
    lines = [f"create {printable(new)} on {printable(name)} ({format})"]
    if protect_base:
        lines.append(f"make {printable(base)} read-only")

    def do(work: Work) -> None:
        words = ["create", "-q", "-f", "qcow2", "-F", format, "-b", name, str(temporary)]
        work.qemu_img("create", [*words], new)
        if protect_base:
            base.chmod(stat.S_IMODE(base.stat().st_mode) & ~0o222)
        put_in_place(temporary, new)

    return Plan("create", new.absolute(), tuple(lines), do, facts={"temporary": str(temporary)})


def _overlay(path: Path, backing_dirs: Dirs) -> Chain:
    chain = open_chain(path, backing_dirs=backing_dirs)
    if len(chain.links) < 2:
        raise ImageError(
            "it is no overlay: it stands on no other image",
            subject=printable(path),
            hint="'imgtool chain tree' shows what stands on what",
        )
    return chain


def plan_commit(
    overlay: Path, *, remove: bool = False, force: bool = False, backing_dirs: Dirs = ()
) -> Plan:
    """Write what an overlay holds into its base; the overlay stays until that is proved.

    Raises `RefusedError` if other overlays stand on the base, which would be ruined, or if the
    overlay has internal snapshots, which would be too; `force` overrides both.
    """
    chain = _overlay(overlay, backing_dirs)
    base = Chain(chain.links[1:])
    refuse_if_in_use(chain)
    refuse_to_write(base, backing_dirs, force=force, but_for=overlay)
    refuse_snapshots(chain, "to commit it", force=force)
    above = overlays_on(overlay, backing_dirs)
    if remove and above:
        raise RefusedError(
            f"it is itself the base of {printable(above[0])}, so it cannot be removed",
            subject=printable(overlay),
            hint="commit it without --remove",
        )
    space = min(chain.active.actual_size, chain.active.virtual_size)
    refuse_if_too_little_space(base.active.path.resolve().parent, space, force=force)
    into = printable(base.active.path)
    lines = [f"write up to {space} bytes of {printable(overlay)} into {into}"]
    if chain.active.virtual_size > base.active.virtual_size:
        lines.append(f"make {into} grow to {chain.active.virtual_size} bytes")
    lines.append("prove that both have the same content")
    if remove:
        lines.append(f"remove {printable(overlay)}")

    def do(work: Work) -> None:
        work.qemu_img("commit", ["commit", "-q", "-d", chain.filename(read_only=False)], overlay)
        what = "the base does not have the content of the overlay"
        work.prove_same(chain.filename(), base.filename(), what, base.active.path)
        os.utime(overlay)  # its base is newer now, and still fits
        if remove:
            overlay.unlink()

    return Plan(
        "commit",
        base.active.path,
        tuple(lines),
        do,
        space=space,
        facts={"overlay": str(overlay.absolute())},
        repeatable=True,
    )


def _described(overlay: ImageInfo, below: Chain) -> str:
    """An overlay's own clusters over a base of our choice."""
    return Chain((overlay, *below.links)).filename()


def plan_rebase(
    overlay: Path,
    base: Path,
    *,
    base_format: str | None = None,
    unsafe: bool = False,
    force: bool = False,
    backing_dirs: Dirs = (),
) -> Plan:
    """Put an overlay on another base: what differs is copied into it, so its content stays.

    `unsafe` only writes another name and format into it, for a base that was moved or whose format
    is missing. Raises `RefusedError` if the new base stands on the overlay, or, where content could
    change, if the overlay is a base itself or has internal snapshots.
    """
    below = open_chain(base, format=base_format, backing_dirs=backing_dirs)
    if any(link.path.samefile(overlay) for link in below.links):
        raise RefusedError(
            "the new base stands on the overlay itself: the chain would be a loop",
            subject=printable(base),
        )
    name, format = backing_name(base, overlay), below.active.format
    words: list[str | Path] = ["rebase", "-q", "-f", "qcow2", "-F", format, "-b", name, overlay]
    if unsafe:
        return _plan_unsafe(overlay, below, words, name, force=force, backing_dirs=backing_dirs)
    chain = _overlay(overlay, backing_dirs)
    refuse_if_in_use(chain)
    refuse_if_in_use(below)
    refuse_if_not_writable(overlay)
    refuse_snapshots(chain, "to rebase it", force=force)
    if not chain.safe_by_name:
        raise RefusedError(
            "QEMU would have to guess the format of its base to read it",
            subject=printable(overlay),
            hint="write it down first: imgtool overlay rebase --unsafe --base-format"
            f" {chain.links[1].format} {printable(overlay)} {printable(chain.links[1].path)}",
        )
    space = _size_of(Chain(chain.links[1:]))
    refuse_if_too_little_space(overlay.resolve().parent, space, force=force)
    lines = (
        f"copy what differs between {printable(chain.links[1].path)} and {printable(base)}"
        f" into {printable(overlay)} (up to {space} bytes)",
        f"put it on {printable(name)} ({format})",
        "prove that its content is the same as before",
    )

    def do(work: Work) -> None:
        work.qemu_img("rebase", words, overlay)
        now = probe(overlay, backing_dirs=backing_dirs)
        before = _described(now, Chain(chain.links[1:]))
        what = "the overlay has another content on its new base"
        work.prove_same(before, _described(now, below), what, overlay)

    return Plan("rebase", overlay.absolute(), lines, do, space=space)


def _plan_unsafe(
    overlay: Path, below: Chain, words: list[Any], name: str, *, force: bool, backing_dirs: Dirs
) -> Plan:
    places = Places.around(overlay.absolute(), backing_dirs)
    link = probe(overlay, places=places)
    if link.format != "qcow2":
        raise ImageError(f"it is no qcow2 overlay but {link.format}", subject=printable(overlay))
    alone = Chain((link,))
    refuse_if_in_use(alone)
    refuse_if_not_writable(overlay)
    if not force:
        refuse_if_base(alone, backing_dirs)
    if link.virtual_size < below.active.virtual_size and not force:
        raise RefusedError(
            f"the new base is larger ({below.active.virtual_size} bytes) than the overlay"
            f" ({link.virtual_size}): it can hardly be the one that it was made on",
            subject=printable(below.active.path),
            hint="rebase without --unsafe to keep the content, or add --force if you know better",
        )
    lines = (
        f"write {printable(name)} ({below.active.format}) into {printable(overlay)} as its base;"
        " what a guest sees in it changes if that is not the same content",
    )

    def do(work: Work) -> None:
        work.qemu_img("rebase", [words[0], "-u", *words[1:]], overlay)

    return Plan("rebase", overlay.absolute(), lines, do)


def plan_flatten(overlay: Path, *, force: bool = False, backing_dirs: Dirs = ()) -> Plan:
    """Make an overlay stand alone: everything below is pulled up into a new file, which takes its
    place once it is proved to have the same content."""
    chain = _overlay(overlay, backing_dirs)
    refuse_if_in_use(chain)
    refuse_if_not_writable(overlay)
    refuse_snapshots(chain, "to flatten it", force=force)
    space = _size_of(chain)
    refuse_if_too_little_space(overlay.resolve().parent, space, force=force)
    temporary = temporary_path(overlay)
    lines = (
        f"copy all {len(chain.links)} links into a new file (up to {space} bytes)",
        "prove that it has the same content",
        f"put it in the place of {printable(overlay)}",
    )

    def do(work: Work) -> None:
        convert(work, "flatten", chain, temporary)
        alone = open_chain(temporary, format="qcow2").filename()
        what = "the new file does not have the same content"
        work.prove_same(chain.filename(), alone, what, overlay)
        replace(temporary, overlay)

    return Plan(
        "flatten",
        overlay.absolute(),
        lines,
        do,
        space=space,
        facts={"temporary": str(temporary)},
    )


def convert(work: Work, name: str, chain: Chain, new: Path, *options: str) -> None:
    """Copy a chain's content into a new qcow2 file like its active image; a step of `work`."""
    active = chain.active
    words: list[str | Path] = ["convert", "-q", "-O", "qcow2", *options]
    if active.format == "qcow2":
        words += ["-o", f"compat={active.compat},cluster_size={active.cluster_size}"]
    work.qemu_img(name, [*words, chain.filename(), new], active.path)
