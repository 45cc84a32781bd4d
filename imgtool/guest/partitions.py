"""The partition table of an image, read without an appliance."""

from __future__ import annotations

from dataclasses import dataclass

from imgtool.guest.model import Partition
from imgtool.guest.partition_table import problems, read_table
from imgtool.image.chain import Chain
from imgtool.image.nbd import serve


@dataclass(frozen=True)
class PartitionTable:
    """The partitions of one disk, and a line on each that cannot be right."""

    partitions: tuple[Partition, ...]
    problems: tuple[str, ...]


def partitions_of(
    chain: Chain, *, device: str = "/dev/sda", snapshot: str | None = None
) -> PartitionTable:
    """The partition table of an image, or of its internal snapshot; `device` names the disk."""
    with serve(chain, snapshot=snapshot) as server:
        found = read_table(server.read, server.size, device)
        return PartitionTable(found, problems(found, server.size))
