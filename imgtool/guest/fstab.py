"""/etc/fstab of a guest: parsing, and which device of the guest each entry means.

The format is that of fstab(5): six fields, `#` comments, octal escapes for white space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imgtool.guest.model import Device

# Filesystems that need no device of the guest, or none that could be looked into.
NOT_ON_DISK = frozenset(
    """
    proc sysfs tmpfs devpts devtmpfs swap nfs nfs4 cifs smb3 overlay cgroup cgroup2 debugfs
    securityfs efivarfs fuse.sshfs sshfs 9p virtiofs ceph glusterfs none autofs
    """.split()  # noqa: SIM905 - twenty words read better than twenty strings
)
_REMOVABLE = re.compile(r"/dev/(sr|cdrom|dvd|fd|floppy)\w*$")
_PLAIN = re.compile(r"/dev/(?:[hsv]d|xvd)([a-z])(\d*)$")
_NUMBERED = re.compile(r"/dev/(?:nvme(\d+)n1|mmcblk(\d+))(?:p(\d+))?$")


@dataclass(frozen=True)
class FstabEntry:
    """One line of fstab."""

    spec: str
    mountpoint: str
    fstype: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """The value of `name=value` among the options."""
        for option in self.options:
            key, equals, value = option.partition("=")
            if key == name and equals:
                return value
        return None


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), word)


def parse_fstab(content: bytes) -> tuple[tuple[FstabEntry, ...], tuple[str, ...]]:
    """The entries that name a filesystem on a disk, and a line on each line that makes no sense."""
    entries: list[FstabEntry] = []
    problems: list[str] = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 3:
            problems.append(f"fstab line {number} is not an fstab entry")
            continue
        spec, mountpoint, fstype = (_unescape(word) for word in words[:3])
        options = tuple((words[3] if len(words) > 3 else "defaults").split(","))
        if fstype in NOT_ON_DISK or "bind" in options or "rbind" in options:
            continue
        if _REMOVABLE.match(spec):
            continue
        if not mountpoint.startswith("/") or ".." in mountpoint.split("/"):
            if mountpoint not in ("none", "swap"):
                problems.append(f"fstab line {number} has no absolute mount point")
            continue
        entries.append(FstabEntry(spec, mountpoint, fstype, options))
    return tuple(entries), tuple(problems)


def mapper_to_volume(name: str) -> str:
    """`debian--vg-root`, a device-mapper name, as LVM's path `/dev/debian-vg/root`."""
    group, _, volume = name.replace("--", "\0").partition("-")
    return f"/dev/{group}/{volume}".replace("\0", "-")


def _same_disk_position(spec: str, disks: Sequence[str]) -> str | None:
    """The guest knew its disks by another driver's names: the n-th disk stays the n-th."""
    if plain := _PLAIN.match(spec):
        index, partition = ord(plain[1]) - ord("a"), plain[2]
    elif numbered := _NUMBERED.match(spec):
        index, partition = int(numbered[1] or numbered[2]), numbered[3] or ""
    else:
        return None
    return f"{disks[index]}{partition}" if index < len(disks) else None


_LOOKUPS = (
    ("UUID=", "uuid"),
    ("LABEL=", "label"),
    ("PARTUUID=", "partuuid"),
    ("PARTLABEL=", "partlabel"),
    ("/dev/disk/by-uuid/", "uuid"),
    ("/dev/disk/by-label/", "label"),
    ("/dev/disk/by-partuuid/", "partuuid"),
    ("/dev/disk/by-partlabel/", "partlabel"),
)


def resolve_spec(
    spec: str,
    filesystems: Sequence[Device],
    disks: Sequence[str],
    device_with: Callable[[str, str], str | None],
) -> str | None:
    """The device of the guest that `spec` means, or None if it has none.

    `disks` are the guest's disks in their order (`/dev/sda`, ...); `device_with(kind, value)` looks
    a device up by `uuid`, `label`, `partuuid` or `partlabel`.
    """
    names = {filesystem.device for filesystem in filesystems}
    for prefix, kind in _LOOKUPS:
        if spec.startswith(prefix):
            return device_with(kind, spec.removeprefix(prefix).strip("\"'"))
    if spec.startswith("/dev/mapper/"):
        volume = mapper_to_volume(spec.removeprefix("/dev/mapper/"))
        return next((name for name in (volume, spec) if name in names), None)
    if spec in names and not _PLAIN.match(spec):
        return spec
    if spec.startswith("/dev/md"):
        arrays = [name for name in names if name.startswith("/dev/md")]
        return arrays[0] if len(arrays) == 1 else None
    translated = _same_disk_position(spec, disks)
    return translated if translated in names else None
