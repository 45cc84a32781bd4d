"""The block devices of a guest, and which of them count as filesystems."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from imgtool.guest.model import Device
from imgtool.image.foreign_tables import SUFFIX, TITLES

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


LOCKED = "crypto_LUKS"
# The type of what nobody knows: a word, since an empty field could be a question not asked.
UNKNOWN = "unknown"
IS_LOCKED = "encrypted, and no key was given that fits"


@dataclass(frozen=True)
class Block:
    """A block device: `device` is the guest's name of it.

    `kind` is device, partition, lv, md or mapped; `parents` are the guest's names,
    `kernel` is what the kernel of the appliance calls it.
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


def device_with(blocks: Sequence[Block], kind: str, value: str) -> str | None:
    """The device with this filesystem `uuid` or `label`, GPT `partuuid` or `partlabel`."""
    for block in blocks:
        found = getattr(block, kind)
        if found is None or block.type in _MEMBERS:
            continue
        if found == value or (kind == "partuuid" and found.lower() == value.lower()):
            return block.device
    return None


def unmeasured(row: Device, blocks: Sequence[Block]) -> str | None:
    """Why the space of a row of `filesystems_on` that holds no files itself is not known.

    None where there is no space to know: of swap, and of what something else on the list is made
    of.
    """
    if row.type == LOCKED and row.device in locked(blocks):
        return IS_LOCKED
    above = {parent for block in blocks for parent in block.parents}
    if row.type in _SWAP or row.device in above:
        return None
    table = TITLES.get((row.type or "").removesuffix(SUFFIX))
    return f"{table} partition tables are not read" if table else f"{row.type} is not read"


def locked(blocks: Sequence[Block]) -> tuple[str, ...]:
    """The encrypted devices in which nothing can be seen, since no key has opened them."""
    opened = {parent for block in blocks for parent in block.parents}
    return tuple(b.device for b in blocks if b.type == LOCKED and b.device not in opened)
