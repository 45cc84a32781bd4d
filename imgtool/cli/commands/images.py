"""`info`: what an image file is, in one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgtool.cli import options, render
from imgtool.cli.guest_command import guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Request
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.image.chain.chain import Chain
    from imgtool.image.chain.info import ImageInfo

FIELDS = (
    "path",
    "format",
    "virtual_size",
    "actual_size",
    "cluster_size",
    "backing",
    "backing_format",
    "encrypted",
    "dirty",
    "corrupt",
    "snapshots",
    "holders",
    "problems",
)


@guest_command("format", "backing_dirs")
def info(
    request: Request,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
) -> None:
    """Show what an image is: format, sizes, chain, snapshots, locks.

    The partition table is shown too, but not in JSON.

    \b
    Examples:
      imgtool info guest.qcow2
      imgtool info -h guest.qcow2
      imgtool info -o json guest.qcow2
    """
    from imgtool.opening import images_to_read

    folders = request.backing_dirs
    with images_to_read([request.image], format=request.format, backing_dirs=folders) as (chain,):
        _show(chain, output, human=human)


def _snapshots(link: ImageInfo) -> list[dict[str, object]]:
    return [
        {
            "id": snapshot.id,
            "name": snapshot.name,
            "time": render.timestamp(snapshot.time),
            "vm_state_size": snapshot.vm_state_size,
        }
        for snapshot in link.snapshots
    ]


def _show(chain: Chain, output: Output, *, human: bool) -> None:
    from imgtool.guest.partitions import partitions_of
    from imgtool.image.checks.doubts import doubts_of
    from imgtool.image.locking.locks import holders

    held = {link.path: [str(holder) for holder in holders(link.path)] for link in chain.links}
    rows: list[dict[str, object]] = []
    for link in chain.links:
        names = [snapshot.name for snapshot in link.snapshots]
        rows.append(
            {
                "path": str(link.path),
                "format": link.format,
                "virtual_size": link.virtual_size,
                "actual_size": link.actual_size,
                "cluster_size": link.cluster_size,
                "backing": link.backing,
                "backing_format": link.backing_format,
                "encrypted": link.encrypted,
                "dirty": link.dirty,
                "corrupt": link.corrupt,
                "snapshots": names if output is Output.csv else _snapshots(link),
                "holders": held[link.path],
                "problems": list(link.problems),
            }
        )
    if output is not Output.table:
        render.emit(rows, FIELDS, output)
        for doubt in doubts_of(chain):
            render.message("warning", doubt)
        return

    def size(value: int) -> str:
        return render.human(value) if human else str(value)

    links = [
        {
            **row,
            "path": ("" if number == 0 else "  " * (number - 1) + "-> ") + str(link.path),
            "virtual_size": size(link.virtual_size),
            "actual_size": size(link.actual_size),
            "state": ",".join(s for s in ("encrypted", "dirty", "corrupt") if row[s]) or None,
        }
        for number, (row, link) in enumerate(zip(rows, chain.links, strict=True))
    ]
    columns = ["path", "format", "virtual_size", "actual_size", "state"]
    render.emit([], (), output, columns=columns, shown=links)
    snapshots = [{"image": str(link.path), **s} for link in chain.links for s in _snapshots(link)]
    if snapshots:
        print()
        columns = ["image", "id", "name", "time", "vm_state_size"]
        render.emit([], (), output, columns=columns, shown=snapshots)
    users = [{"image": str(path), "held by": user} for path in held for user in held[path]]
    if users:
        print()
        render.emit([], (), output, columns=("image", "held by"), shown=users)
    for problem in dict.fromkeys((*chain.problems, *doubts_of(chain))):
        render.message("warning", problem)
    print()
    try:
        table = partitions_of(chain)
    except ImgtoolError as error:
        render.message("warning", f"the partition table cannot be read: {error}")
        return
    shown = [
        {
            "device": row.device,
            "start": row.start,
            "size": size(row.size),
            "type": row.type_name,
            "name": row.name,
            "table": row.table,
        }
        for row in table.partitions
    ]
    columns = ["device", "start", "size", "type", "name", "table"]
    render.emit([], (), output, columns=columns, shown=shown)
