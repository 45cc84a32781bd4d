"""Which filesystems the host's kernel is asked to mount, and how."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import EngineError, HostError
from imgtool.host import program_messages
from imgtool.host.process import Limits, run
from imgtool.mount import kernel

_MAGIC_AND_STATE = struct.Struct("<HH")
log = logging.getLogger(__name__)

_MOMENT = Limits(memory=1 << 30, cpu=20, wall=30)

# An ext4 may say in its superblock that the kernel is to panic where it is damaged.
_NO_PANIC = "errors=remount-ro"
# libblkid's type: the kernel's name, and what is always given. Names are shown as UTF-8.
_TYPES = {
    "ext2": ("ext4", _NO_PANIC),
    "ext3": ("ext4", _NO_PANIC),
    "ext4": ("ext4", _NO_PANIC),
    "xfs": ("xfs", "nouuid"),
    "btrfs": ("btrfs", ""),
    "vfat": ("vfat", "iocharset=utf8"),
    "exfat": ("exfat", "iocharset=utf8"),
    "ntfs": ("ntfs3", "iocharset=utf8"),
    "iso9660": ("iso9660", "iocharset=utf8"),
    "udf": ("udf", "iocharset=utf8"),
    "squashfs": ("squashfs", ""),
    "erofs": ("erofs", ""),
    "f2fs": ("f2fs", ""),
    "hfsplus": ("hfsplus", ""),
}
_NOT_FILES = {
    "swap": "it is swap space",
    "LVM2_member": "it is a physical volume of LVM: name the volume, --lv VG/LV",
    "crypto_LUKS": "it is encrypted: --via fuse with --key",
    "linux_raid_member": "it is a part of a RAID: --via fuse",
    "BitLocker": "it is encrypted with BitLocker",
}


@dataclass(frozen=True)
class Kind:
    """A filesystem as the kernel is told of it."""

    type: str
    data: str


def type_at(path: str, offset: int = 0, size: int = 0) -> str | None:
    """What libblkid says that a stretch of a file or device is; None for nothing known."""
    argv = ["blkid", "-p", "-o", "value", "-s", "TYPE"]
    if offset or size:
        argv += ["--offset", str(offset), "--size", str(size)]
    # Status 2: nothing found; 8: two things found, so that it is neither.
    done = run([*argv, path], limits=_MOMENT, ok=(0, 2, 8))
    if done.returncode == 8:  # perhaps only since minix's mark, of two bytes, is in many places
        done = run([*argv, "--match-types", "nominix", path], limits=_MOMENT, ok=(0, 2, 8))
    return done.stdout.decode("utf-8", "replace").strip() or None


def kind_of(found: str | None, subject: str) -> Kind:
    """How to mount a filesystem of this type. Raises `EngineError` if it is none."""
    known = _TYPES.get(found or "")
    if known is None:
        reason = _NOT_FILES.get(found or "")
        raise EngineError(
            reason or (f"a {found} cannot be mounted" if found else "no known filesystem"),
            subject=subject,
            hint=None if found else f"one that is damaged: -m {subject}:/:OPTIONS:TYPE",
        )
    return Kind(*known)


def refusal(error: OSError, kind: Kind, subject: str) -> EngineError | HostError:
    """Why the kernel did not mount it, as the user is told."""
    import errno

    if error.errno == errno.ENODEV:
        return HostError(
            f"the kernel does not know the filesystem {kind.type}",
            subject=subject,
            hint=f"modprobe {kind.type}, or --via fuse",
        )
    if error.errno == errno.EUCLEAN or error.errno == errno.EINVAL:
        log.info("%s: %s", subject, error.strerror)
        return EngineError(
            f"the kernel finds this {kind.type} damaged, or does not know it, or an option",
            subject=subject,
            hint="'dmesg' says which; --via fuse has another kernel read it",
        )
    told = program_messages.by_mount(error.strerror or "")
    return EngineError(f"it cannot be mounted: {told.means}", subject=subject, hint=told.step)


def ext_has_errors(device: str) -> bool:
    """Whether an ext filesystem says of itself that it has errors, which the kernel overlooks.

    Of its superblock, at byte 1024: magic and state (ext4.h in Linux's sources).
    """
    with Path(device).open("rb") as file:
        magic, state = _MAGIC_AND_STATE.unpack(os.pread(file.fileno(), 4, 1024 + 56))
    return bool(magic == 0xEF53 and state & 2)


def btrfs_devices(device: str) -> int:
    """On how many devices a btrfs lies, by its superblock (btrfs_tree.h in Linux's sources)."""
    with Path(device).open("rb") as file:
        head = os.pread(file.fileno(), 144, 64 << 10)
    if head[64:72] != b"_BHRfS_M":
        return 1
    return int.from_bytes(head[136:144], "little")


def has_type(name: str) -> bool:
    """Whether the kernel has this filesystem, which it may have to load."""
    if name not in kernel.filesystem_types():
        with contextlib.suppress(HostError):
            run(["modprobe", "-q", name], limits=_MOMENT)
    return name in kernel.filesystem_types()
