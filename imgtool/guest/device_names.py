"""Which device of the guest a name means that the guest itself gives its devices, as in fstab.

Most names are told by the device: UUIDs, labels, names of volumes. Those that come from the guest's
hardware (`/dev/vda2`, `by-path`, `by-id`) are not in the image: a disk keeps its place among the
others, and a name of hardware means the only disk, or the one of which another name is known. That
is a guess: a disk that was not given may be the one that is meant.

Sources: systemd, rules.d/60-persistent-storage*.rules, and util-linux, lib/mangle.c (how names are
escaped); lvm2, udev/11-dm-lvm.rules; fstab(5), crypttab(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from imgtool.guest.blocks import LOCKED, Block, contents
from imgtool.guest.model import Device
from imgtool.guest.numbers import whole_number

_PLAIN = re.compile(r"(/dev/(?:[hsv]d|xvd|ubd))([a-z])([0-9]*)$")
_NUMBERED = re.compile(r"(/dev/(?:nvme(?=[0-9]+n1)|mmcblk))([0-9]+)(?:n1)?(?:p([0-9]+))?$")
# Not what stands on a disk, such as a volume: that has no place.
_HARDWARE = re.compile(
    r"(/dev/disk/by-(?:id|path)/(?!dm-(?!uuid-mpath)|md-|lvm-).+?)(?:-part([0-9]+))?$"
)
# Of a name in one of these folders what tells the kind of name; a disk has one of each kind.
_SCHEME = re.compile(r"/dev/disk/by-(?:id/(?:scsi-.|nvme-(?:eui|uuid|nvme)|[^-]*)|path/)")
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")
_TAG = re.compile(r"(UUID|LABEL|PARTUUID|PARTLABEL)=(.*)", re.DOTALL)
_FOLDER = re.compile(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.+)", re.DOTALL)
_LVM = re.compile(r"/dev/disk/by-id/dm-uuid-LVM-(\w{64})$")
_CRYPT = re.compile(r"/dev/disk/by-id/dm-uuid-CRYPT-[A-Z0-9]+-([0-9a-f]{32})-.*")
_MAPPED = ("/dev/mapper/", "/dev/disk/by-id/dm-name-")
_ARRAYS = ("/dev/md", "/dev/disk/by-id/md-")
_MOST_LAYERS = 8  # of encryption, one in the other


@dataclass(frozen=True)
class Named:
    """The device that a name means; `guessed` if only its place among the others tells so."""

    device: str
    guessed: bool


@dataclass(frozen=True)
class _Place:
    """A name of hardware: `disk` is that of the disk, `scheme` the kind of name, `index` its place
    among the disks, if the name tells, and `partition` a number or empty."""

    disk: str
    scheme: str
    index: int | None
    partition: str


def _place(spec: str) -> _Place | None:
    if plain := _PLAIN.match(spec):
        return _Place(plain[1] + plain[2], plain[1], ord(plain[2]) - ord("a"), plain[3])
    numbered = _NUMBERED.match(spec)
    if numbered and (index := whole_number(numbered[2])) is not None:
        return _Place(numbered[1] + numbered[2], numbered[1], index, numbered[3] or "")
    if (hardware := _HARDWARE.match(spec)) and (scheme := _SCHEME.match(spec)):
        return _Place(hardware[1], scheme[0], None, hardware[2] or "")
    return None


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

    `specs` are the names that the guest uses: of two disks that it tells apart, one that is given
    alone could be either.
    """

    def __init__(
        self,
        filesystems: Iterable[Device],
        blocks: Sequence[Block],
        crypttab: Mapping[str, str] | None = None,
        specs: Iterable[str] = (),
    ) -> None:
        self._filesystems = {filesystem.device for filesystem in filesystems}
        self._crypttab = crypttab or {}
        # Which disk a name of hardware means, as far as that is known.
        self._hardware: dict[str, str] = {}
        self._schemes: dict[str, set[str]] = {}
        for spec in specs:
            if place := _place(_by_id(spec)):
                self._schemes.setdefault(place.scheme, set()).add(place.disk)
        self._known = {block.device for block in blocks}
        self._locked = {block.device for block in blocks if block.type in LOCKED}
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
        place = _place(_by_id(spec))
        if place is not None:
            self._schemes.setdefault(place.scheme, set()).add(place.disk)
            disk = device.removesuffix(place.partition)
            if disk in self._disks:
                self._hardware[place.disk] = disk

    def find(self, spec: str) -> Named | None:
        """The device that `spec` means: a filesystem's, or an encrypted one that is locked.

        None if there is none, or nobody can tell which.
        """
        spec = _by_id(spec)
        found = self._told_by_itself(spec) or self._told_by_place(spec)
        if found is None:
            return None
        device = self._inside.get(found.device, found.device)
        return Named(device, found.guessed) if device in self._filesystems else None

    def _told_by_itself(self, spec: str) -> Named | None:
        if (name := _mapper_name(spec)) is not None:
            return self._mapped(name)
        device: str | None = None
        if tag := _TAG.match(spec):
            device = self._with(tag[1].lower(), _unquoted(tag[2]))
        elif folder := _FOLDER.match(spec):
            device = self._with(folder[1], unescaped(folder[2]))
        elif lvm := _LVM.match(spec):
            device = self._with("dm_uuid", lvm[1])
        elif crypt := _CRYPT.match(spec):
            device = self._with("plain", crypt[1])
        elif spec in self._known and _place(spec) is None:
            device = spec
        return None if device is None else Named(device, guessed=False)

    def _mapped(self, name: str) -> Named | None:
        for layers in range(_MOST_LAYERS):
            for device in (mapper_to_volume(name), f"/dev/mapper/{name}"):
                if device in self._known:
                    return self._layers_in(Named(device, guessed=False), layers)
            spec = _by_id(self._crypttab.get(name, ""))
            inner = _mapper_name(spec)
            if inner is None:
                found = self._told_by_itself(spec) or self._told_by_place(spec)
                # What is encrypted has to look like it, or it is another disk's.
                if found is None or found.device not in self._locked:
                    return None
                return self._layers_in(found, layers)
            name = inner
        return None

    def _layers_in(self, found: Named, layers: int) -> Named:
        device = found.device
        for _ in range(layers):
            device = self._inside.get(device, device)
        return Named(device, found.guessed)

    def _told_by_place(self, spec: str) -> Named | None:
        if spec.startswith(_ARRAYS):
            return Named(self._arrays[0], guessed=True) if len(self._arrays) == 1 else None
        place = _place(spec)
        if place is None:
            return None
        disk = self._hardware.get(place.disk) or self._disk_at(place)
        return None if disk is None else Named(f"{disk}{place.partition}", guessed=True)

    def _disk_at(self, place: _Place) -> str | None:
        """The disk that a name of which nothing is known seems to mean."""
        disks = self._disks
        if place.index is None:
            # Of two names of one kind the one would be that of a disk that is not here.
            several = self._schemes.get(place.scheme, set()) - {place.disk}
            return disks[0] if len(disks) == 1 and not several else None
        if place.index >= len(disks):
            return None
        disk = disks[place.index]
        # The guest may have counted its disks in another order.
        for name, known in self._hardware.items():
            if known == disk and name.startswith(place.scheme) and name != place.disk:
                return None
        return disk


def _mapper_name(spec: str) -> str | None:
    for prefix in _MAPPED:
        if spec.startswith(prefix):
            return unescaped(spec.removeprefix(prefix))
    return None


def _by_id(spec: str) -> str:
    """`ID=`, a tag of newer libmount, as the folder that it stands for."""
    if spec.startswith("ID="):
        return f"/dev/disk/by-id/{_unquoted(spec.removeprefix('ID='))}"
    return spec


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value
