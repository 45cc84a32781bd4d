"""The partition table of an image, read without an appliance."""

from __future__ import annotations

from imgtool.formats.partition_table import PartitionTable, examine
from imgtool.image.chain.chain import Chain
from imgtool.image.qemu.disk_reader import open_contents


def partitions_of(
    chain: Chain, *, device: str = "/dev/sda", snapshot: str | None = None
) -> PartitionTable:
    """The partition table of the disk that `chain` is, seen by its guest as `device`.

    With `snapshot`, as it was at that internal snapshot. Raises `ImageError` for an image that
    cannot be read, `NotInGuestError` for a snapshot that is not there.
    """
    with open_contents(chain, snapshot=snapshot) as (read, size):
        return examine(read, size, device)
