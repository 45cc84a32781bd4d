"""The block devices of the appliance, all of them with one call.

libguestfs's own `list_filesystems` starts a program per device and question, which under emulation
costs as much as half a launch. One lsblk knows the same: types, labels, UUIDs, sizes, parents.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

from imgtool.errors import EngineError
from imgtool.formats.foreign_tables import SUFFIX, foreign_table
from imgtool.formats.partition_table import disk_name
from imgtool.guest.blocks import BIOS_BOOT, Block, in_order

log = logging.getLogger(__name__)

_COLUMNS = "KNAME,PTTYPE,PKNAME,NAME,TYPE,HCTL,SIZE,FSTYPE,LABEL,UUID,PARTUUID,PARTLABEL,PARTTYPE"
_SEPARATOR = "--logical-volumes--"
_NAMED = "--device-mapper--"
_PROBED = "--probed--"
# Filesystems' modules are loaded meanwhile: an emulated kernel takes seconds over that of XFS.
# Of the volumes those that LVM itself shows and activates: no parts of thin pools, mirrors and
# snapshots. What udev found several signatures in is looked at again without minix, whose mark of
# two bytes is in other filesystems by accident.
_SCRIPT = f"""udevadm settle
lvm lvs -o vg_name,lv_name,vg_missing_pv_count -S 'lv_role=public && lv_skip_activation!=yes' \
    --noheadings --separator / >/run/imgtool-volumes 2>/dev/null &
volumes=$!
listed=$(LC_ALL=C lsblk -b -P -o {_COLUMNS})
for module in vfat xfs btrfs; do
    case $listed in *"FSTYPE=\\"$module\\""*) modprobe -q $module ;; esac
