"""What is to be mounted where: from the layout of the guest, a partition or a volume."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from imgtool.errors import HostError, NotInGuestError, UsageError, join_names
from imgtool.formats.partition_table import Partition, disk_name
from imgtool.guest.layout import BTRFS_VOLUME, btrfs_device
from imgtool.guest.model import Layout

_PARTITION = re.compile(r"/dev/(?P<disk>sd[a-z]+)(?P<number>[0-9]*)")
_VOLUME = re.compile(r"/dev/(?!mapper/)(?P<group>[^/]+)/(?P<name>[^/]+)")


@dataclass(frozen=True)
class DiskRange:
    """A stretch of a disk, in bytes: a partition, or with `number` None the whole disk."""

    disk: int
    number: int | None
    offset: int
    size: int

    def __str__(self) -> str:
        return disk_name(self.disk) + (str(self.number) if self.number else "")


@dataclass(frozen=True)
class Volume:
    """A logical volume."""

    group: str
    name: str

    def __str__(self) -> str:
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class Item:
    """One filesystem to mount, at `at` below the mount point."""

    source: DiskRange | Volume
    at: str = "/"
    fstype: str | None = None
    subvolume: str | None = None
    options: str = ""


@dataclass(frozen=True)
class Disk:
    """A disk of the guest: its size and partitions as `imgtool partitions` shows them."""

    number: int
    size: int
    partitions: tuple[Partition, ...]

    @property
    def places(self) -> list[DiskRange]:
        """Its partitions; the disk itself where there is no partition table."""
        if not self.partitions or self.partitions[0].number is None:
            return [DiskRange(self.number, None, 0, self.size)]
        return [
            DiskRange(self.number, row.number, row.start, row.size)
            for row in self.partitions
            if row.number is not None
        ]


def partition(disks: Sequence[Disk], number: int, disk: int = 0) -> DiskRange:
    """The partition with this number. Raises `NotInGuestError`, listing those that there are."""
    rows = disks[disk].partitions
    for place in disks[disk].places:
        if place.number == number:
            end = place.offset + place.size
            if end > disks[disk].size:
                raise NotInGuestError(
                    f"partition {number} ends at byte {end}, past the end of the disk "
                    f"({disks[disk].size})",
                    subject=str(place),
                )
            return place
    there = join_names(
        f"{row.number} ({row.type_name or row.type or 'no type'}, {row.size} bytes)"
        for row in rows
        if row.number is not None
    )
    raise NotInGuestError(
        f"no partition {number}",
        subject=disk_name(disk),
        hint=f"it has: {there}"
        if there
        else "it has no partition table: mount it with -m " + disk_name(disk),
    )


def volume(text: str) -> Volume:
    """`VG/LV`, as `--lv` takes it, with or without `/dev/`."""
    group, slash, name = text.removeprefix("/dev/").partition("/")
    if not (slash and group and name) or "/" in name:
        raise UsageError("not a logical volume", subject=text, hint="such as --lv vg0/root")
    return Volume(group, name)


def source_of(device: str, disks: Sequence[Disk]) -> DiskRange | Volume:
    """Where a device of the guest is. Raises `HostError` for one that only the appliance has."""
    matched = _PARTITION.fullmatch(device)
    if matched:
        names = [disk_name(disk.number) for disk in disks]
        if f"/dev/{matched['disk']}" in names:
            disk = names.index(f"/dev/{matched['disk']}")
            if matched["number"]:
                return partition(disks, int(matched["number"]), disk)
            return DiskRange(disk, None, 0, disks[disk].size)
        raise NotInGuestError(
            "the guest has no such disk", subject=device, hint=f"its disks: {', '.join(names)}"
        )
    matched = _VOLUME.fullmatch(device)
    if matched:
        return Volume(matched["group"], matched["name"])
    raise only_the_appliance(device)


def only_the_appliance(device: str) -> HostError:
    """What to say of a device that consists of others."""
    return HostError(
        "only the appliance can put this device together", subject=device, hint="--via fuse"
    )


def items_of(layout: Layout, disks: Sequence[Disk], devices: Sequence[str]) -> list[Item]:
    """The filesystems of a layout, parents before children. `devices` are the guest's."""
    from imgtool.guest.model import Device

    known = [Device("filesystem", device) for device in devices]
    items = []
    for mount in layout.mounts:
        device, subvolume = mount.source, None
        if mount.source.startswith(BTRFS_VOLUME):
            device = btrfs_device(mount.source, known) or mount.source
            subvolume = mount.source.removeprefix(f"{BTRFS_VOLUME}{device}/")
        items.append(
            Item(
                source_of(device, disks),
                mount.mountpoint,
                mount.fstype,
                subvolume,
                mount.options,
            )
        )
    return items
