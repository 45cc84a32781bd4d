"""Which device of the guest a name means that the guest itself gives its devices, as in fstab.

Most names are told by the device: UUIDs, labels, names of volumes. Those that come from the guest's
hardware (`/dev/vda2`, `by-path`, `by-id`) are not in the image: a disk keeps its place among the
others, and a name of hardware means the only disk, or the one of which another name is known.

Sources: systemd, rules.d/60-persistent-storage*.rules, and util-linux, lib/mangle.c (how names are
escaped); lvm2, udev/11-dm-lvm.rules; fstab(5), crypttab(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from imgtool.guest.blocks import Block, contents
from imgtool.guest.model import Device

_PLAIN = re.compile(r"/dev/(?:[hsv]d|xvd|ubd)([a-z])(\d*)$")
_NUMBERED = re.compile(r"/dev/(?:nvme(\d+)n1|mmcblk(\d+))(?:p(\d+))?$")
_HARDWARE = re.compile(r"(/dev/disk/by-(?:id|path)/.+?)(?:-part(\d+))?$")
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")
_TAG = re.compile(r"(UUID|LABEL|PARTUUID|PARTLABEL)=(.*)", re.DOTALL)
_FOLDER = re.compile(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.+)", re.DOTALL)
_LVM = re.compile(r"/dev/disk/by-id/dm-uuid-LVM-(\w{64})$")
_CRYPT = re.compile(r"/dev/disk/by-id/dm-uuid-CRYPT-[A-Z0-9]+-([0-9a-f]{32})-.*")
_MAPPED = ("/dev/mapper/", "/dev/disk/by-id/dm-name-")
_ARRAYS = ("/dev/md", "/dev/disk/by-id/md-")


def mapper_to_volume(name: str) -> str:
    """`debian--vg-root`, a device-mapper name, as LVM's path `/dev/debian-vg/root`."""
    group, _, volume = name.replace("--", "\0").partition("-")
    return f"/dev/{group}/{volume}".replace("\0", "-")


def unescaped(name: str) -> str:
    r"""A name without udev's escapes: `my\x20disk`."""
    raw = name.encode("utf-8", "surrogateescape").decode("latin-1")
    plain = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), raw)
    return plain.encode("latin-1").decode("utf-8", "replace")


def parse_crypttab(content: bytes) -> dict[str, str]:
    """The names that crypttab(5) gives to what is in encrypted devices: name to device."""
    found: dict[str, str] = {}
    for line in content.decode("utf-8", "replace").splitlines():
        words = line.split()
        if len(words) > 1 and not words[0].startswith("#"):
            found.setdefault(words[0], words[1])
    return found


class DeviceNames:
    """The devices of a guest by any name; fstab may have thousands of them, and so may the guest.

    `hardware` tells which disk a name of hardware means, as far as that is known.
    """

    def __init__(
        self,
        filesystems: Iterable[Device],
        blocks: Sequence[Block],
        crypttab: Mapping[str, str] | None = None,
        hardware: Mapping[str, str] | None = None,
    ) -> None:
        self._filesystems = {filesystem.device for filesystem in filesystems}
        self._crypttab = crypttab or {}
        self._hardware = dict(hardware or {})
        self._known = {block.device for block in blocks}
        self._disks = [block.device for block in blocks if block.kind == "device"]
        self._arrays = [block.device for block in blocks if block.kind == "md"]
        self._inside = contents(blocks)
        # By each of their names, as it is written and in any case; of two the first.
        self._named: dict[tuple[str, str], str] = {}
        self._in_any_case: dict[tuple[str, str], str] = {}
        for block in blocks:
            self._index(block)

    def _index(self, block: Block) -> None:
        if block.is_member:
            return
        for kind in ("uuid", "label", "partuuid", "partlabel", "dm_uuid"):
            if value := getattr(block, kind):
                self._named.setdefault((kind, value), block.device)
        for kind in ("uuid", "partuuid"):
            if value := getattr(block, kind):
                self._in_any_case.setdefault((kind, value.lower()), block.device)
        if block.uuid:
            self._named.setdefault(("plain", block.uuid.replace("-", "").lower()), block.device)

    def _with(self, kind: str, value: str) -> str | None:
        found = self._named.get((kind, value))
        # In upper or in lower case, depending on who wrote it.
        return found or self._in_any_case.get((kind, value.lower()))

    def learn(self, spec: str, device: str) -> None:
        """Take in that `spec` is the guest's name of `device`."""
        named = _HARDWARE.match(_by_id(spec))
        if named is not None:
            disk = device.removesuffix(named[2] or "")
            if disk in self._disks:
                self._hardware[named[1]] = disk

    def device(self, spec: str) -> str | None:
        """The device that `spec` means: a filesystem's, or an encrypted one that is locked.

        None if there is none, or nobody can tell which.
        """
        spec = _by_id(spec)
        found = self._told_by_itself(spec)
        if found is None:
            found = self._told_by_place(spec)
        if found is None:
            return None
        found = self._inside.get(found, found)
        return found if found in self._filesystems else None

    def _told_by_itself(self, spec: str) -> str | None:
        if tag := _TAG.match(spec):
            return self._with(tag[1].lower(), _unquoted(tag[2]))
        if folder := _FOLDER.match(spec):
            return self._with(folder[1], unescaped(folder[2]))
        if lvm := _LVM.match(spec):
            return self._with("dm_uuid", lvm[1])
        if crypt := _CRYPT.match(spec):
            return self._with("plain", crypt[1])
        for prefix in _MAPPED:
            if spec.startswith(prefix):
                return self._mapped(unescaped(spec.removeprefix(prefix)))
        return spec if spec in self._known and not _PLAIN.match(spec) else None

    def _mapped(self, name: str) -> str | None:
        for device in (mapper_to_volume(name), f"/dev/mapper/{name}"):
            if device in self._known:
                return device
        spec = self._crypttab.get(name)
        return None if spec is None else self._told_by_itself(spec) or self._told_by_place(spec)

    def _told_by_place(self, spec: str) -> str | None:
        disks = self._disks
        if spec.startswith(_ARRAYS):
            return self._arrays[0] if len(self._arrays) == 1 else None
        if plain := _PLAIN.match(spec):
            index, partition = ord(plain[1]) - ord("a"), plain[2]
        elif numbered := _NUMBERED.match(spec):
            index, partition = int(numbered[1] or numbered[2]), numbered[3] or ""
        elif hardware := _HARDWARE.match(spec):
            disk = self._hardware.get(hardware[1]) or (disks[0] if len(disks) == 1 else None)
            return None if disk is None else f"{disk}{hardware[2] or ''}"
        else:
            return None
        return f"{disks[index]}{partition}" if index < len(disks) else None


def _by_id(spec: str) -> str:
    """`ID=`, a tag of newer libmount, as the folder that it stands for."""
    if spec.startswith("ID="):
        return f"/dev/disk/by-id/{_unquoted(spec.removeprefix('ID='))}"
    return spec


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value
