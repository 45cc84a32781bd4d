"""`df`, `filesystems` and `partitions`."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import READ, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request
from imgtool.errors import ImgtoolError, UsageError
from imgtool.formats.partition_table import Partition
from imgtool.guest.model import SpaceUsage

DF_FIELDS = (
    "image",
    "device",
    "mountpoint",
    "type",
    "size",
    "used",
    "available",
    "use_percent",
    "inodes",
    "inodes_used",
    "error",
)
FILESYSTEM_FIELDS = ("kind", "device", "type", "label", "uuid", "size", "mountpoint", "parents")
PARTITION_FIELDS = (
    "device",
    "number",
    "start",
    "size",
    "end",
    "start_sector",
    "sector_size",
    "type",
    "type_name",
    "name",
    "bootable",
    "table",
)


def _df_row(usage: SpaceUsage) -> dict[str, object]:
    return {
        name: getattr(usage, name) if name != "device" else usage.device or None
        for name in DF_FIELDS
    }


def _df_shown(usage: SpaceUsage, human: bool, inodes: bool) -> dict[str, object]:
    def size(value: int | None) -> str | int | None:
        if value is None:
            return None
        return render.human(value) if human else -(-value // 1024)

    percent = usage.use_percent
    values: dict[str, object]
    if inodes:
        total, used = usage.inodes, usage.inodes_used
        free = percent = None
        if total is not None and used is not None:
            free = total - used
            percent = -(-100 * used // total) if total else None
        values = {"inodes": total, "iused": used, "ifree": free}
    else:
        values = {
            "size": size(usage.size),
            "used": size(usage.used),
            "available": size(usage.available),
        }
    shown = {**_df_row(usage), **values}
    shown["use%"] = None if percent is None else f"{percent}%"
    return shown


@guest_command(*READ)
def df(
    request: Request,
    image: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="The disk images.")],
    human: options.Human = False,
    inodes: Annotated[bool, typer.Option("-i", "--inodes", help="Inodes, not space.")] = False,
    parallel: options.Parallel = 1,
    output: options.OutputOption = Output.table,
) -> None:
    """Show the space of each filesystem of one or more guests.

    \b
    Examples:
      imgtool df guest.qcow2
      imgtool df -h -P 4 /srv/*.qcow2
      imgtool df -o json guest.qcow2
    """
    if request.add and len(image) > 1:
        raise UsageError("-a adds a disk to one guest, and several images are given")
    failures = Failures(request.debug)

    def measured(path: Path) -> tuple[tuple[SpaceUsage, ...], ImgtoolError | None]:
        try:
            with dataclasses.replace(request, image=path).opened() as guest:
                return guest.usage(), None
        except ImgtoolError as error:
            return (SpaceUsage(str(path), "", None, None, error=str(error)),), error

    with ThreadPoolExecutor(parallel) as pool:
        results = list(pool.map(measured, image))
    found: list[SpaceUsage] = []
    for usages, error in results:
        found += usages
        if error is not None:
            failures.add(error)
            continue
        for usage in usages:
            if usage.error is not None:
                failures.problem(usage.device.encode(), usage.error)
    numbers = ["inodes", "iused", "ifree"] if inodes else ["size", "used", "available"]
    columns = ["device", "type", *numbers, "use%", "mountpoint"]
    if len(image) > 1:
        columns.insert(0, "image")
    if any(usage.error for usage in found):
        columns.append("error")
    render.emit(
        [_df_row(usage) for usage in found],
        DF_FIELDS,
        output,
        columns=columns,
        shown=[_df_shown(usage, human, inodes) for usage in found],
        titles={"size": "size" if human else "1K-blocks"},
    )
    failures.finish()


@guest_command(*READ)
def filesystems(
    request: Request,
    everything: Annotated[
        bool, typer.Option("--all", help="Also partitions, LVs, VGs, PVs and devices.")
    ] = False,
    long: Annotated[bool, typer.Option("-l", "--long", help="Labels, UUIDs and parents.")] = False,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
) -> None:
    """List the filesystems of a guest, and what they stand on.

    \b
    Examples:
      imgtool filesystems guest.qcow2
      imgtool filesystems --all -lh guest.qcow2
    """
    with request.opened() as guest:
        found = guest.devices(everything=everything)
    rows = [dataclasses.asdict(device) for device in found]
    shown = [
        {**row, "size": render.human(row["size"])} if human and row["size"] is not None else row
        for row in rows
    ]
    columns = ["device", "type", "size", "mountpoint"]
    if everything:
        columns.insert(0, "kind")
    if long:
        columns += ["label", "uuid", "parents"]
    render.emit(rows, FILESYSTEM_FIELDS, output, columns=columns, shown=shown)


@guest_command("add", "format", "snapshot", "backing_dirs")
def partitions(
    request: Request,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
) -> None:
    """Show the partition table: where each partition lies, in bytes.

    \b
    Examples:
      imgtool partitions -h disk.raw
      imgtool partitions -o json disk.raw
    """
    from imgtool.engines.parted.parent.tables import table_of
    from imgtool.formats.partition_table import disk_name
    from imgtool.image.checks.doubts import doubts_of
    from imgtool.opening import images_to_read

    found: list[Partition] = []
    problems: list[str] = []
    with images_to_read(
        [request.image, *request.add], format=request.format, backing_dirs=request.backing_dirs
    ) as chains:
        for number, chain in enumerate(chains):
            for doubt in doubts_of(chain):
                render.message("warning", doubt)
            table = table_of(chain, device=disk_name(number), snapshot=request.snapshot)
            found += table.partitions
            problems += table.problems
    for problem in problems:
        render.message("warning", problem)
    rows = [{name: getattr(partition, name) for name in PARTITION_FIELDS} for partition in found]
    shown = [{**row, "size": render.human(row["size"]) if human else row["size"]} for row in rows]
    columns = ["number", "device", "start", "size", "end", "type_name", "name", "bootable", "table"]
    render.emit(rows, PARTITION_FIELDS, output, columns=columns, shown=shown)
