"""The partition table of an image, read without an appliance."""

from __future__ import annotations

from imgtool.guest.partition_table import PartitionTable, examine
from imgtool.image.chain import Chain
from imgtool.image.contents import open_contents


def disk_name(number: int) -> str:
    """The name of a guest's disk, counted from 0: /dev/sda ... /dev/sdz, /dev/sdaa ..."""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return f"/dev/sd{letters}"


def partitions_of(
    chain: Chain, *, device: str = "/dev/sda", snapshot: str | None = None
) -> PartitionTable:
    """The partition table of the disk that `chain` is, seen by its guest as `device`.

    With `snapshot`, as it was at that internal snapshot. Raises `ImageError` for an image that
    cannot be read, `NotInGuestError` for a snapshot that is not there.
    """
    with open_contents(chain, snapshot=snapshot) as (read, size):
        return examine(read, size, device)
