"""Overlays: made on a base, committed into it, put on another one, or made to stand alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from imgtool.errors import Force, HostError, ImageError, ImgtoolError, Reason, RefusedError
from imgtool.formats.qcow2_bitmaps import Bitmap
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.holdings import bitmaps_in, left_out
from imgtool.image.chain.info import ImageInfo, probe
from imgtool.image.chain.reading import base_lock, block_readers
from imgtool.image.chain.steady import refuse_by_name, steady
from imgtool.image.change.changes import is_intact, noted_mark
from imgtool.image.change.copies import convert, options_like, size_of_copy
from imgtool.image.change.guards import (
    refuse_bitmaps,
    refuse_encrypted,
    refuse_existing,
    refuse_if_interrupted,
    refuse_if_not_writable,
    refuse_if_too_little_space,
    refuse_if_unfinished,
    refuse_second_file,
    refuse_several_names,
    refuse_snapshots,
    refuse_to_guess,
    refuse_to_replace,
    refuse_to_resize,
    refuse_to_write,
)
from imgtool.image.change.plan import Plan, Seen, Work, sync_file
from imgtool.image.change.recovery import finish_commit, pending_below
from imgtool.image.checks.ages import change_time
from imgtool.image.checks.dependants import overlays_on, refuse_if_base
from imgtool.image.checks.doubts import doubts_of, refuse_doubtful
from imgtool.image.headers import is_newer
from imgtool.image.intent.intent_log import temporary_path
from imgtool.image.intent.marks import mark_of
from imgtool.image.locking.held import real_path, way_to
from imgtool.image.locking.host_file import qemu_name
from imgtool.image.locking.locks import block_writers, refuse_if_in_use
from imgtool.image.policy import AllowedDirs, in_same_tree, name_beside
from imgtool.image.qemu.qemu_img import same_content
from imgtool.text import printable, typed

Dirs = Sequence[str | Path]


def backing_name(base: Path, overlay: Path) -> str:
    """How an overlay names its base: relative where the one's folder is in the other's.

    So a folder of images can be moved as a whole.
    """
    folder, real = overlay.resolve().parent, base.resolve()
    if in_same_tree(real, folder):
        name = os.path.relpath(real, folder)
        # QEMU takes what stands before a colon for a protocol.
        return f"./{name}" if ":" in name.partition("/")[0] else name
    # A link may lead elsewhere one day, and QEMU looks beside it for what its file stands on; a
    # device is meant by the name that it was given by.
    return str(real if base.is_symlink() and not base.is_block_device() else base.absolute())


def _open_base(base: Path, format: str | None, backing_dirs: Dirs) -> Chain:
    """The chain of what an overlay is to stand on, whose format has an option of its own."""
    try:
        return open_chain(base, format=format, backing_dirs=backing_dirs)
    except ImgtoolError as error:
        error.rename_option("--format", "--base-format")
        raise


def plan_create(
    base: Path,
    new: Path,
    *,
    base_format: str | None = None,
    protect_base: bool = False,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """A linked clone: a new overlay on `base`, which must not be written to from then on.

    Raises `RefusedError` where `new` is there already or the base is being written.
    """
    refuse_if_interrupted(base)  # else what holds all of it would be taken for it
    chain = _open_base(base, base_format, backing_dirs)
    refuse_existing(new)
    refuse_to_guess(chain)
    refuse_encrypted(chain)
    refuse_if_in_use(chain, read_only=True, force=force)
    name, temporary = backing_name(base, new), temporary_path(new)
    format, size = chain.active.format, chain.active.virtual_size
    lines = [f"create {printable(new)} on {printable(name)} ({format})"]
    if protect_base:
        lines.append(f"make {printable(base)} read-only")
        _refuse_to_protect(base)

    def do(work: Work) -> None:
        with base_lock(chain):
            work.reserve(temporary)
            # The chain was looked at: QEMU need not open it to know its size.
            words = ["create", "-u", "-f", "qcow2", "-F", format, "-b", name, str(temporary)]
            work.qemu_img("create", [*words, str(size)], new, made=temporary)
            with chain.open_file(chain.active.path) as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if protect_base:
                    os.fchmod(file.fileno(), mode & ~0o222)
                try:
                    work.place(temporary, new)
                except BaseException:
                    if protect_base:
                        os.fchmod(file.fileno(), mode)
                    raise

    return Plan(
        "create",
        new.absolute(),
        tuple(lines),
        do,
        facts={"temporary": str(temporary)},
        seen=Seen.of(*chain.files),
        doubts=doubts_of(chain),
    )


def _refuse_to_protect(base: Path) -> None:
    if not base.is_file():
        raise RefusedError(
            "only a file can be made read-only for good",
            subject=printable(base),
            hint=f"a device is read-only until the next start by: blockdev --setro {typed(base)}",
        )
    if os.geteuid() not in (0, base.stat().st_uid):
        raise HostError("only its owner can make it read-only", subject=printable(base))


def _overlay(path: Path, format: str | None, backing_dirs: Dirs) -> Chain:
    chain = open_chain(path, format=format, backing_dirs=backing_dirs)
    if len(chain.links) < 2:
        raise ImageError(
            "it is no overlay: it stands on no other image",
            subject=printable(path),
            hint="what stands on what is shown by: imgtool chain tree"
            f" {typed(path.absolute().parent)}",
        )
    if chain.active.format != "qcow2":
        # What replaces it would be a qcow2 by its name, and whoever finishes takes it for one.
        raise ImageError(
            f"it is no qcow2 overlay but {chain.active.format}",
            subject=printable(path),
            hint="'imgtool convert' makes one qcow2 image of it and what it stands on",
        )
    return chain


def plan_commit(
    overlay: Path,
    *,
    format: str | None = None,
    remove: bool = False,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Write what an overlay holds into its base; the overlay stays until that is proved.

    Raises `RefusedError` if other overlays stand on the base, which would be ruined, or if the
    overlay has internal snapshots, which would be too; `force` overrides both.
    """
    chain = _overlay(overlay, format, backing_dirs)
    base = Chain(chain.links[1:])
    into = base.active.path
    refuse_encrypted(chain)
    refuse_second_file(*chain.links[:2])
    refuse_if_in_use(chain, force=force)
    # What is to be finished has written to the base already: QEMU was killed at it, and its tables
    # are set right first.
    begun = pending_below(overlay, backing_dirs) is not None
    allowed = {*force, Reason.DAMAGED} if begun else force
    refuse_to_write(base, backing_dirs, force=allowed, but_for=overlay)
    if not begun:
        refuse_several_names(into)
    refuse_snapshots(chain, "to commit it", force=force)
    refuse_doubtful(chain, force={*force, Reason.BASE_NEWER} if begun else force)
    if remove:
        what = "to remove it would lose its dirty bitmaps"
        held = bitmaps_in(chain.active)
        refuse_bitmaps(overlay, held, what, force=force, reason=Reason.BITMAPS)
    _refuse_other_size(chain, base)
    if remove and (above := overlays_on(overlay, backing_dirs)):
        raise RefusedError(
            f"it is itself the base of {printable(above[0])}, so it cannot be removed",
            subject=printable(overlay),
            hint="commit it without --remove",
        )
    space = min(chain.active.actual_size, chain.active.virtual_size)
    if base.active.driver == "file":
        refuse_if_too_little_space(into.resolve().parent, space, force=force)
    lines = [f"write up to {space} bytes of {printable(overlay)} into {printable(into)}"]
    if chain.active.virtual_size > base.active.virtual_size:
        lines.append(f"make {printable(into)} grow to {chain.active.virtual_size} bytes")
    lines.append("prove that both have the same content")
    if remove:
        gone = left_out(len(chain.active.snapshots), len(bitmaps_in(chain.active)))
        lines += [*gone, f"remove {printable(overlay)}"]

    def do(work: Work) -> None:
        with block_readers([into]):
            record = work.record
            if record.facts.get("step") != "proved" or not is_intact(record, overlay):
                files = {"image": noted_mark(record, "image"), "overlay": mark_of(overlay)}
                record.note(step="begun", noted=files)
                words: list[str | Path] = ["commit", "-d", chain.filename(read_only=False)]
                with record.at_work():
                    work.qemu_img("commit", words, overlay)
                what = "the base does not have the content of the overlay"
                work.prove_same(chain.filename(), base.filename(), what, into)
                work.refuse_if_lost(into, "the overlay has all of the content still")
                sync_file(into)
            # Not a link by which it was given: that would be removed.
            work.say(finish_commit(record, real_path(overlay), backing_dirs))

    # Named as it will be found if the folder is moved before the work is done.
    named = name_beside(into.resolve(), overlay.resolve())
    return Plan(
        "commit",
        into,
        tuple(lines),
        do,
        base.active.format,
        space=space,
        facts={"overlay": named, "remove": remove},
        seen=Seen.of(*chain.files),
        in_place=chain.links,
        writes_to=(overlay, into),
        repeatable=("overlay", "remove"),
        same_in=overlay,
        after=lambda holdings: holdings.after_resize(
            max(chain.active.virtual_size, base.active.virtual_size)
        ),
        backing_dirs=backing_dirs,
        force=force,
    )


