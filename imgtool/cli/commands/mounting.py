"""`mount`, `umount`, `mounts` and `cleanup`."""

from __future__ import annotations

import os
import pwd
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import guest_command, plain_command
from imgtool.cli.output import Output
from imgtool.cli.session import Common, Failures, Request, warning
from imgtool.errors import UsageError
from imgtool.mount.mechanisms.registry import VIA

if TYPE_CHECKING:
    from imgtool.mount.journal import Journal

FIELDS = (
    "image",
    "snapshot",
    "mountpoint",
    "mechanism",
    "mode",
    "devices",
    "since",
    "user",
    "state",
    "problems",
)


class Via(StrEnum):
    """The mechanisms, and the first that works here."""

    _ignore_ = "members name"
    members = vars()
    for name in VIA:
        members[name] = name


@guest_command("add", "format", "snapshot", "mounts", "root", "keys", "force", "backing_dirs")
def mount(
    request: Request,
    mountpoint: Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="An empty directory.")],
    via: Annotated[
        Via, typer.Option("--via", help="How; auto takes what works here, least risk first.")
    ] = Via("auto"),
    partition: Annotated[
        int | None,
        typer.Option("-p", "--partition", metavar="N", min=1, help="This partition alone."),
    ] = None,
    lv: Annotated[
        str | None, typer.Option("--lv", metavar="VG/LV", help="This logical volume alone.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="The guest's whole layout, nested (the default).")
    ] = False,
    rw: Annotated[bool, typer.Option("--rw", help="To be written to.")] = False,
    executable: Annotated[
        bool, typer.Option("--exec", help="Let programs of the guest be run on the host.")
    ] = False,
) -> None:
    """Mount a guest's filesystems at a directory of the host.

    Read-only unless --rw is given. With every mechanism but fuse the host's own kernel reads the
    guest's filesystem, and a hostile one can attack it: use fuse for images that you do not trust.

    \b
    Examples:
      imgtool mount --via fuse guest.qcow2 mnt
      imgtool mount guest.qcow2 /mnt
      imgtool mount --rw -p 1 disk.raw /mnt
    """
    from imgtool.mount.mounter import MountRequest
    from imgtool.mount.mounting import mount as mount_it

    given = [
        name
        for name, value in (
            ("-p", partition),
            ("--lv", lv),
            ("--whole", whole),
            ("-m", request.mounts),
        )
        if value
    ]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other")
    if request.force and not rw:
        raise UsageError("--force means something with --rw only")
    if request.keys and via not in ("auto", "fuse"):
        raise UsageError("encrypted devices are opened with --via fuse only", subject=via.value)
    mount_it(
        MountRequest(
            image=request.image,
            mountpoint=mountpoint,
            via="fuse" if request.keys else via.value,
            partition=partition,
            lv=lv,
            writable=rw,
            executable=executable,
            force=request.force,
            **request.keywords(),
            notice=warning,
        )
    )


@plain_command()
def umount(
    common: Common,
    mountpoint: Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="Where it is mounted.")],
) -> None:
    """Undo a mount, all of it.

    The image can be copied as soon as this returns.

    \b
    Examples:
      imgtool umount /mnt
      imgtool umount -v mnt
    """
    from imgtool.mount.mounting import unmount

    unmount(mountpoint)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _row(journal: Journal, broken: list[str]) -> dict[str, object]:
    from imgtool.mount.steps.steps import Filesystem

    devices = [step.source for step in journal.steps if isinstance(step, Filesystem)]
    if journal.state != "mounted" and not journal.busy:
        state = "left behind"
    elif journal.state != "mounted":
        state = journal.state
    else:
        state = "broken" if broken else "healthy"
    return {
        "image": journal.images[0],
        "snapshot": journal.snapshot,
        "mountpoint": journal.mountpoint,
        "mechanism": journal.mechanism,
        "mode": "rw" if journal.writable else "ro",
        "devices": devices,
        "since": render.timestamp(journal.created),
        "user": _user(journal.user),
        "state": state,
        "problems": broken,
    }


@plain_command()
def mounts(
    common: Common,
    output: options.OutputOption = Output.table,
) -> None:
    """List the mounts that imgtool made, and whether they are well.

    \b
    Examples:
      imgtool mounts
      imgtool mounts -o json
    """
    from imgtool.mount.journal import journals

    found = [(journal, journal.faults()) for journal in journals()]
    rows = [_row(journal, broken) for journal, broken in found]
    shown = [
        {**row, "since": render.timestamp(journal.created)[:19] + "Z"}
        for row, (journal, _) in zip(rows, found, strict=True)
    ]
    columns = ["mountpoint", "image", "mechanism", "mode", "devices", "since", "user", "state"]
    if any(row["snapshot"] is not None for row in rows):
        columns.insert(2, "snapshot")
    render.emit(rows, FIELDS, output, columns=columns, shown=shown)
    for row, (_, broken) in zip(rows, found, strict=True):
        if row["state"] in ("broken", "left behind"):
            reason = "; ".join(broken) or "it was not finished"
            render.message("warning", f"{reason} ({row['mountpoint']})")
            render.hint("imgtool cleanup undoes what is left of it")


@plain_command()
def cleanup(
    common: Common,
) -> None:
    """Undo what an imgtool that was killed has left.

    That is mounts, also of an earlier boot, and temporary folders.

    \b
    Examples:
      imgtool cleanup
      imgtool cleanup -v
    """
    from imgtool.engines.libguestfs.appliance.launch import TEMPORARY_VARIABLE
    from imgtool.host.scratch import remove_left_behind
    from imgtool.mount.mounting import clean_up

    failures = Failures(debug=common.debug)
    for cleaned in clean_up():
        if cleaned.error is not None:
            failures.add(cleaned.error)
        else:
            journal = cleaned.journal
            print(render.plain(f"undone: {journal.mountpoint} ({journal.images[0]})"))
    for folder in remove_left_behind(*filter(None, [os.environ.get(TEMPORARY_VARIABLE)])):
        print(render.plain(f"removed: {folder}"))
    failures.finish()
