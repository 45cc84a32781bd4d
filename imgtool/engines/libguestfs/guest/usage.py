"""Space per filesystem, through the appliance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgtool.engines.libguestfs.guest.volumes import is_subvolume, reason
from imgtool.errors import ImgtoolError
from imgtool.guest.blocks import BIOS_BOOT, UNKNOWN, unmeasured_rows
from imgtool.guest.layout import holds_files
from imgtool.guest.model import SpaceUsage

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest


def _mountpoints(guest: LibguestfsGuest) -> dict[str, str]:
    try:
        return {mount.source: mount.mountpoint for mount in guest.layout.mounts}
    except ImgtoolError:
        return {}  # no operating system, or several: the devices are listed all the same


def _measure(guest: LibguestfsGuest, device: str) -> dict[str, int]:
    guest.volumes.mount(device, "/", "ro")
    try:
        return dict(guest.handle.statvfs("/"))
    finally:
        guest.handle.umount_all()


def usage(guest: LibguestfsGuest) -> tuple[SpaceUsage, ...]:
    """One row for every filesystem but swap and containers."""
    rows: list[SpaceUsage] = []
    mountpoints = _mountpoints(guest)
    guest.unmount_layout()
    unread = unmeasured_rows(guest.volumes.filesystems(), guest.volumes.blocks())
    for filesystem in guest.volumes.filesystems():
        device, kind = filesystem.device, filesystem.type
        if not holds_files(kind):
            if why := unread.get(device):
                rows.append(SpaceUsage(guest.image, device, None, kind, error=why))
            continue
        if is_subvolume(device):
            continue
        mountpoint = mountpoints.get(device)
        try:
            numbers = guest.volumes.space.get(device) or _measure(guest, device)
        except RuntimeError as error:
            block = guest.volumes.block(device)
            if kind == UNKNOWN and block is not None and block.parttype == BIOS_BOOT:
                continue
            said = "no known filesystem" if kind == UNKNOWN else reason(error)
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
