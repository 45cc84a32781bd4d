"""Which device a block device is, whatever it is called today.

`/dev/sdb` is another disk after the next start of the host, and a logical volume has as many names
as there are links to it. What lasts is what the kernel says of the hardware, or of a mapping:
the UUID of device-mapper (linux/Documentation/ABI/testing/sysfs-block-dm) and md, the file below a
loop device, a WWID, a serial number; and udev's names in /dev/disk/by-id that are made of those.
Where there is nothing of the kind, `diskseq` and the boot id tell one attachment from another
(Documentation/ABI/testing/sysfs-block): no other device ever has the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SYS = Path("/sys")
BY_ID = Path("/dev/disk/by-id")
_BOOT = Path("/proc/sys/kernel/random/boot_id")

# What the kernel tells that lasts, the best first; then udev's names. An identity is a list of
# `KIND:VALUE`: what lasts, then `part` and `partuuid` of a partition, then the attachment.
_LASTING = ("dm", "md", "loop", "wwid", "serial", "cid", "by-id")
_KNOWN = re.compile(rf"({'|'.join(_LASTING)}|part|partuuid|at|seq|boot):(.+)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]+:[0-9]+")
# Made for the whole world; other serial numbers are some maker's, and cheap hardware repeats them.
_UNIQUE = re.compile(r"(?:naa|eui|uuid)\.[0-9a-fA-F-]{16,}")
_UNIQUE_LINKS = ("wwn-", "scsi-3", "nvme-eui.", "nvme-uuid.")
# Of a link in by-id the kind of name: a device has others of another kind, and of one kind some.
_SCHEME = re.compile(r"scsi-.|nvme-(?:eui|uuid|nvme)\.|[^-]*")
# Names of what is on a device, or that somebody chose
_NOT_LASTING = ("dm-name-", "md-name-", "lvm-pv-uuid-")
_PART = re.compile(r"(.+)-part([0-9]+)")
_PAGE_80 = 4  # bytes before the serial number (SPC-4, 7.8.15)

# An inode's number is given to the next file once it is free; its generation is another then.
# ioctl of ext4, XFS, btrfs and others (linux/fs.h, _IOR('v', 1, long)).
_GET_GENERATION = 0x8008_7601
_GET_STATUS64 = 0x4C05  # linux/loop.h
_LOOP_INFO_SIZE = 232  # struct loop_info64
_LOOP_INFO_START = struct.Struct("=5Q")  # device, inode, rdevice, offset, sizelimit


def _line(path: Path) -> str:
    """What a file of sysfs says, on one line; empty where it is not there."""
    with contextlib.suppress(OSError):
        return " ".join(path.read_bytes().decode("utf-8", "replace").replace("\0", " ").split())
    return ""


def _node(number: int) -> Path:
    return Path(SYS, "dev/block", f"{os.major(number)}:{os.minor(number)}").resolve()


def identity(device: Path) -> list[str]:
    """What tells a block device from every other one, now and later."""
    number = device.stat().st_rdev
    node = _node(number)
    part = _line(node / "partition")
    disk = node.parent if part else node
    told = _told(disk)
    if "loop" not in told and (loop := _loop(device, disk)):
        told["loop"] = loop
    ids = [f"{kind}:{told[kind]}" for kind in _LASTING if told.get(kind)]
    twins = _has_twin(disk, told)
    if twins:
        ids = [one for one in ids if _UNIQUE.fullmatch(one.partition(":")[2])]
    ids += sorted(one for one in _links_to(number) if one not in ids and _counts(one, twins))
    if part:
        ids.append(f"part:{part}")
        uuid = re.search(rb"^PARTUUID=(\S+)$", _raw(node / "uevent"), re.MULTILINE)
        ids += [f"partuuid:{os.fsdecode(uuid[1]).lower()}"] if uuid else []
    return [*ids, *_attachment(number, node, disk)]


def _raw(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def _counts(link: str, twins: bool) -> bool:
    return not twins or link.partition(":")[2].startswith(_UNIQUE_LINKS)


def _told(disk: Path) -> dict[str, str]:
    """What the kernel says of a disk that lasts, by its kind."""
    model = " ".join(filter(None, (_line(disk / f"device/{x}") for x in ("vendor", "model"))))
    page = _raw(disk / "device/vpd_pg80")[_PAGE_80:].decode("ascii", "replace")
    serial = _line(disk / "serial") or _line(disk / "device/serial") or " ".join(page.split())
    found = {
        "dm": _line(disk / "dm/uuid"),
        "md": _hexadecimal(_line(disk / "md/uuid")),
        "wwid": _line(disk / "wwid") or _line(disk / "device/wwid"),
        "serial": f"{model} {serial}".strip() if _says(serial) else "",
        "cid": _line(disk / "device/cid"),
    }
    return {kind: value for kind, value in found.items() if _says(value)}


def _says(value: str) -> bool:
    """Whether something is there besides zeros, and the prefix of a WWID."""
    return bool(value.rpartition(".")[2].strip("0 -:"))


def _hexadecimal(uuid: str) -> str:
    """A UUID without what separates its digits, which the kernel and mdadm write differently."""
    return re.sub(r"[^0-9a-f]", "", uuid.lower())


def _has_twin(disk: Path, told: dict[str, str]) -> bool:
    """Whether another disk says the same of itself, and it is nothing that only one can say."""
    weak = {kind: told[kind] for kind in ("wwid", "serial", "cid") if kind in told}
    if "dm" in told or not weak or _UNIQUE.fullmatch(weak.get("wwid", "")):
        return False
    for other in (SYS / "block").glob("*"):
        if other.resolve() != disk:
            of_other = _told(other)
            if any(of_other.get(kind) == value for kind, value in weak.items()):
                return True
    return False


def _links_to(number: int) -> Iterable[str]:
    """Udev's lasting names of a device, as ids; of a partition those of its disk."""
    names = []
    with contextlib.suppress(OSError):
        for link in BY_ID.iterdir():
            with contextlib.suppress(OSError):
                if link.stat().st_rdev == number:
                    names.append(link.name)
    return {one for name in names if (one := _id_of_link(name)[0])}


