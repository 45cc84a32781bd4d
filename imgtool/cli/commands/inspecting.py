"""`inspect` and `doctor`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import guest_command, plain_command
from imgtool.cli.output import Output
from imgtool.cli.session import Common, Request
from imgtool.errors import ExitStatus, NotInGuestError
from imgtool.guest.blocks import LOCKED
from imgtool.guest.model import OperatingSystem

FIELDS = (
    "root",
    "type",
    "distribution",
    "version",
    "product_name",
    "architecture",
    "hostname",
    "package_format",
    "package_management",
    "mountpoints",
    "kernels",
    "applications",
)
APPLICATION_FIELDS = ("root", "name", "epoch", "version", "release", "arch")
DOCTOR_FIELDS = ("name", "ok", "required", "found", "fix")


def _pairs(system: OperatingSystem) -> list[dict[str, str]]:
    pairs = []
    for name in FIELDS[:-3]:
        value = getattr(system, name)
        pairs.append({"field": name, "value": "-" if value is None else value})
    for mountpoint, device in system.mountpoints.items():
        pairs.append({"field": "mount", "value": f"{mountpoint} {device}"})
    pairs += [{"field": "kernel", "value": kernel} for kernel in system.kernels]
    return pairs


@guest_command("add", "format", "snapshot", "root", "keys", "engine", "backing_dirs")
def inspect(
    request: Request,
    packages: Annotated[
        bool, typer.Option("--packages", help="Also the installed packages.")
    ] = False,
    output: options.OutputOption = Output.table,
) -> None:
    """Tell what is installed in a guest: system, version, packages.

    \b
    Examples:
      imgtool inspect guest.qcow2
      imgtool inspect --packages -o csv guest.qcow2
    """
    with request.opened() as guest:
        systems = guest.operating_systems(packages=packages)
        closed = () if systems else [row.device for row in guest.devices() if row.type in LOCKED]
    if request.root is not None:
        systems = tuple(system for system in systems if system.root == request.root)
    if not systems:
        raise NotInGuestError(
            "no operating system was found"
            + (f", and what is in {', '.join(closed)} is encrypted" if closed else ""),
            subject=request.image,
            hint=f"give the key: --key {closed[0]}:file:FILE"
            if closed
            else "'imgtool filesystems --all' shows what the image holds",
        )
    if output is Output.table:
        for number, system in enumerate(systems):
            if number:
                print()
            render.emit([], (), output, columns=("field", "value"), shown=_pairs(system))
            if system.applications is not None:
                print()
                rows = [dataclasses.asdict(row) for row in system.applications]
                render.emit(rows, APPLICATION_FIELDS[1:], output)
        return
    if output is Output.csv and packages:
        rows = [
            {"root": system.root, **dataclasses.asdict(row)}
            for system in systems
            for row in system.applications or ()
        ]
        render.emit(rows, APPLICATION_FIELDS, output)
        return
    documents: list[dict[str, object]] = []
    for system in systems:
        document = dataclasses.asdict(system)
        if output is Output.csv:
            document["mountpoints"] = [f"{k}={v}" for k, v in system.mountpoints.items()]
        if system.applications is None:
            del document["applications"]
        documents.append(document)
    render.emit(documents, FIELDS[:-1], output)


@plain_command()
def doctor(
    common: Common,
    launch: Annotated[bool, typer.Option("--launch", help="Really start the appliance.")] = False,
    output: options.OutputOption = Output.table,
) -> None:
    """Check what imgtool needs on this machine.

    \b
    Examples:
      imgtool doctor
      imgtool doctor --launch

    Exit status: 6 if the main job cannot run here.
    """
    from imgtool.doctor import examine
    from imgtool.engines.libguestfs.appliance.launch import time_launch

    checks = examine(launch=launch, launcher=lambda: time_launch(debug=common.debug))
    rows = [{name: getattr(check, name) for name in DOCTOR_FIELDS} for check in checks]
    words = {True: "ok", False: "MISSING", None: "-"}
    shown = [
        {**row, "ok": words[row["ok"]], "fix": None if row["ok"] else row["fix"]} for row in rows
    ]
    render.emit(rows, DOCTOR_FIELDS, output, columns=("name", "ok", "found", "fix"), shown=shown)
    if any(check.required and check.ok is False for check in checks):
        raise SystemExit(int(ExitStatus.HOST_CANNOT))
