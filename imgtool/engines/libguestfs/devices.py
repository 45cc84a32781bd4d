"""Filesystems and what they stand on, through the appliance."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

from imgtool.engines.libguestfs.volumes import is_subvolume
from imgtool.errors import ImgtoolError
from imgtool.guest.layout import btrfs_device
from imgtool.guest.model import Device

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest import LibguestfsGuest


def _mountpoints(guest: LibguestfsGuest) -> dict[str, str]:
    try:
        return {mount.source: mount.mountpoint for mount in guest.layout.mounts}
    except ImgtoolError:
        return {}


def _filesystems(guest: LibguestfsGuest) -> list[Device]:
    handle = guest.handle
    listed = guest.volumes.filesystems()
    mountpoints = _mountpoints(guest)
    rows = []
    for filesystem in listed:
        device = filesystem.device
        owner = btrfs_device(device, listed) or device
        known: dict[str, str] = {}
        with contextlib.suppress(RuntimeError):  # blkid finds nothing where nothing is known
            known = handle.blkid(owner)
        rows.append(
            Device(
                kind="filesystem",
                device=device,
                type=filesystem.type,
                label=known.get("LABEL") or None,
                uuid=known.get("UUID") or None,
                size=handle.blockdev_getsize64(owner),
                mountpoint=mountpoints.get(device),
                parents=(owner,) if is_subvolume(device) else (),
            )
        )
    return rows


def _plain_uuid(uuid: str) -> str:
    """LVM's UUIDs come without their dashes; they are written 6-4-4-4-4-4-6."""
    if "-" in uuid or len(uuid) != 32:
        return uuid
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(uuid[a:b] for a, b in itertools.pairwise(cuts))


def devices(guest: LibguestfsGuest, *, everything: bool) -> tuple[Device, ...]:
    """The filesystems; with `everything` also partitions, LVs, VGs, PVs and devices."""
    rows = _filesystems(guest)
    if not everything:
        return tuple(rows)
    handle = guest.handle
    groups = handle.vgs_full()
    # pvs_full names devices as the appliance's kernel does, which may call the first disk sdb:
    # only pvs gives the guest's own names, so the two are brought together by UUID.
    volumes = {_plain_uuid(handle.pvuuid(name)): str(name) for name in handle.pvs()}
    members = {
        group["vg_name"]: tuple(
            volumes[uuid]
            for uuid in map(_plain_uuid, handle.vgpvuuids(group["vg_name"]))
            if uuid in volumes
        )
        for group in groups
    }
    for path in handle.lvs():
        group = path.split("/")[2]
        size = handle.blockdev_getsize64(path)
        uuid = _plain_uuid(handle.lvuuid(path))
        rows.append(Device("lv", path, uuid=uuid, size=size, parents=(f"/dev/{group}",)))
    for row in groups:
        name = row["vg_name"]
        rows.append(
            Device(
                "vg",
                f"/dev/{name}",
                uuid=_plain_uuid(row["vg_uuid"]),
                size=row["vg_size"],
                parents=members[name],
            )
        )
    for row in handle.pvs_full():
        uuid = _plain_uuid(row["pv_uuid"])
        name = volumes.get(uuid, row["pv_name"])
        rows.append(Device("pv", name, uuid=uuid, size=row["pv_size"], parents=(name,)))
    for partition in handle.list_partitions():
        size = handle.blockdev_getsize64(partition)
        rows.append(
            Device("partition", partition, size=size, parents=(handle.part_to_dev(partition),))
        )
    for disk in handle.list_devices():
        rows.append(Device("device", disk, size=handle.blockdev_getsize64(disk)))
    return tuple(rows)
