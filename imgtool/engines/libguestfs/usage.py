"""Space per filesystem, through the appliance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgtool.engines.libguestfs.volumes import is_subvolume, reason
from imgtool.errors import ImgtoolError
from imgtool.guest.blocks import BIOS_BOOT, IS_LOCKED, locked
from imgtool.guest.layout import CONTAINERS
from imgtool.guest.model import SpaceUsage

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest import LibguestfsGuest


def _mountpoints(guest: LibguestfsGuest) -> dict[str, str]:
    try:
        return {mount.source: mount.mountpoint for mount in guest.layout.mounts}
    except ImgtoolError:
        return {}  # no operating system, or several: the devices are listed all the same


def _measured(guest: LibguestfsGuest, device: str) -> dict[str, int]:
    guest.handle.mount_ro(device, "/")
    try:
        return dict(guest.handle.statvfs("/"))
    finally:
        guest.handle.umount_all()


def usage(guest: LibguestfsGuest) -> tuple[SpaceUsage, ...]:
    """One row for every filesystem but swap and containers."""
    rows: list[SpaceUsage] = []
    mountpoints = _mountpoints(guest)
    guest.unmount_layout()
    closed = locked(guest.volumes.blocks())
    for filesystem in guest.volumes.filesystems():
        device, kind = filesystem.device, filesystem.type
        if device in closed:
            rows.append(SpaceUsage(guest.image, device, None, kind, error=IS_LOCKED))
            continue
        if kind in CONTAINERS or is_subvolume(device):
            continue
        mountpoint = mountpoints.get(device)
        try:
            numbers = guest.volumes.space.get(device) or _measured(guest, device)
        except RuntimeError as error:
            block = guest.volumes.block(device)
            if kind is None and block is not None and block.parttype == BIOS_BOOT:
                continue
            said = reason(error) if kind else "no known filesystem"
            # mount(8) repeats itself; what the kernel says stands last.
            said = said.rsplit("failed: ", 1)[-1].rstrip(".")
            rows.append(SpaceUsage(guest.image, device, mountpoint, kind, error=said))
            continue
        unit = numbers["frsize"] or numbers["bsize"]
        files = numbers["files"]
        rows.append(
            SpaceUsage(
                image=guest.image,
                device=device,
                mountpoint=mountpoint,
                type=kind,
                size=numbers["blocks"] * unit,
                used=(numbers["blocks"] - numbers["bfree"]) * unit,
                available=numbers["bavail"] * unit,
                inodes=files,
                inodes_used=files - numbers["ffree"],
            )
        )
    return tuple(rows)
