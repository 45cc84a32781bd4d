"""Mounts as users type them."""

from __future__ import annotations

from imgtool.errors import UsageError
from imgtool.guest.model import Mount


def parse_mount(text: str) -> Mount:
    """`DEV[:MOUNTPOINT[:OPTIONS[:FSTYPE]]]`, as in the virt tools."""
    prefix = ""
    if text.startswith("btrfsvol:"):
        prefix, text = "btrfsvol:", text.removeprefix("btrfsvol:")
    parts = text.split(":", 3)
    device, mountpoint, options, fstype = (*parts, "", "", "", "")[:4]
    if not device.startswith("/dev/"):
        raise UsageError("not a device of the guest", subject=device, hint="such as -m /dev/sda1")
    if mountpoint and not mountpoint.startswith("/"):
        raise UsageError("the mount point is not absolute", subject=mountpoint)
    return Mount(prefix + device, mountpoint or "/", options, fstype or None)
