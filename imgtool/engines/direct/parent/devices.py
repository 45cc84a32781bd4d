"""The block devices that the worker tells of: as many as there can be, on the disks that it got."""

from __future__ import annotations

from dataclasses import dataclass

from imgtool.engines.direct.wire import messages as wire
from imgtool.engines.direct.wire.frames import MOST_DEVICES, BadMessage
from imgtool.formats.partition_table import disk_name
from imgtool.guest.blocks import Block
from imgtool.guest.model import Device


@dataclass(frozen=True)
class Devices:
    """The block devices of a guest, and its volume groups as rows of `filesystems --all`."""

    blocks: tuple[Block, ...]
    groups: tuple[Device, ...]

    @property
    def disk_sizes(self) -> list[int]:
        """The sizes of the disks in bytes, in their order."""
        return [block.size for block in self.blocks if block.kind == "device"]


def devices(answer: object, disks: int) -> Devices:
    """What the worker found on so many disks; `BadMessage` for nonsense."""
    told = wire.mapping(answer, frozenset(("blocks", "groups")))
    rows = wire.items(told["blocks"])
    if len(rows) > MOST_DEVICES:
        raise BadMessage("more devices than there can be")
    blocks = tuple(wire.block(row) for row in rows)
    if len({block.device for block in blocks}) != len(blocks):
        raise BadMessage("two devices of one name")
    found = [block.device for block in blocks if block.kind == "device"]
    if found != [disk_name(number) for number in range(disks)]:
        raise BadMessage("other disks than it was given")
    known = {block.device for block in blocks}
    if any(parent not in known for block in blocks for parent in block.parents):
        raise BadMessage("a device on nothing")
    return Devices(blocks, tuple(_group_rows(told["groups"])))


def _group_rows(groups: object) -> list[Device]:
    """Logical volumes, volume groups and physical volumes, in this order."""
    rows_of = [wire.items(group, 5) for group in wire.items(groups)]
    if sum(1 + len(wire.items(group[3])) + len(wire.items(group[4])) for group in rows_of) > (
        MOST_DEVICES
    ):
        raise BadMessage("more volume groups than there can be")
    volumes, rows, physical = [], [], []
    for name, uuid, size, physical_rows, logical_rows in rows_of:
        device = f"/dev/{wire.string(name)}"
        for volume, identity, length in (wire.items(row, 3) for row in wire.items(logical_rows)):
            volumes.append(
                Device(
                    "lv",
                    f"{device}/{wire.string(volume)}",
                    uuid=wire.string(identity),
                    size=wire.whole(length),
                    parents=(device,),
                )
            )
        members = [wire.items(member, 3) for member in wire.items(physical_rows)]
        under = tuple(wire.string(member) for _, member, _ in members)
        rows.append(
            Device("vg", device, uuid=wire.string(uuid), size=wire.whole(size), parents=under)
        )
        physical += [
            Device("pv", m, uuid=wire.string(u), size=wire.whole(s), parents=(m,))
            for (u, _, s), m in zip(members, under, strict=True)
        ]
    return [*volumes, *rows, *physical]
