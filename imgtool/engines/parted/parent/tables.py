"""The partition table of an image, with the rows that only libparted reads; its second opinion."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.errors import EngineError
from imgtool.formats.foreign_tables import TITLES
from imgtool.formats.partition_table import Partition, PartitionTable, examine, partition_device
from imgtool.image.chain.chain import Chain
from imgtool.image.qemu.disk_reader import open_contents

if TYPE_CHECKING:
    from imgtool.engines.parted.parent.asking import Label, Row

log = logging.getLogger(__name__)

SECTOR = 512
_MOST_LINES = 20


def table_of(chain: Chain, *, device: str, snapshot: str | None = None) -> PartitionTable:
    """The partition table of a disk; of other systems than PCs the rows are libparted's.

    Where it cannot be asked, or reads none, a problem says so. Raises `EngineError` where it fails
    at the table, and what `open_contents` raises.
    """
    with open_contents(chain, snapshot=snapshot) as (read, size):
        table = examine(read, size, device)
        (none, *more) = table.partitions
        if more or none.number is not None or none.table not in TITLES:
            return table
        from imgtool.engines.parted.parent.asking import ask  # few tables need it

        unread = f"{device}: the rows of {TITLES[none.table]} partition tables are not read"
        try:
            label = ask(read, size)
        except Unsupported as error:
            return replace(table, problems=(*table.problems, f"{unread}: {error}"))
        except EngineError as error:
            error.subject = device
            raise
    if label.name != none.table:
        unread += "".join(f": {line}" for line in label.said[:1])
        return replace(table, problems=(*table.problems, unread))
    rows = tuple(_partition(device, row, label.name) for row in label.rows)
    for line in label.said:
        log.info("libparted: %s: %s", device, line)
    # Overlaps are usual: Sun's third partition is the whole disk, SGI's eleventh too.
    beyond = tuple(f"{r.device} reaches past the end of the disk" for r in rows if r.end >= size)
    return PartitionTable(rows or table.partitions, (*table.problems, *beyond[:_MOST_LINES]))


def _partition(device: str, row: Row, table: str) -> Partition:
    return Partition(
        device=partition_device(device, row.number),
        number=row.number,
        start=row.start,
        size=row.size,
        end=row.start + row.size - 1,
        start_sector=row.start // SECTOR,
        sector_size=SECTOR,
        type=None,
        type_name=", ".join(flag for flag in row.flags if flag != "boot") or None,
        name=row.name,
        bootable="boot" in row.flags,
        table=table,
    )


def disagreements(
    chain: Chain, wanted: Mapping[int, Partition], *, snapshot: str | None = None
) -> Iterator[str]:
    """Lines on the partitions, by their numbers, that libparted reads elsewhere on the disk.

    None where libparted cannot be asked, which is logged.
    """
    from imgtool.engines.parted.parent.asking import ask

    sector_size = next(iter(wanted.values())).sector_size
    try:
        with open_contents(chain, snapshot=snapshot) as (read, size):
            label = ask(read, size, sector_size=sector_size)
    except Unsupported as error:
        log.info("partition table: no second opinion of libparted: %s", error)
        return
    except EngineError as error:
        for row in wanted.values():
            yield f"{row.device}: {error}"
        return
    theirs = {row.number: row for row in label.rows}
    for number, row in wanted.items():
        if (other := _otherwise(label, theirs.get(number), row)) is not None:
            yield (
                f"{row.device} begins at byte {row.start} and has {row.size} bytes, "
                f"but libparted reads {other}"
            )


def _otherwise(label: Label, theirs: Row | None, ours: Partition) -> str | None:
    """What libparted reads, if it is not what we do."""
    if label.name is None:
        return "no partition table: " + (label.said[0] if label.said else "it does not say why")
    if theirs is None:
        return f"no such partition in a table of the kind {label.name}"
    if theirs.kind == "extended" and theirs.start == ours.start:
        return None  # of these our size is that of the table, libparted's may be another
    if (theirs.start, theirs.size) != (ours.start, ours.size):
        return f"byte {theirs.start} and {theirs.size} bytes"
    return None
