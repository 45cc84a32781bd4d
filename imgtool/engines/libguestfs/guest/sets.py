"""Sets of disks of which some are not given: RAIDs, volume groups, btrfs on several devices.

What is complete is started and shown, also what can be read without the missing disks; what cannot
is named, with what is missing. Nothing is written to a set without all its disks: when they come
together again, nobody would know which of them is right.

Sources: Linux, Documentation/admin-guide/md.rst (sysfs); lvmraid(7), vgchange(8)
(--activationmode); btrfs-filesystem(8).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from imgtool.errors import join_names
from imgtool.formats.numbers import whole_number
from imgtool.guest.blocks import Block

log = logging.getLogger(__name__)

# RAIDs that the appliance has put together and not started, since disks are missing. Then volumes,
# of which `degraded` starts mirrors too, `complete` only those without a missing disk.
_SCRIPT = """changed=
for at in /sys/block/md*/md; do
    [ -r $at/array_state ] && read -r state <$at/array_state || continue
    name=${at#/sys/block/}
    name=${name%/md}
    version=
    [ -r $at/metadata_version ] && read -r version <$at/metadata_version
    case $version in external:[!/]*) state=container ;; esac
    if [ "$state" = inactive ] && [ @DEGRADED@ = yes ]; then
        mdadm --run /dev/$name >/dev/null 2>&1 && changed=1
        read -r state <$at/array_state
    fi
    disks=0
    read -r disks <$at/raid_disks
    disks=${disks%% *}
    degraded=0
    [ -r $at/degraded ] && read -r degraded <$at/degraded
    echo "md $name $state ${disks:-0} $degraded"
done
if [ -n "$changed" ] || [ @LACKING@ = yes ]; then
    udevadm settle
    lvm vgchange -aay --activationmode @MODE@ >/dev/null 2>&1
    udevadm settle
    echo changed
fi
if [ @LACKING@ = yes ]; then
    lvm pvs --noheadings --separator / -o vg_name,pv_missing,pv_uuid 2>/dev/null | sed 's/^ */pv /'
    lvm lvs --noheadings --separator / -o vg_name,lv_name,lv_active,lv_attr \
        -S 'lv_role=public && lv_skip_activation!=yes' 2>/dev/null | sed 's/^ */lv /'
fi
if [ @BTRFS@ = yes ]; then
    btrfs filesystem show --raw 2>/dev/null | sed 's/^[ \t]*/btrfs /'
fi
:
"""
_ADD = "add what is missing: -A IMAGE"


@dataclass
class Sets:
    """What is known of the sets of a guest: lines for the user; whether devices came up; devices
    that are only a part of what the first of their set stands for; arrays that are not running.
    """

    lines: list[str] = field(default_factory=list)
    changed: bool = False
    parts: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)


def look_at(handle: Any, blocks: Sequence[Block], *, lacking: bool, write: bool) -> Sets:
    """Start what can be read, and tell what is incomplete; `lacking` if a volume group is."""
    btrfs = any(block.type == "btrfs" for block in blocks)
    if not (lacking or btrfs or any(block.kind == "md" for block in blocks)):
        return Sets()
    words = {
        "DEGRADED": "no" if write else "yes",
        "MODE": "complete" if write else "degraded",
        "LACKING": "yes" if lacking else "no",
        "BTRFS": "yes" if btrfs else "no",
    }
    script = re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], _SCRIPT)
    try:
        said = str(handle.debug("sh", [script]))
    except RuntimeError as error:
        log.info("sets of disks: %s", error)
        return Sets()  # what is there is shown all the same
    return parse_sets(said, blocks)


def parse_sets(said: str, blocks: Sequence[Block]) -> Sets:
    """What the script wrote."""
    sets = Sets()
    names = {block.kernel: block.device for block in blocks}
    rows: dict[str, list[str]] = {"md": [], "pv": [], "lv": [], "btrfs": []}
    for line in said.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "changed":
            sets.changed = True
        elif kind in rows:
            rows[kind].append(rest.strip())
    for row in rows["md"]:
        _array(sets, row.split(), blocks)
    _volumes(sets, rows["pv"], rows["lv"])
    _btrfs(sets, rows["btrfs"], names)
    return sets


def _count(word: str) -> int:
    return whole_number(word) or 0


def _array(sets: Sets, words: list[str], blocks: Sequence[Block]) -> None:
    name, state, total, missing = [*words, "", "", "", ""][:4]
    device = f"/dev/{name}"
    members = next((block.parents for block in blocks if block.device == device), ())
    there = f" ({join_names(members)} of it is there)" if members else ""
    if state == "container":  # of firmware RAID, whose volumes are arrays of their own
        sets.idle.add(device)
        if not any(
            block.kind == "md" and block.size and block.device != device for block in blocks
        ):
            sets.lines.append(
                f"none of the volumes of the firmware RAID{there} can be put together; {_ADD}"
            )
    elif state == "inactive":
        sets.idle.add(device)
        sets.lines.append(f"the RAID {device} lacks disks and is not shown{there}; {_ADD}")
    elif _count(missing):
        sets.lines.append(f"the RAID {device} lacks {missing} of {total} disks and is read without")


def _volumes(sets: Sets, physical: list[str], logical: list[str]) -> None:
    missing: dict[str, list[str]] = {}
    for row in physical:
        group, state, uuid = [*row.split("/"), "", ""][:3]
        if state:
            missing.setdefault(group, []).append(uuid)
    rows = [[*row.split("/"), "", "", ""][:4] for row in logical]
    for group, uuids in missing.items():
        own = [row for row in rows if row[0] == group]
        lost = [f"/dev/{group}/{name}" for _, name, active, _ in own if not active]
        halves = [
            f"/dev/{group}/{name}"
            for _, name, active, attributes in own
            if active and attributes[8:9] == "p"
        ]
        line = f"the volume group {group} lacks {join_names(uuids)}"
        if halves:
            line += f"; {join_names(halves)} can be read without"
        if lost:
            line += f"; {join_names(lost)} is not shown"
        sets.lines.append(f"{line}; {_ADD}")


def _btrfs(sets: Sets, rows: list[str], names: dict[str, str]) -> None:
    order = list(names.values())
    total: int = 0
    found: list[str] = []
    for row in [*rows, "Label: end"]:
        if row.startswith("Label:"):
            _one_btrfs(sets, total, sorted(found, key=order.index))
            total, found = 0, []
        elif devices := re.match(r"Total devices (\d+)", row):
            total = int(devices[1])
        elif (device := re.match(r"devid +\d+ .* path /dev/(\S+)$", row)) and device[1] in names:
            found.append(names[device[1]])


def _one_btrfs(sets: Sets, total: int, found: list[str]) -> None:
    if total < 2 or not found:
        return
    sets.parts.update(found[1:])
    if len(found) < total:
        sets.lines.append(
            f"the btrfs on {join_names(found)} lacks {total - len(found)} of {total} devices;"
            f" {_ADD}, or try what can be read without: -m {found[0]}:/:degraded"
        )
