"""Filesystems and what they stand on, through the appliance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgtool.engines.libguestfs.guest.volumes import is_subvolume
from imgtool.errors import ImgtoolError
from imgtool.formats.lvm_uuid import with_dashes
from imgtool.guest.layout import btrfs_device
from imgtool.guest.model import Device

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest


def _mountpoints(guest: LibguestfsGuest) -> dict[str, str]:
    try:
        return {mount.source: mount.mountpoint for mount in guest.layout.mounts}
    except ImgtoolError:
        return {}


def _filesystems(guest: LibguestfsGuest) -> list[Device]:
    listed = guest.volumes.filesystems()
    mountpoints = _mountpoints(guest)
    rows = []
    for filesystem in listed:
        device = filesystem.device
        owner = btrfs_device(device, listed) or device
        block = guest.volumes.block(owner)
        rows.append(
            Device(
                kind="filesystem",
                device=device,
                type=filesystem.type,
                label=block.label if block else None,
                uuid=block.uuid if block else None,
                size=block.size if block else None,
                mountpoint=mountpoints.get(device),
                parents=(owner,) if is_subvolume(device) else (),
            )
        )
    return rows


def _plain_uuid(uuid: str) -> str:
    """LVM's UUIDs come without their dashes."""
    return uuid if "-" in uuid or len(uuid) != 32 else with_dashes(uuid)


def devices(guest: LibguestfsGuest, *, everything: bool) -> tuple[Device, ...]:
    """The filesystems; with `everything` also partitions, LVs, VGs, PVs and devices."""
    rows = _filesystems(guest)
    if not everything:
        return tuple(rows)
    blocks = guest.volumes.blocks()
    members = {block.uuid: block for block in blocks if block.type == "LVM2_member"}
    handle = guest.handle
    groups = handle.vgs_full() if members else []
    for block in blocks:
        if block.kind == "lv":
            uuid = _plain_uuid(handle.lvuuid(block.device))
            group = block.device.split("/")[2]
            rows.append(
                Device("lv", block.device, uuid=uuid, size=block.size, parents=(f"/dev/{group}",))
            )
    for row in groups:
        name = row["vg_name"]
        uuids = map(_plain_uuid, handle.vgpvuuids(name))
        parents = tuple(members[uuid].device for uuid in uuids if uuid in members)
        uuid = _plain_uuid(row["vg_uuid"])
        rows.append(Device("vg", f"/dev/{name}", uuid=uuid, size=row["vg_size"], parents=parents))
    for row in handle.pvs_full() if members else ():
        uuid = _plain_uuid(row["pv_uuid"])
        # By UUID, since the name is the one that the appliance's kernel knows.
        name = members[uuid].device if uuid in members else row["pv_name"]
        rows.append(Device("pv", name, uuid=uuid, size=row["pv_size"], parents=(name,)))
    for kind in ("partition", "device"):
        for block in blocks:
            if block.kind == kind or (kind == "device" and block.kind == "md"):
                rows.append(Device(kind, block.device, size=block.size, parents=block.parents))
    return tuple(rows)
