"""`check`, `convert`, `resize`, `create` and `recover`: single images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.commands import working
from imgtool.cli.guest_command import plain_command
from imgtool.cli.output import Output
from imgtool.cli.session import Common
from imgtool.errors import ExitStatus

CHECK_FIELDS = (
    *("path", "format", "sound", "corruptions", "leaks", "errors", "supported"),
    "not_looked_at",
)


class Repair(StrEnum):
    """What is mended."""

    leaks = "leaks"
    all = "all"


class MadeFormat(StrEnum):
    """Formats that can be made."""

    qcow2 = "qcow2"
    raw = "raw"
    vmdk = "vmdk"
    vdi = "vdi"
    vpc = "vpc"
    vhdx = "vhdx"


@plain_command("dry_run", "force", "output", "format", "backing_dirs")
def check(
    common: Common,
    image: options.Image,
    repair: Annotated[
        Repair | None,
        typer.Option("--repair", help="Mend lost space (leaks), or all that is wrong."),
    ] = None,
    output: options.OutputOption = Output.table,
) -> None:
    """Check the tables of one image.

    The guest's filesystems are not looked at. 'imgtool chain check' checks all that the image
    stands on too, and says what each thing means.

    \b
    Examples:
      imgtool check guest.qcow2
      imgtool check --repair leaks guest.qcow2
      imgtool check --repair all -n guest.qcow2

    Exit status: 3 if the tables are damaged, 1 if they were not looked at since somebody writes to
    the image.
    """
    from imgtool.image.chain.info import probe
    from imgtool.image.change.single import plan_repair
    from imgtool.image.checks.checking import UnsupportedCheck, check_metadata
    from imgtool.image.checks.findings import writer_of

    if repair is not None:
        working.run_plan(
            lambda: plan_repair(
                image,
                repair.value,
                format=common.format,
                force=common.force,
                backing_dirs=common.backing_dirs,
            ),
            image,
            common=common,
        )
    working.say_of_records([image])
    link = probe(image, format=common.format, backing_dirs=common.backing_dirs)
    sound: bool | None = None
    row: dict[str, object] = {**render.name_fields("path", bytes(link.path)), "format": link.format}
    row.update(sound=None, corruptions=None, leaks=None, errors=None, supported=True)
    row["not_looked_at"] = None
    writer = writer_of(link.path)
    try:
        if writer is not None:
            row["not_looked_at"] = f"its tables: it is being written by {writer}"
        else:
            result = check_metadata(link)
            sound = result.sound
            row.update(
                corruptions=result.corruptions,
                leaks=result.leaks,
                errors=result.errors,
            )
    except UnsupportedCheck:
        row["supported"] = False
        row["not_looked_at"] = f"its tables: {link.format} has none that could be checked"
    if link.unseen is not None:
        sound = False
        render.message("warning", link.unseen.line(link.path))
        render.message("note", link.unseen.do)
    row["sound"] = sound
    words = {True: "yes", False: "NO", None: "not looked at"}
    columns = ["path", "format", "sound", "corruptions", "leaks", "errors"]
    render.emit(
        [row],
        CHECK_FIELDS,
        output,
        columns=columns,
        shown=[{**row, "sound": words[sound]}],
        titles={"path": "image"},
    )
    if row["not_looked_at"] is not None:
        render.message("note", f"not looked at: {row['not_looked_at']}")
    if sound is False:
        raise SystemExit(int(ExitStatus.IMAGE_UNREADABLE))
    if writer is not None:
        raise SystemExit(int(ExitStatus.FAILED))


@plain_command("dry_run", "force", "format", "backing_dirs")
def convert(
    common: Common,
    image: options.Image,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The new image; no file yet.")],
    to: Annotated[MadeFormat, typer.Option("--to", help="Its format.")] = MadeFormat.qcow2,
    compress: Annotated[bool, typer.Option("--compress", help="Compress it.")] = False,
    snapshot: options.Snapshot = None,
) -> None:
    """Copy an image, with its chain, into one of another format.

    \b
    Examples:
      imgtool convert guest.qcow2 new.raw --to raw
      imgtool convert --compress disk.raw new.qcow2
    """
    from imgtool.image.change.single import plan_convert

    working.run_plan(
        lambda: plan_convert(
            image,
            new,
            to=to.value,
            compress=compress,
            snapshot=snapshot,
            format=common.format,
            force=common.force,
            backing_dirs=common.backing_dirs,
        ),
        new,
        common=common,
    )


@plain_command("dry_run", "force", "format", "backing_dirs")
def resize(
    common: Common,
    image: options.Image,
    size: Annotated[
        str, typer.Argument(metavar="SIZE", help="20G, or +5G to grow, -5G to shrink by it.")
    ],
) -> None:
    """Make the disk in an image larger, or smaller.

    Smaller only where nothing lies beyond. Partitions and filesystems stay as they are. A smaller
    size that begins with a minus sign goes after two dashes.

    \b
    Examples:
      imgtool resize disk.qcow2 20G
      imgtool resize disk.qcow2 +5G
      imgtool resize disk.qcow2 -- -5G
    """
    from imgtool.guest.shrink import require_empty_tail
    from imgtool.image.change.single import plan_resize

    working.run_plan(
        lambda: plan_resize(
            image,
            size,
            require_empty_tail=require_empty_tail,
            format=common.format,
            force=common.force,
            backing_dirs=common.backing_dirs,
        ),
        image,
        common=common,
    )


@plain_command("dry_run")
def create(
    common: Common,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The new image; no file yet.")],
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Such as 20G or 512M.")],
    to: Annotated[MadeFormat, typer.Option("--to", help="Its format.")] = MadeFormat.qcow2,
) -> None:
    """Make an empty image.

    'imgtool overlay create' makes one on a base.

    \b
    Examples:
      imgtool create new.qcow2 20G
      imgtool create --to raw new.raw 512M
    """
    from imgtool.image.change.single import parse_size, plan_new

    working.run_plan(lambda: plan_new(new, parse_size(size), format=to.value), new, common=common)


@plain_command("force", "keep", "backing_dirs")
def recover(
    common: Common,
    image: options.Image,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="End it without either; all that is there is kept as it is."),
    ] = False,
) -> None:
    """Finish or undo what was interrupted on an image.

    Of an overlay and its base, both.

    \b
    Examples:
      imgtool recover guest.qcow2
      imgtool recover --keep guest.qcow2
    """
    from imgtool.errors import ImageError, Reason
    from imgtool.image.change.recovery import recover as resolve_intent
    from imgtool.image.intent.intent_log import load_intent
    from imgtool.image.intent.intent_state import would_do
    from imgtool.text import printable

    if image.is_dir():
        raise ImageError("a directory, not an image", subject=printable(image))
    written = load_intent(image)
    if Reason.UNPROVED in common.force and written is not None and not written.proved:
        render.message("to do", would_do(image, written.facts))
    line = resolve_intent(image, backing_dirs=common.backing_dirs, force=common.force, end=keep)
    if line is None and not image.exists():
        raise ImageError("no such file, and no record of work on it", subject=printable(image))
    render.message("note", line or "nothing was interrupted on it")
