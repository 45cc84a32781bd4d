"""Single images: made, converted, resized, checked and mended."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

from imgtool.errors import (
    Force,
    ImageError,
    Reason,
    RefusedError,
    UsageError,
)
from imgtool.formats import vmdk
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.holdings import bitmaps_in, left_out
from imgtool.image.chain.info import ImageInfo, probe
from imgtool.image.chain.snapshot_view import at_snapshot, snapshot_option
from imgtool.image.chain.steady import steady
from imgtool.image.chain.writable import refuse_unmended
from imgtool.image.change.copies import size_of_copy
from imgtool.image.change.guards import (
    refuse_encrypted,
    refuse_existing,
    refuse_if_too_little_space,
    refuse_several_names,
    refuse_to_resize,
    refuse_to_write,
)
from imgtool.image.change.made import made_file
from imgtool.image.change.plan import Plan, Seen, Work
from imgtool.image.change.rehearsing import json_name
from imgtool.image.change.repairing import repair_tables
from imgtool.image.checks.checking import check_metadata
from imgtool.image.checks.doubts import doubts_of, lagging
from imgtool.image.checks.findings import salvage
from imgtool.image.checks.recognise import require_known_content
from imgtool.image.intent.intent_log import temporary_path
from imgtool.image.locking.locks import refuse_if_in_use
from imgtool.image.qemu.qemu_img import qemu_img
from imgtool.text import printable, typed

Dirs = Sequence[str | Path]

_SIZE = re.compile(
    r"(?P<sign>[+-]?)(?P<number>[0-9]{1,20}(?:\.[0-9]{1,20})?)(?P<unit>[KMGTPE]?)(?:iB|B)?",
    re.I | re.A,
)
_SECTOR = 512
_LARGEST = 1 << 62
_LEAST_BYTES = 1 << 20  # of a size without a unit
# Written by QEMU as well as read.
MADE = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")
# A VHD is made larger than asked for otherwise, of a size that can be told in cylinders.
_OPTIONS: dict[str, list[str | Path]] = {"vpc": ["-o", "force_size=on"]}


def parse_size(text: str, now: int = 0) -> int:
    """`20G`, `512M`, `+1G`, `-1G` in bytes; units are powers of 1024.

    Raises `UsageError`, also for a small number without a unit: 50 is hardly meant as bytes.
    """
    matched = _SIZE.fullmatch(text.strip())
    if not matched:
        raise UsageError("not a size", subject=printable(text), hint="such as 20G, 512M or +1G")
    if not matched["unit"] and float(matched["number"]) < _LEAST_BYTES:
        meant = matched["sign"] + matched["number"]
        raise UsageError(
            f"a size without a unit is in bytes, and {matched['number']} bytes are no disk",
            subject=printable(text),
            hint=f"{meant}M or {meant}G, if that was meant",
        )
    amount = int(
        Fraction(matched["number"]) * 1024 ** " KMGTPE".index(matched["unit"].upper() or " ")
    )
    size = {"": amount, "+": now + amount, "-": now - amount}[matched["sign"]]
    if not 0 < size <= _LARGEST:
        raise UsageError("not a size that an image can have", subject=printable(text))
    return -(-size // _SECTOR) * _SECTOR


def plan_new(path: Path, size: int, *, format: str = "qcow2") -> Plan:
    """An empty image of `size` bytes."""
    if format not in MADE:
        raise UsageError(f"no image of format '{printable(format)}' can be made: {', '.join(MADE)}")
    refuse_existing(path)
    temporary = temporary_path(path)

    def do(work: Work) -> None:
        work.reserve(temporary)
        words: list[str | Path] = [
            "create",
            "-f",
            format,
            *_OPTIONS.get(format, ()),
            temporary,
            str(size),
        ]
        work.qemu_img("create", words, path, made=temporary)
        if format == "vmdk":
            with made_file(temporary, write=True) as descriptor:
                vmdk.name_itself(descriptor, path.name)
        work.place(temporary, path)

    lines = (f"create {printable(path)}, {format}, {size} bytes",)
    return Plan("create", path.absolute(), lines, do, facts={"temporary": str(temporary)})


def plan_convert(
    path: Path,
    new: Path,
    *,
    to: str = "qcow2",
    compress: bool = False,
    snapshot: str | None = None,
    format: str | None = None,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Copy an image, with all that it stands on, into a new one of the format `to`.

    `snapshot` takes it as it was then. Internal snapshots and dirty bitmaps are not copied.
    """
    if to not in MADE:
        raise UsageError(f"no image of format '{printable(to)}' can be made: {', '.join(MADE)}")
    if compress and to not in ("qcow2", "vmdk"):
        raise UsageError(f"a {to} image cannot be compressed")
    chain = open_chain(path, format=format, backing_dirs=backing_dirs)
    refuse_existing(new)
    refuse_encrypted(chain)
    refuse_if_in_use(chain, read_only=True)  # a copy of what changes meanwhile is torn
    for link in chain.links:
        if link.unseen is not None and link.unseen.what == "geometry":
            raise ImageError(link.unseen.means, subject=printable(link.path), hint=link.unseen.do)
    space = size_of_copy(chain)
    if snapshot is not None:
        with at_snapshot(chain, snapshot) as seen:
            space = seen.active.virtual_size  # what was in use then is not told apart
    if compress:
        space = min(space, sum(link.actual_size for link in chain.links))
    refuse_if_too_little_space(new.absolute().parent, space, force=force)
    temporary = temporary_path(new)
    words: list[str | Path] = ["convert", "-O", to, *_OPTIONS.get(to, ())]
    if compress:
        words.append("-c")
        if to == "vmdk":  # the one kind that holds compressed data
            words += ["-o", "subformat=streamOptimized"]
    lines = [f"copy {printable(path)} into {printable(new)} as {to} (up to {space} bytes)"]
    lines += left_out(len(chain.active.snapshots), len(bitmaps_in(chain.active)))
    if snapshot is None:
        lines.append("prove that it has the same content")

    def do(work: Work) -> None:
        work.reserve(temporary)
        with at_snapshot(chain, snapshot) as then, steady(then) as seen:
            given = [*words, *snapshot_option(seen, snapshot), seen.filename(), temporary]
            work.qemu_img("convert", given, path, made=temporary)
            if to == "vmdk":
                with made_file(temporary, write=True) as descriptor:
                    vmdk.name_itself(descriptor, new.name)
            if snapshot is None:
                made = Chain((probe(temporary, format=to),)).filename()
                work.prove_same(seen.filename(), made, "the new image has another content", path)
        with chain.open_file(chain.active.path) as file:
            work.place(temporary, new, like=file)

    return Plan(
        "convert",
        new.absolute(),
        tuple(lines),
        do,
        space=space,
        facts={"temporary": str(temporary)},
        seen=Seen.of(*chain.files),
        doubts=doubts_of(chain),
    )