done >/dev/null 2>&1 &
printf '%s\\n' "$listed" {_SEPARATOR}
case $listed in *'FSTYPE="LVM2_member"'*) wait $volumes; cat /run/imgtool-volumes ;; esac
echo {_NAMED}
for file in /sys/block/dm-*/dm/uuid; do
    [ -r $file ] && read -r name <$file && file=${{file#/sys/block/}} && echo "${{file%%/*}} $name"
done
echo {_PROBED}
printf '%s\n' "$listed" | while read -r row; do
    case $row in *' FSTYPE=""'*) ;; *) continue ;; esac
    case $row in
        *{BIOS_BOOT}*) continue ;;
        *' PTTYPE=""'* | *' TYPE="part"'* | *' TYPE="lvm"'*) ;;
        *) continue ;;
    esac
    name=${{row#KNAME=?}}
    name=${{name%%[!a-z0-9-]*}}
    echo "KNAME=$name"
    blkid -p -o export --match-types nominix "/dev/$name" 2>/dev/null || :
done
"""
_OF_BLKID = {"TYPE": "FSTYPE", "LABEL": "LABEL", "UUID": "UUID"}
_PAIR = re.compile(r'([A-Z]+)="([^"]*)"')
_ESCAPED = re.compile(rb"\\x([0-9a-fA-F]{2})")


def _decode(value: str) -> str:
    raw = value.encode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), raw).decode("utf-8", "replace")


def _rows(listed: str) -> list[dict[str, str]]:
    return [
        {name: _decode(value) for name, value in _PAIR.findall(line)}
        for line in listed.splitlines()
        if line.startswith("KNAME=")
    ]


def _add_probed(rows: list[dict[str, str]], probed: str) -> None:
    """Fill in what blkid(8) said of those without a type."""
    by_name = {row["KNAME"]: row for row in rows}
    row: dict[str, str] = {}
    for line in probed.splitlines():
        name, _, value = line.partition("=")
        if name == "KNAME":
            row = by_name.get(value, {})
        elif name in _OF_BLKID:
            row[_OF_BLKID[name]] = re.sub(r"\\(.)", r"\1", value)


def _disks(rows: list[dict[str, str]]) -> dict[str, str]:
    """The guest's disks: the kernel's name of each, and libguestfs's.

    libguestfs numbers them in the order in which they were added, which is that of their SCSI
    addresses, whatever the kernel calls them; the last is the appliance's own.
    """
    addresses = {}
    for row in rows:
        if row["TYPE"] == "disk" and re.fullmatch(r"\d+:\d+:\d+:\d+", row["HCTL"]):
            addresses[row["KNAME"]] = tuple(map(int, row["HCTL"].split(":")))
    in_order = sorted(addresses, key=lambda kernel: addresses[kernel])[:-1]
    return {kernel: disk_name(number) for number, kernel in enumerate(in_order)}


def _double_dashes(name: str) -> str:
    return name.replace("-", "--")


def parse_blocks(output: str) -> tuple[Block, ...]:
    """What the appliance's lsblk and lvs wrote, as blocks: disks, partitions, md, LVs, mapped."""
    listed, _, rest = output.partition(_SEPARATOR)
    rest, _, probed = rest.partition(_PROBED)
    volumes, _, named = rest.partition(_NAMED)
    uuids = dict(line.split(" ", 1) for line in named.splitlines() if " " in line)
    rows = _rows(listed)
    _add_probed(rows, probed)
    disks = _disks(rows)
    logical = {}
    for line in volumes.split():
        group, volume = line.split("/")[:2]
        logical[f"{_double_dashes(group)}-{_double_dashes(volume)}"] = f"/dev/{group}/{volume}"
    found: dict[str, Block] = {}
    above: dict[str, list[str]] = {}
    for row in rows:
        kernel = row["KNAME"]
        above.setdefault(kernel, []).append(row["PKNAME"])
        name = row["NAME"]
        if row["TYPE"] == "disk":
            if kernel not in disks:
                continue
            kind, device = "device", disks[kernel]
        elif row["TYPE"] == "part":
            parent = row["PKNAME"]
            if parent.startswith("md"):
                device = f"/dev/{kernel}"
            elif parent in disks:
                device = disks[parent] + kernel.removeprefix(parent)
            else:
                continue  # the appliance's own
            kind = "partition"
        elif kernel.startswith("md"):
            kind, device = "md", f"/dev/{kernel}"
        elif name in logical:
            kind, device = "lv", logical[name]
        elif kernel.startswith("dm-") and row["TYPE"] != "lvm":
            kind, device = "mapped", f"/dev/mapper/{name}"
        else:
            continue
        found[kernel] = Block(
            device=device,
            kernel=kernel,
            kind=kind,
            size=int(row["SIZE"] or 0),
            type=row["FSTYPE"] or None,
            label=row["LABEL"] or None,
            uuid=row["UUID"] or None,
            partuuid=row["PARTUUID"] or None,
            partlabel=row["PARTLABEL"] or None,
            parttype=row["PARTTYPE"].lower(),
            dm_uuid=uuids.get(kernel, "").removeprefix("LVM-"),
        )
    blocks = [
        replace(
            block,
            parents=tuple(
                found[p].device for p in dict.fromkeys(above[block.kernel]) if p in found
            ),
        )
        for block in found.values()
    ]
    return in_order(blocks)


def _lacks_disks(output: str) -> bool:
    """Whether a volume group lacks physical volumes."""
    volumes = output.partition(_SEPARATOR)[2].partition(_NAMED)[0].split()
    return any(line.count("/") == 2 and not line.endswith("/0") for line in volumes)


def list_blocks(handle: Any) -> tuple[tuple[Block, ...], bool]:
    """The block devices that are there now, and whether a volume group is not complete.

    Raises `EngineError` if the appliance cannot say.
    """
    try:
        output = handle.debug("sh", [_SCRIPT])
    except RuntimeError as error:
        log.info("block devices: %s", error)
        raise EngineError(
            "the block devices cannot be listed", hint="-v shows what its programs said"
        ) from error
    blocks = parse_blocks(output)
    split = {parent for block in blocks for parent in block.parents}
    found = tuple(
        block
        if block.type or block.device in split or block.holds_none or not block.size
        else replace(block, type=_table(handle, block))
        for block in blocks
    )
    return found, _lacks_disks(output)


def _table(handle: Any, block: Block) -> str | None:
    """The table of another system that is on a block device, as a type."""

    def read(offset: int, length: int) -> bytes:
        return bytes(handle.pread_device(block.device, length, offset))

    try:
        found = foreign_table(read, block.size)
    except RuntimeError:
        return None  # who wants to read more will be told
    return found and found + SUFFIX
