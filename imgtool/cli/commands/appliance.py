"""`appliance save`, `appliance list` and `appliance remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import plain_command
from imgtool.cli.output import Output
from imgtool.cli.session import Common, warning

FIELDS = ("disks", "size", "time", "state", "path")

Disks = Annotated[
    int, typer.Option("--disks", metavar="N", min=1, max=32, help="For guests of so many disks.")
]


@plain_command()
def save(
    common: Common,
    disks: Disks = 1,
) -> None:
    """Keep a started appliance for later commands, which continue it.

    For machines without KVM, where each start takes ten seconds and more. It takes some 170 MB
    of the user's cache, and is used until QEMU, the kernel or libguestfs are other ones.

    \b
    Examples:
      imgtool appliance save
      imgtool appliance save --disks 2
    """
    from imgtool.engines.libguestfs.appliance.launch import last_accelerator, save_appliance

    if last_accelerator() == "kvm":
        warning("KVM works on this machine: appliances start without what is saved")
    save_appliance(disks)


@plain_command()
def list_(
    common: Common,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
) -> None:
    """List the saved appliances, and whether they can still be used.

    \b
    Examples:
      imgtool appliance list
      imgtool appliance list -o json
    """
    from imgtool.engines.libguestfs.appliance import saved
    from imgtool.engines.libguestfs.appliance.launch import saved_home

    found = saved.all_saved(saved_home())
    rows = [
        {
            "disks": one.disks,
            "size": one.size,
            "time": render.timestamp(one.time),
            "state": "fresh" if one.fresh else "stale",
            "path": str(one.folder),
        }
        for one in found
    ]
    shown = [
        {**row, "size": render.human(one.size)} if human else row
        for row, one in zip(rows, found, strict=True)
    ]
    render.emit(rows, FIELDS, output, shown=shown)


@plain_command()
def remove(
    common: Common,
) -> None:
    """Remove the saved appliances.

    \b
    Examples:
      imgtool appliance remove
      imgtool appliance remove -v
    """
    from imgtool.engines.libguestfs.appliance import saved
    from imgtool.engines.libguestfs.appliance.launch import saved_home

    saved.remove_all(saved_home())
