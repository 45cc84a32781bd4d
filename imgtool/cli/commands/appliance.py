"""`appliance save`, `appliance list` and `appliance remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.output import Output
from imgtool.cli.session import set_up_logging, warning

FIELDS = ("disks", "size", "time", "state", "path")

Disks = Annotated[
    int, typer.Option("--disks", metavar="N", min=1, max=32, help="For guests of so many disks.")
]


def save(
    disks: Disks = 1,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
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

    set_up_logging(verbose=verbose, debug=debug)
    if last_accelerator() == "kvm":
        warning("KVM works on this machine: appliances start without what is saved")
    save_appliance(disks)


def list_(
    human: options.Human = False,
    output: options.OutputOption = Output.table,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """List the saved appliances, and whether they can still be used.

    \b
    Examples:
      imgtool appliance list
      imgtool appliance list -o json
    """
    from imgtool.engines.libguestfs.appliance import saved
    from imgtool.engines.libguestfs.appliance.launch import saved_home

    set_up_logging(verbose=verbose, debug=debug)
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


def remove(
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Remove the saved appliances.

    \b
    Examples:
      imgtool appliance remove
      imgtool appliance remove -v
    """
    from imgtool.engines.libguestfs.appliance import saved
    from imgtool.engines.libguestfs.appliance.launch import saved_home

    set_up_logging(verbose=verbose, debug=debug)
    saved.remove_all(saved_home())
