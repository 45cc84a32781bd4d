"""The block devices of the appliance, all of them with one call.

libguestfs's own `list_filesystems` starts a program per device and question, which under emulation
costs as much as half a launch. One lsblk knows the same: types, labels, UUIDs, sizes, parents.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from imgtool.errors import EngineError
from imgtool.guest.blocks import Block, in_order
from imgtool.guest.partition_table import disk_name

_COLUMNS = "KNAME,PKNAME,NAME,TYPE,HCTL,SIZE,FSTYPE,LABEL,UUID,PARTUUID,PARTLABEL,PARTTYPE"
_SEPARATOR = "--logical-volumes--"
# Filesystems' modules are loaded meanwhile: an emulated kernel takes seconds over that of XFS.
# Of the volumes those that LVM itself shows and activates: no parts of thin pools, mirrors and
# snapshots.
_SCRIPT = f"""udevadm settle
lvm lvs -o vg_name,lv_name -S 'lv_role=public && lv_skip_activation!=yes' \
    --noheadings --separator / >/run/imgtool-volumes 2>/dev/null &
volumes=$!
listed=$(LC_ALL=C lsblk -b -P -o {_COLUMNS})
for module in vfat xfs btrfs; do
    case $listed in *"FSTYPE=\\"$module\\""*) modprobe -q $module ;; esac
done >/dev/null 2>&1 &
printf '%s\\n' "$listed" {_SEPARATOR}
case $listed in *'FSTYPE="LVM2_member"'*) wait $volumes; cat /run/imgtool-volumes ;; esac
"""
_PAIR = re.compile(r'([A-Z]+)="([^"]*)"')
_ESCAPED = re.compile(rb"\\x([0-9a-fA-F]{2})")


def _decoded(value: str) -> str:
    raw = value.encode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), raw).decode("utf-8", "replace")


def _rows(listed: str) -> list[dict[str, str]]:
    return [
        {name: _decoded(value) for name, value in _PAIR.findall(line)}
        for line in listed.splitlines()
        if line.startswith("KNAME=")
    ]


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


def _dashed(name: str) -> str:
    return name.replace("-", "--")


def parsed(output: str) -> tuple[Block, ...]:
    """What the appliance's lsblk and lvs wrote, as blocks: disks, partitions, md, LVs, mapped."""
    listed, _, volumes = output.partition(_SEPARATOR)
    rows = _rows(listed)
    disks = _disks(rows)
    logical = {}
    for line in volumes.split():
        group, _, volume = line.partition("/")
        logical[f"{_dashed(group)}-{_dashed(volume)}"] = f"/dev/{group}/{volume}"
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


def list_blocks(handle: Any) -> tuple[Block, ...]:
    """The block devices that are there now. Raises `EngineError` if the appliance cannot say."""
    try:
        output = handle.debug("sh", [_SCRIPT])
    except RuntimeError as error:
        raise EngineError(f"the block devices cannot be listed: {error}") from error
    return parsed(output)
