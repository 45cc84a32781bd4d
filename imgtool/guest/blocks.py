"""The block devices of a guest, and which of them count as filesystems."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from imgtool.formats.foreign_tables import SUFFIX, TITLES
from imgtool.guest.model import Device

# Partitions that hold no filesystem by design: extended ones, and Windows' own (LDM, reserved).
# These are not even listed as filesystems; a BIOS boot partition is, as one of unknown type.
_NO_FILESYSTEM = frozenset(
    (
        "0x5",
        "0xf",
        "0x85",
        "0x42",
        "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3",
        "af9b60a0-1431-4f62-bc68-3311714a69ad",
        "e3c9e316-0b5c-4db8-817d-f92df00215ae",
    )
)
BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"


LOCKED = frozenset(("crypto_LUKS", "BitLocker"))
# The type of what nobody knows: a word, since an empty field could be a question not asked.
UNKNOWN = "unknown"
IS_LOCKED = "encrypted, and no key was given that fits"


@dataclass(frozen=True)
class Block:
    """A block device: `device` is the guest's name of it.

    `kind` is device, partition, lv, md or mapped; `parents` are the guest's names,
    `kernel` is what the kernel of the appliance calls it; `dm_uuid` are the UUIDs of a volume group
    and a volume in it, without dashes, by which device-mapper knows the volume.
    """

    device: str
    kind: str
    size: int
    type: str | None = None
    label: str | None = None
    uuid: str | None = None
    partuuid: str | None = None
    partlabel: str | None = None
    parttype: str = ""
    parents: tuple[str, ...] = ()
    kernel: str = ""
    dm_uuid: str = ""

    @property
    def is_member(self) -> bool:
        """Whether this is a part of others rather than a device of its own."""
        return self.type in _MEMBERS

    @property
    def holds_none(self) -> bool:
        """Whether this is a partition of a kind that never holds a filesystem."""
        return self.parttype in _NO_FILESYSTEM


_SWAP = frozenset(("swap", "swsuspend"))
# What other devices are made of rather than a filesystem, and not shown as one.
_MEMBERS = frozenset(("LVM2_member", "linux_raid_member"))
_ORDER = ("device", "partition", "md", "lv", "mapped")


def in_order(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Disks, partitions, md, LVs, mapped; /dev/sda10 after /dev/sda9, /dev/sdaa after /dev/sdz."""

    def place(block: Block) -> tuple[int, int, str, int]:
        kind = _ORDER.index(block.kind)
        if block.kind not in ("device", "partition"):
            return kind, 0, block.device, 0
        stem = block.device.rstrip("0123456789")
        return kind, len(stem), stem, int(block.device[len(stem) :] or 0)

    return tuple(sorted(blocks, key=place))


def filesystems_on(
    blocks: Sequence[Block],
    subvolumes: Callable[[str], Sequence[Device]],
    opened: Container[str] = (),
) -> tuple[Device, ...]:
    """What is listed as filesystems, with their types, a btrfs before its `subvolumes`.

    Left out are disks with partitions, partitions that never hold one, parts of LVM and md, and
    encrypted devices that are `opened`, what is in them being listed.
    """
    rows: list[Device] = []
    split = {parent for block in blocks for parent in block.parents}
    for block in blocks:
        if block.kind == "device" and block.device in split and block.type is None:
            continue
        if block.holds_none or block.type in _MEMBERS or block.device in opened:
            continue
        rows.append(Device("filesystem", block.device, block.type or UNKNOWN))
        if block.type == "btrfs":
            rows += subvolumes(block.device)
    return tuple(rows)


def contents(blocks: Sequence[Block]) -> dict[str, str]:
    """What keys have opened in encrypted devices, by these."""
    closed = {block.device for block in blocks if block.type in LOCKED}
    return {
        parent: block.device for block in blocks for parent in block.parents if parent in closed
    }


def unmeasured_rows(rows: Sequence[Device], blocks: Sequence[Block]) -> dict[str, str]:
    """Why the space of those rows of `filesystems_on` that hold no files themselves is not known.

    Nothing of those where there is no space to know: of swap, and of what others are made of.
    """
    above = {parent for block in blocks for parent in block.parents}
    closed = set(locked_devices(blocks))
    found = {}
    for row in rows:
        type = row.type or UNKNOWN
        if row.device in closed:
            found[row.device] = IS_LOCKED
        elif type not in _SWAP and row.device not in above:
            table = TITLES.get(type.removesuffix(SUFFIX))
            found[row.device] = (
                f"{table} partition tables are not read" if table else (f"{type} is not read")
            )
    return found


def locked_devices(blocks: Sequence[Block]) -> tuple[str, ...]:
    """The encrypted devices in which nothing can be seen, since no key has opened them."""
    opened = {parent for block in blocks for parent in block.parents}
    return tuple(b.device for b in blocks if b.type in LOCKED and b.device not in opened)