def _id_of_link(name: str) -> tuple[str, str]:
    """The id that a name in by-id is, empty where it does not last, and the partition's number."""
    if name.startswith(_NOT_LASTING):
        return "", ""
    disk, number = name, ""
    if part := _PART.fullmatch(name):
        disk, number = part[1], part[2]
    for kind in ("dm", "md"):
        if disk.startswith(f"{kind}-uuid-"):
            uuid = disk.removeprefix(f"{kind}-uuid-")
            return f"{kind}:{_hexadecimal(uuid) if kind == 'md' else uuid}", number
    return f"by-id:{disk}", number


def _loop(device: Path, disk: Path) -> str:
    """The file that a loop device stands on, and the part of it; empty where the kernel does not
    tell this user, or it is not there any more."""
    name = _raw(disk / "loop/backing_file").removesuffix(b"\n")
    if not name:
        return ""
    with contextlib.suppress(OSError):
        is_part = _node(device.stat().st_rdev) != disk
        raw = _ioctl(Path("/dev", disk.name) if is_part else device, _GET_STATUS64, _LOOP_INFO_SIZE)
        on, inode, rdevice, offset, limit = _LOOP_INFO_START.unpack_from(raw)
        path = Path(os.fsdecode(name))
        file = path.stat()
        if stat.S_ISBLK(file.st_mode):
            below = next(filter(_lasts, identity(path)), None)
            return f"{below}+{offset}+{limit}" if below and rdevice == file.st_rdev else ""
        if (on, inode) != (file.st_dev, file.st_ino):
            return ""
        # Without a generation the number alone is another file's too.
        return f"{inode}+{next(iter(generation(path)), path)}+{offset}+{limit}"
    return ""


def generation(path: Path) -> list[int]:
    """The generation of a file's inode, where the file system has one and the file may be read."""
    with contextlib.suppress(OSError):
        return [int.from_bytes(_ioctl(path, _GET_GENERATION, 8)[:4], "little")]
    return []


