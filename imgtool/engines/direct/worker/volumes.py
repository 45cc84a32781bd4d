"""From disks to filesystems: partitions, LVM, signatures, and the reader for each type."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from imgtool.engines.direct.wire.frames import MOST_DEVICES
from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker import lvm
from imgtool.engines.direct.worker.fs.base import Filesystem, NeedsReplay, ReadFailed, Source
from imgtool.engines.direct.worker.fs.registry import READERS, reader_of
from imgtool.engines.direct.worker.signatures import identify
from imgtool.engines.direct.worker.sources import Disk, Filled, Joined, SourceRange
from imgtool.formats.foreign_tables import SUFFIX, TITLES, foreign_table
from imgtool.formats.partition_table import Partition, Read, disk_name, examine
from imgtool.formats.partition_types import EXTENDED
from imgtool.guest.blocks import Block, in_order

# What only the kernel puts together.
_ASSEMBLED = {
    "linux_raid_member": "md arrays",
    "isw_raid_member": "firmware RAID",
    "ddf_raid_member": "firmware RAID",
    "bcache": "bcache",
    "ldm": "Windows dynamic disks",
    "zfs_member": "ZFS",
    "drbd": "DRBD",
    "LVM1_member": "LVM1",
    "DM_snapshot_cow": "device-mapper snapshots",
    "DM_integrity": "dm-integrity",
    "VDO": "VDO",
}
_MOST_STRETCHES = 100_000  # what fits in one frame
_TOO_MANY = f"there are more than {MOST_DEVICES} devices"
_EXTENDED_SIZE = 1024  # what Linux gives an extended partition: room for a boot loader


def _reading(source: Source) -> Read:
    def read(offset: int, length: int) -> bytes:
        return source.read(offset, max(0, min(length, source.size - offset)))

    return read


class DiskRange(NamedTuple):
    """A stretch of a disk, in bytes."""

    disk: int
    offset: int
    size: int


class Volumes:
    """What the disks of a guest hold."""

    def __init__(self, disks: Sequence[Disk], unreplayed: Collection[str] = ()) -> None:
        self._disks = disks
        self._unreplayed = unreplayed
        self._sources: dict[str, Source] = {}
        self._places: dict[str, tuple[DiskRange, ...]] = {}
        self._groups: tuple[lvm.VolumeGroup, ...] = ()
        self._open: dict[str, Filesystem | Unsupported] = {}
        found: list[Block] = []
        for number, disk in enumerate(disks):
            found += self._on_disk(number, disk)
        members = [block for block in found if block.type == "LVM2_member"]
        if members:
            try:
                self._groups = lvm.volume_groups(
                    [(b.device, self._sources[b.device]) for b in members]
                )
            except ReadFailed as error:
                # What else is on the disks can be read; LVM itself knows what is left of these.
                raise Unsupported(str(error)) from error
            for group in self._groups:
                for volume in group.logical:
                    parts = [
                        (self._sources[e.physical], e.offset, e.length) for e in volume.extents
                    ]
                    under = tuple(dict.fromkeys(e.physical for e in volume.extents))
                    device = f"/dev/{group.name}/{volume.name}"
                    for e in volume.extents:
                        if e.offset + e.length > self._sources[e.physical].size:
                            raise Unsupported(f"{device} is larger than its disks")
                    self._places[device] = tuple(
                        DiskRange(at.disk, at.offset + e.offset, e.length)
                        for e in volume.extents
                        for at in self._places[e.physical]
                    )
                    plain = f"{group.uuid}{volume.uuid}".replace("-", "")
                    block = self._block(device, "lv", Joined(parts), under)
                    found.append(replace(block, dm_uuid=plain))
                    if len(found) > MOST_DEVICES:
                        raise Unsupported(_TOO_MANY)
        if len(found) > MOST_DEVICES:
            raise Unsupported(_TOO_MANY)
        for block in found:
            if block.type in _ASSEMBLED:
                raise Unsupported(f"{_ASSEMBLED[block.type]} ({block.device})")
        self.blocks = in_order(found)
        self._by_name = {block.device: block for block in found}

    def _block(
        self,
        device: str,
        kind: str,
        source: Source,
        parents: tuple[str, ...],
        whole: bool = True,
    ) -> Block:
        """A device, of which a part may be missing if it is not `whole`."""
        self._sources[device] = source
        type, label, uuid = identify(source if whole else Filled(source))
        return Block(device, kind, source.size, type, label, uuid, parents=parents)

    def _on_disk(self, number: int, disk: Disk) -> list[Block]:
        device = disk_name(number)
        table = examine(_reading(Filled(disk) if disk.has_lost else disk), disk.size, device)
        rows = [row for row in table.partitions if row.number is not None]
        cut_off = table.cut_off or (disk.has_lost and table.lacks_copy)
        if table.problems and not cut_off:
            raise Unsupported(f"the partition table is odd: {table.problems[0]}")
        self._places[device] = (DiskRange(number, 0, disk.size),)
        for row in rows:
            self._places[row.device] = (DiskRange(number, row.start, row.size),)
        whole = self._block(device, "device", disk, (), not disk.has_lost)
        if whole.type is None and table.partitions[0].table in TITLES:
            whole = replace(whole, type=table.partitions[0].table + SUFFIX)
        if rows and whole.type is not None:
            raise Unsupported(f"{device} has a partition table and is {whole.type} itself")
        return [whole, *(self._partition(device, disk, row, not disk.has_lost) for row in rows)]

    def _partition(self, device: str, disk: Source, row: Partition, whole: bool) -> Block:
        kind = row.type or ""
        if row.table == "msdos" and int(kind, 16) in EXTENDED:
            size = min(_EXTENDED_SIZE, row.size)
            self._sources[row.device] = SourceRange(disk, row.start, size)
            return Block(
                row.device, "partition", size, parttype=f"0x{int(kind, 16):x}", parents=(device,)
            )
        whole = whole and row.end < disk.size
        part = SourceRange(disk, row.start, row.size)
        block = self._block(row.device, "partition", part, (device,), whole)
        if (
            whole
            and block.type is None
            and (inner := foreign_table(_reading(self._sources[row.device]), row.size))
        ):
            block = replace(block, type=inner + SUFFIX)
        block = replace(block, partuuid=row.partuuid, partlabel=row.name or None)
        return replace(
            block, parttype=f"0x{int(kind, 16):x}" if row.table == "msdos" else kind.lower()
        )

    @property
    def groups(self) -> tuple[lvm.VolumeGroup, ...]:
        """The volume groups."""
        return self._groups

    def journals(self) -> list[tuple[str, tuple[DiskRange, ...]]]:
        """The devices whose journals have to be replayed before they can be read."""
        found = []
        for block in self.blocks:
            if block.type in READERS and reader_of(block.type).can_be_replayed:
                try:
                    self.filesystem(block.device)
                except NeedsReplay:
                    found.append((block.device, self._places[block.device]))
                except Unsupported:
                    continue
        return found

    @property
    def disks(self) -> Sequence[Disk]:
        """The disks, in their order."""
        return self._disks

    def places(self, filesystem: Filesystem) -> tuple[DiskRange, ...]:
        """The stretches of disks that an open filesystem is on, one after the other."""
        device = next(device for device, known in self._open.items() if known is filesystem)
        return self._places[device]

    def written_stretches(self, links: Sequence[int | None]) -> list[list[tuple[int, int]] | None]:
        """Of each disk the stretches that come from the topmost `links` of its chain; None where
        that is not known.
        """
        found = []
        most = _MOST_STRETCHES
        for disk, above in zip(self._disks, links, strict=True):
            stretches = None if above is None else disk.written_stretches(above, most)
            most -= len(stretches or ())
            found.append(stretches)
        return found

    def filesystem(self, device: str) -> Filesystem:
        """The filesystem on a device, open. Raises `Unsupported`, also for damage."""
        known = self._open.get(device)
        if known is None:
            try:
                known = self._open_filesystem(device)
            except Unsupported as error:
                known = error
            self._open[device] = known
        if isinstance(known, Exception):
            raise known
        return known

    def _open_filesystem(self, device: str) -> Filesystem:
        block = self._by_name.get(device)
        if block is None:
            raise Unsupported(f"{device} is not known without the appliance")
        try:
            reader = reader_of(block.type)
        except Unsupported as error:
            raise Unsupported(f"{device} is {error}") from error
        try:
            return reader.open(self._sources[device], unreplayed=device in self._unreplayed)
        except Unsupported as error:
            raise type(error)(f"{device} ({block.type}): {error}") from error
        except ReadFailed as error:
            # Whether the kernel mounts it all the same is for the kernel to say.
            raise Unsupported(f"{device} ({block.type}) is damaged: {error}") from error


def on_disks(places: Sequence[DiskRange], at: int, length: int) -> Iterator[DiskRange]:
    """Where a stretch of a volume is on the disks."""
    for disk, offset, size in places:
        if not length:
            return
        if at < size:
            part = min(length, size - at)
            yield DiskRange(disk, offset + at, part)
            at, length = 0, length - part
        else:
            at -= size
