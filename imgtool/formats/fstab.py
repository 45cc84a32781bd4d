"""/etc/fstab of a guest.

The format is that of fstab(5): six fields, `#` comments, octal escapes for white space.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Filesystems that need no device of the guest, or none that could be looked into.
NOT_ON_DISK = frozenset(
    """
    proc sysfs tmpfs devpts devtmpfs swap nfs nfs4 cifs smb3 overlay cgroup cgroup2 debugfs
    securityfs efivarfs fuse.sshfs sshfs 9p virtiofs ceph glusterfs none autofs
    """.split()  # noqa: SIM905 - twenty words read better than twenty strings
)
_REMOVABLE = re.compile(r"/dev/(sr|cdrom|dvd|fd|floppy)\w*")
# A field; the value of a tag may be quoted, with blanks in it.
_WORD = re.compile(r'(?:[A-Z]+=)?"[^"]*"|[^ \t\r]+')

_LONGEST_PATH = 4096  # bytes with the NUL at the end: PATH_MAX in Linux's limits.h


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

    @property
    def on_a_disc(self) -> bool:
        """Whether it names what is put into a drive, and not one of the guest's disks."""
        return bool({"iso9660", "udf"} & set(self.fstype.split(",")))

    @property
    def at_boot(self) -> bool:
        """Whether the guest mounts the filesystem by itself, where it finds it."""
        return "noauto" not in self.options

    @property
    def is_optional(self) -> bool:
        """Whether the guest starts without the filesystem too."""
        return "nofail" in self.options


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), word)


def named_devices(content: bytes) -> list[str]:
    """What every line calls its device, also that of swap space or of a removable disk."""
    words = (_WORD.findall(line) for line in content.decode("utf-8", "replace").split("\n"))
    return [_unescape(line[0]) for line in words if len(line) > 2 and not line[0].startswith("#")]


def parse_fstab(content: bytes) -> tuple[tuple[FstabEntry, ...], tuple[str, ...]]:
    """The entries that name a filesystem on a disk, and a line on each line that makes no sense."""
    entries: list[FstabEntry] = []
    problems: list[str] = []
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n"), 1):
        words = _WORD.findall(line)
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 3:
            problems.append(f"fstab line {number} is not an fstab entry")
            continue
        spec, mountpoint, fstype = (_unescape(word) for word in words[:3])
        options = tuple((words[3] if len(words) > 3 else "defaults").split(","))
        if fstype in NOT_ON_DISK or "bind" in options or "rbind" in options:
            continue
        if _REMOVABLE.fullmatch(spec):
            continue
        if not mountpoint.startswith("/") or ".." in mountpoint.split("/"):
            if mountpoint not in ("none", "swap"):
                problems.append(f"fstab line {number} has no absolute mount point")
            continue
        if "\0" in mountpoint or len(mountpoint.encode()) >= _LONGEST_PATH:
            problems.append(f"fstab line {number} has a mount point that is no path")
            continue
        mountpoint = "/" + "/".join(part for part in mountpoint.split("/") if part)
        entries.append(FstabEntry(spec, mountpoint, fstype, options))
    return tuple(entries), tuple(problems)
