"""What libparted says of the offsets that a mount goes by."""

from __future__ import annotations

from collections.abc import Sequence

from imgtool.engines.parted.parent.tables import disagreements
from imgtool.errors import Reason, RefusedError
from imgtool.image.chain.chain import Chain
from imgtool.mount.mounter import MountRequest
from imgtool.mount.plan import Disk, DiskRange, Item


def compare_offsets(
    wanted: MountRequest, chains: Sequence[Chain], disks: Sequence[Disk], items: Sequence[Item]
) -> None:
    """Say where libparted reads another place of a partition that is to be mounted, or that volumes
    may lie on. Raises `RefusedError` if it is to be written to.
    """
    places = [item.source for item in items if isinstance(item.source, DiskRange)]
    if len(places) < len(items):
        places = [place for disk in disks for place in disk.places]
    lines: list[str] = []
    for disk, chain in zip(disks, chains, strict=True):
        numbers = {place.number for place in places if place.disk == disk.number}
        rows = {row.number: row for row in disk.partitions if row.number in numbers}
        known = {number: row for number, row in rows.items() if number is not None}
        if known:
            lines += disagreements(chain, known, snapshot=wanted.snapshot)
    if lines and wanted.writable and Reason.OTHER_OFFSET not in wanted.force:
        raise RefusedError(
            lines[0],
            subject=wanted.image,
            hint="mount it without --rw, and see what is there",
            reason=Reason.OTHER_OFFSET,
        )
    for line in lines:
        wanted.notice(line)