def _ioctl(path: Path, request: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(descriptor, request, bytes(size))
    finally:
        os.close(descriptor)


def _attachment(number: int, node: Path, disk: Path) -> list[str]:
    """Which attachment of which boot a device is. Older kernels have no `diskseq`: there it is the
    number of its folder in sysfs, which no other gets either."""
    seq = _line(disk / "diskseq")
    if not seq:
        with contextlib.suppress(OSError):
            seq = f"inode {disk.stat().st_ino}"
    if pid := _line(disk / "pid"):  # of what serves a network block device
        seq += f" {pid}"
    found = {"at": f"{os.major(number)}:{os.minor(number)}", "seq": seq, "boot": _line(_BOOT)}
    return [f"{kind}:{value}" for kind, value in found.items() if value]


def _lasts(one: str) -> bool:
    return one.partition(":")[0] in _LASTING


def key_of(ids: list[str], device: Path) -> str:
    """A name for files about a device: of what lasts, or else its present name."""
    lasting = next(filter(_lasts, ids), None)
    if lasting is None:
        return names_of(device)[0]
    import hashlib  # seldom needed, and slow to load

    part = next((one for kind in ("partuuid:", "part:") for one in ids if one.startswith(kind)), "")
    digest = hashlib.sha256(f"{lasting}\0{part}".encode(errors="replace")).hexdigest()[:16]
    shown = re.sub(r"[^A-Za-z0-9.]+", "-", f"{lasting} {part}")[:80].strip("-")
    return f"dev-{shown}-{digest}"


def names_of(device: Path) -> list[str]:
    """Names for files about a device by its present name alone: the kernel's, and the one by which
    it was opened, as imgtool 0.1 had it."""
    node = _node(device.stat().st_rdev)
    opened = str(device.resolve()).strip("/").replace("/", "-")
    return [*([f"dev-{node.name.replace('!', '-')}"] if node.exists() else []), opened]


@dataclass(frozen=True)
class _Facts:
    """An identity by its kinds."""

    ids: dict[str, set[str]] = field(default_factory=dict)
    links: dict[str, set[str]] = field(default_factory=dict)
    part: str = ""
    partuuid: str = ""
    attachment: tuple[str, str, str] | None = None
    has_part: bool = True


def _facts(noted: object) -> _Facts | None:
    """An identity, also as imgtool 0.1 noted it: names in by-id, or number, diskseq and boot."""
    if not isinstance(noted, list) or not noted or not all(isinstance(x, str) for x in noted):
        return None
    if _NUMBER.fullmatch(noted[0]):
        attachment = (noted[0], noted[1], noted[2]) if len(noted) == 3 else None
        return _Facts(attachment=attachment, has_part=False)
    found: dict[str, set[str]] = {}
    for one in noted:
        if known := _KNOWN.fullmatch(one):
            found.setdefault(known[1], set()).add(known[2])
            continue
        id, part = _id_of_link(one)
        kind, _, value = id.partition(":")
        if id:
            found.setdefault(kind, set()).add(value)
        if part:
            found.setdefault("part", set()).add(part)
    links: dict[str, set[str]] = {}
    for link in found.pop("by-id", ()):
        scheme = _SCHEME.match(link)
        links.setdefault(scheme[0] if scheme else "", set()).add(link)
    at, seq, boot = (next(iter(found.get(kind, ())), "") for kind in ("at", "seq", "boot"))
    return _Facts(
        {kind: found[kind] for kind in _LASTING if kind in found},
        links,
        next(iter(found.get("part", ())), ""),
        next(iter(found.get("partuuid", ())), ""),
        (at, seq, boot) if at and seq and boot else None,
    )


def same_device(noted: object, now: list[str]) -> bool | None:
    """Whether an identity that was noted is that of the device that has this one now; None where
    nothing tells."""
    then, here = _facts(noted), _facts(now)
    if then is None or here is None:
        return None
    if then.has_part and not _same_part(then, here):
        return False
    kernel = _agree(then.ids, here.ids)
    if kernel is not None:
        return kernel
    if then.attachment is not None and then.attachment == here.attachment:
        return True
    agree = _agree(then.links, here.links)
    # Rules of udev change: a name of one kind that is another now tells nothing beside one that is
    # the same.
    shared = any(then.links[kind] & here.links[kind] for kind in then.links.keys() & here.links)
    return None if agree is False and shared else agree


def _same_part(then: _Facts, now: _Facts) -> bool:
    if then.partuuid and now.partuuid:
        return then.partuuid == now.partuuid
    return then.part == now.part


def _agree(then: dict[str, set[str]], now: dict[str, set[str]]) -> bool | None:
    """Whether the ids of each kind that both have have one in common; None if there is no kind."""
    both = then.keys() & now.keys()
    return all(then[kind] & now[kind] for kind in both) if both else None