def _refuse_other_size(chain: Chain, base: Chain) -> None:
    size, below = chain.active.virtual_size, base.active.virtual_size
    if size < below:
        raise RefusedError(
            f"its base is larger ({below} bytes, the overlay {size}): what lies beyond would show",
            subject=printable(chain.active.path),
            hint=f"make it as large first: imgtool resize {typed(chain.active.path)} {below}",
        )
    if size > below:
        refuse_to_resize(base.active)


def _describe(overlay: ImageInfo, below: Chain) -> str:
    """An overlay's own clusters over a base of our choice."""
    return Chain((overlay, *below.links)).filename()


def plan_rebase(
    overlay: Path,
    base: Path,
    *,
    format: str | None = None,
    base_format: str | None = None,
    unsafe: bool = False,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Put an overlay on another base: what differs is copied into it, so its content stays.

    `unsafe` only writes another name and format into it, for a base that was moved or whose format
    is missing. Raises `RefusedError` if the new base stands on the overlay, or, where content could
    change, if the overlay is a base itself or has internal snapshots.
    """
    places = AllowedDirs.around(overlay.absolute(), backing_dirs)
    link = probe(overlay, format=format, places=places)
    if link.format != "qcow2":
        raise ImageError(f"it is no qcow2 overlay but {link.format}", subject=printable(overlay))
    refuse_if_interrupted(base)
    below = _open_base(base, base_format, backing_dirs)
    if any(under.path.samefile(overlay) for under in below.links):
        raise RefusedError(
            "the new base stands on the overlay itself: the chain would be a loop",
            subject=printable(base),
        )
    refuse_encrypted(Chain((link,)), below)
    refuse_second_file(link)
    refuse_if_in_use(below, read_only=True, force=force)
    refuse_if_not_writable(overlay)
    refuse_several_names(overlay)
    if unsafe:
        return _plan_unsafe(link, below, force=force, backing_dirs=backing_dirs)
    chain = _overlay(overlay, format, backing_dirs)
    # QEMU writes down the name of the new base, and opens it, and the old one, by their names.
    refuse_by_name((*chain.links, *below.links))
    refuse_to_guess(chain)
    refuse_to_guess(below)
    refuse_if_in_use(chain, force=force)
    refuse_if_unfinished(chain)
    refuse_snapshots(chain, "to rebase it", force=force)
    refuse_doubtful(chain, force=force)
    space = size_of_copy(chain, options_like(chain.active))
    refuse_if_too_little_space(overlay.resolve().parent, space, force=force)
    name, old = backing_name(base, overlay), Chain(chain.links[1:])
    lines = (
        f"copy what differs between {printable(old.active.path)} and {printable(base)}"
        f" into {printable(overlay)} (up to {space} bytes)",
        f"put it on {printable(name)} ({below.active.format})",
        "prove that its content is the same as before",
    )

    def do(work: Work) -> None:
        work.qemu_img("rebase", _rebase(overlay, name, below.active.format), overlay)
        now = probe(overlay, format="qcow2", backing_dirs=backing_dirs)
        what = "the overlay had another content on its new base, and was put back on its old one"
        try:
            work.prove_same(_describe(now, old), _describe(now, below), what, overlay)
        except ImgtoolError:
            before = str(chain.active.backing)
            back = _rebase(overlay, before, old.active.format, "-u")
            work.qemu_img("put back", back, overlay)
            raise

    return Plan(
        "rebase",
        overlay.absolute(),
        lines,
        do,
        "qcow2",
        space=space,
        seen=Seen.of(*chain.files, *below.files),
        same_in=overlay,
        backing_dirs=backing_dirs,
        after=lambda holdings: holdings.on(name, below.active.format),
    )


def _rebase(overlay: Path, name: str, format: str, *options: str) -> list[str | Path]:
    return ["rebase", *options, "-f", "qcow2", "-F", format, "-b", name, qemu_name(overlay)]


def _plan_unsafe(link: ImageInfo, below: Chain, *, force: Force, backing_dirs: Dirs) -> Plan:
    overlay, base = link.path, below.active
    alone = Chain((link,))
    refuse_if_in_use(alone, force=force)
    refuse_if_unfinished(alone)
    refuse_doubtful(alone, force=force)
    refuse_if_base(alone, backing_dirs, force=force)
    if Reason.OTHER_BASE not in force:
        _refuse_another(link, below, backing_dirs)
    name = backing_name(base.path, overlay)
    lines = (
        f"write {printable(name)} ({base.format}) into {printable(overlay)} as its base;"
        " what a guest sees in it changes if that is not the same content",
    )

    def do(work: Work) -> None:
        status = way_to(overlay).stat()
        work.qemu_img("rebase", _rebase(overlay, name, base.format, "-u"), overlay)
        if is_newer(change_time(base), status.st_mtime_ns):
            # That the base may be another is to be seen afterwards too.
            os.utime(way_to(overlay), ns=(status.st_atime_ns, status.st_mtime_ns))

    return Plan(
        "rebase",
        overlay,
        lines,
        do,
        "qcow2",
        seen=Seen.of(overlay),
        in_place=(link,),
        same_in=overlay,
        backing_dirs=backing_dirs,
        after=lambda holdings: holdings.on(name, base.format),
    )


def _refuse_another(link: ImageInfo, below: Chain, backing_dirs: Dirs) -> None:
    """Raise `RefusedError` where it can be told that the new base is not the old one."""
    without = "rebase without --unsafe to keep the content"
    if link.backing is None:
        raise RefusedError(
            "it stands on no image: where it is empty, the base would show",
            subject=printable(link.path),
            reason=Reason.OTHER_BASE,
        )
    if link.virtual_size < below.active.virtual_size:
        raise RefusedError(
            f"the new base is larger ({below.active.virtual_size} bytes) than the overlay"
            f" ({link.virtual_size}): it can hardly be the one that it was made on",
            subject=printable(below.active.path),
            hint=without,
            reason=Reason.OTHER_BASE,
        )
    try:
        old = Chain(open_chain(link.path, format="qcow2", backing_dirs=backing_dirs).links[1:])
    except (ImageError, RefusedError):
        return  # that is what --unsafe is for
    same_file = old.active.path.samefile(below.active.path)
    if not same_file and not same_content(old.filename(), below.filename()):
        raise RefusedError(
            f"the new base has another content than {printable(old.active.path)}",
            subject=printable(below.active.path),
            hint=without,
            reason=Reason.OTHER_BASE,
        )


def plan_flatten(
    overlay: Path, *, format: str | None = None, force: Force = (), backing_dirs: Dirs = ()
) -> Plan:
    """Make an overlay stand alone: everything below is pulled up into a new file, which takes its
    place once it is proved to have the same content. Its dirty bitmaps go with it.

    Raises `RefusedError` for bitmaps that hold no more, which QEMU does not copy.
    """
    chain = _overlay(overlay, format, backing_dirs)
    refuse_encrypted(chain)
    refuse_second_file(chain.active)
    refuse_to_replace(chain, force=force)
    refuse_snapshots(chain, "to flatten it", force=force)
    bitmaps = _bitmaps_to_keep(chain, force=force)
    options = options_like(chain.active)
    space = size_of_copy(chain, options)
    refuse_if_too_little_space(overlay.resolve().parent, space, force=force)
    temporary = temporary_path(overlay)
    lines = (
        f"copy all {len(chain.links)} links into a new file (up to {space} bytes)"
        + (f", its {len(bitmaps)} dirty bitmaps with it" if bitmaps else ""),
        *left_out(len(chain.active.snapshots), len(bitmaps_in(chain.active)) - len(bitmaps)),
        "prove that it has the same content",
        f"put it in the place of {printable(overlay)}",
    )

    def do(work: Work) -> None:
        with block_writers(chain), steady(chain) as seen:
            work.reserve(temporary)
            with_them = ("--bitmaps", "--skip-broken-bitmaps") if bitmaps else ()
            convert(work, "flatten", seen, temporary, options, *with_them)
            alone = Chain((probe(temporary, format="qcow2"),)).filename()
            what = "the new file does not have the same content"
            work.prove_same(seen.filename(), alone, what, overlay)
            work.swap(temporary, chain.active)

    return Plan(
        "flatten",
        overlay.absolute(),
        lines,
        do,
        space=space,
        facts={"temporary": str(temporary)},
        seen=Seen.of(*chain.files),
        after=lambda holdings: holdings.of_copy(bitmaps).on(None, None),
    )


def _bitmaps_to_keep(chain: Chain, *, force: Force) -> tuple[Bitmap, ...]:
    """The dirty bitmaps of the active image that QEMU can copy."""
    bitmaps = bitmaps_in(chain.active)
    spoilt = [bitmap for bitmap in bitmaps if bitmap.in_use]
    what = "it has dirty bitmaps of which the writer was killed, and which cannot be copied"
    refuse_bitmaps(chain.active.path, spoilt, what, force=force, reason=Reason.BITMAPS)
    return tuple(bitmap for bitmap in bitmaps if not bitmap.in_use)