def plan_resize(
    path: Path,
    size: str,
    *,
    require_empty_tail: Callable[[Chain, int, Force], None],
    format: str | None = None,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Give the disk another size; it grows freely.

    `require_empty_tail` is called before it shrinks and raises `RefusedError` if something lies
    beyond.
    """
    chain = open_chain(path, format=format, backing_dirs=backing_dirs)
    if format is None:
        require_known_content(chain, or_blank=True)
    active = chain.active
    if active.format not in ("raw", "qcow2"):
        raise ImageError(
            f"a {active.format} image cannot be resized",
            subject=printable(path),
            hint="imgtool convert makes a qcow2 image of it",
        )
    refuse_encrypted(chain)
    wanted = parse_size(size, active.virtual_size)
    refuse_to_write(chain, backing_dirs, force=force)
    refuse_several_names(path)
    refuse_to_resize(active)
    shrinks = wanted < active.virtual_size
    if shrinks:
        require_empty_tail(chain, wanted, force)
    lines = (f"make the disk in {printable(path)} {wanted} bytes instead of {active.virtual_size}",)
    words: list[str | Path] = ["resize"]
    if shrinks:
        words.append("--shrink")

    def do(work: Work) -> None:
        if wanted != active.virtual_size:
            words.extend((chain.filename(read_only=False), str(wanted)))
            work.qemu_img("resize", words, path)

    def rehearsal(node: dict[str, object]) -> None:
        if wanted > active.virtual_size:
            qemu_img([*words, json_name(node), str(wanted)], image=path)

    return Plan(
        "resize",
        path.absolute(),
        lines,
        do,
        active.format,
        seen=Seen.of(*chain.files),
        in_place=chain.links,
        after=lambda holdings: holdings.after_resize(wanted),
        rehearsal=None if shrinks else rehearsal,
    )


def _chain_or(link: ImageInfo, backing_dirs: Dirs) -> Chain:
    """The chain of an image, or the image alone where the chain cannot be followed."""
    try:
        return open_chain(link.path, format=link.format, backing_dirs=backing_dirs)
    except (ImageError, RefusedError):
        return Chain((link,))


def plan_repair(
    path: Path,
    what: Literal["leaks", "all"],
    *,
    format: str | None = None,
    force: Force = (),
    backing_dirs: Dirs = (),
) -> Plan:
    """Have QEMU mend the image's tables: lost space alone, or all that is wrong with them.

    What the image holds besides its content stays, or it is not done: `WouldLose`. Raises
    `ImageError` for one that QEMU cannot check.
    """
    link = probe(path, format=format, backing_dirs=backing_dirs)  # its base may be missing
    refuse_encrypted(Chain((link,)))
    refuse_unmended(link)
    if link.dirty and what == "leaks":
        raise lagging(link)  # what is lost cannot be told yet
    check_metadata(link)  # whoever cannot say what is wrong cannot mend it either
    # It is for damaged ones, and what stands on it sees no change.
    allowed = {*force, Reason.IS_BASE, Reason.DAMAGED}
    refuse_to_write(_chain_or(link, backing_dirs), backing_dirs, force=allowed, repair=True)
    refuse_several_names(path)

    def do(work: Work) -> None:
        with work.step("repair"):
            result = repair_tables(link, what)
        if not result.sound:
            work.record.note(step="done")
            raise ImageError(
                f"{result.corruptions} entries of its tables are wrong still",
                subject=printable(path),
                hint=f"try to mend a copy: cp {typed(path)} COPY,"
                " then imgtool check --repair all COPY"
                if what == "leaks"
                else f"what can be read goes into a new image: {salvage(link)}",
            )

    lines = (f"mend the tables of {printable(path)} ({what})",)
    return Plan(
        "repair",
        path.absolute(),
        lines,
        do,
        link.format,
        facts={"what": what},
        seen=Seen.of(path),
        in_place=(link,),
        writes_to=(path,),
        same_in=path,
        backing_dirs=backing_dirs,
    )
