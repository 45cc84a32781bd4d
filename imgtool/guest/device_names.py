"""Which device of the guest a name means that the guest itself gives its devices, as in fstab.

Most names are told by the device: UUIDs, labels, names of volumes. Those that come from the guest's
hardware (`/dev/vda2`, `by-path`, `by-id`) are not in the image: a disk keeps its place among the
others, and a name of hardware means the only disk, or the one of which another name is known. That
is a guess: a disk that was not given may be the one that is meant. Where two are as likely there is
none: a label that two filesystems have, the names of disks of two kinds.

Sources: systemd, rules.d/60-persistent-storage*.rules, and util-linux, lib/mangle.c (how names are
escaped); lvm2, udev/11-dm-lvm.rules; fstab(5), crypttab(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from imgtool.formats.numbers import whole_number
from imgtool.guest.blocks import LOCKED, Block, contents
from imgtool.guest.model import Device

_PLAIN = re.compile(r"(/dev/(?:[hsv]d|xvd|ubd))([a-z]{1,3})([0-9]*)")
_NUMBERED = re.compile(r"(/dev/(?:nvme(?=[0-9]+n1)|mmcblk))([0-9]+)(?:n1)?(?:p([0-9]+))?")
# Not what stands on a disk, such as a volume: that has no place.
_HARDWARE = re.compile(
    r"(/dev/disk/by-(?:id|path)/(?!dm-(?!uuid-mpath)|md-|lvm-).+?)(?:-part([0-9]+))?"
)
# Of a name in one of these folders what tells the kind of name; a disk has one of each kind.
_SCHEME = re.compile(r"/dev/disk/by-(?:id/(?:scsi-.|nvme-(?:eui|uuid|nvme)|[^-]*)|path/)")
# Which kinds of names one disk can have: what has a name of one kind is no disk of another.
_BUSES = (
    re.compile(r"/dev/(?:sd|disk/by-id/(?:ata|scsi-.|usb|wwn|dm|ieee1394))"),
    re.compile(r"/dev/(?:hd|disk/by-id/(?:ata|scsi-.))"),
    re.compile(r"/dev/(?:vd|disk/by-id/virtio)"),
    re.compile(r"/dev/(?:nvme|disk/by-id/(?:nvme|wwn))"),
    re.compile(r"/dev/(?:mmcblk|disk/by-id/mmc)"),
    re.compile(r"/dev/xvd"),
    re.compile(r"/dev/ubd"),
)
_KERNEL = "the kernel's"  # a kind of names that goes on from one driver to the next
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")
_TAG = re.compile(r"(UUID|LABEL|PARTUUID|PARTLABEL)=(.*)", re.DOTALL)
_FOLDER = re.compile(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.+)", re.DOTALL)
_LVM = re.compile(r"/dev/disk/by-id/dm-uuid-LVM-([A-Za-z0-9]{64})")
_CRYPT = re.compile(r"/dev/disk/by-id/dm-uuid-CRYPT-[A-Z0-9]+-([0-9a-f]{32})-.*", re.DOTALL)
_MAPPED = ("/dev/mapper/", "/dev/disk/by-id/dm-name-")
_ARRAY = re.compile(
    r"/dev/(?:md_?d?[0-9]+(?:p([0-9]+))?|(?:md/|disk/by-id/md-).+?(?:(?:-part|p)([0-9]+))?)",
    re.DOTALL,
)
_LOST = "\ufffd"  # stands for bytes that are not UTF-8: two names with it need not be the same
_MOST_LAYERS = 8  # of encryption, one in the other


class Named(NamedTuple):
    """The device that a name means; `guessed` if only its place among the others tells so."""

    device: str
    guessed: bool


class _Place(NamedTuple):
    """A name of hardware: `disk` is that of the disk, `scheme` the kind of name, `number` its place
    among the disks, if the name tells, and `partition` a number or empty."""

    disk: str
    scheme: str
    number: int | None
    partition: str


def _place(spec: str) -> _Place | None:
    if plain := _PLAIN.fullmatch(spec):
        return _Place(plain[1] + plain[2], plain[1], _index(plain[2]), plain[3])
    numbered = _NUMBERED.fullmatch(spec)
    if numbered and (number := whole_number(numbered[2])) is not None:
        return _Place(numbered[1] + numbered[2], numbered[1], number, numbered[3] or "")
    if (hardware := _HARDWARE.fullmatch(spec)) and (scheme := _SCHEME.match(spec)):
        return _Place(hardware[1], scheme[0], None, hardware[2] or "")
    return None


def _index(letters: str) -> int:
    """The place of `sda`, `sdz`, `sdaa`: from 0 on."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def mapper_to_volume(name: str) -> str | None:
    """`debian--vg-root`, a device-mapper name, as LVM's path `/dev/debian-vg/root`; None for a name
    that LVM would not give: within a name it doubles the dashes."""
    group, _, volume = name.replace("--", "\0").partition("-")
    if not group or not volume or "-" in volume:
        return None
    return f"/dev/{group}/{volume}".replace("\0", "-")


def unescape(name: str) -> str:
    r"""A name without udev's escapes: `my\x20disk`."""
    raw = name.encode("utf-8", "surrogateescape").decode("latin-1")
    plain = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), raw)
    return plain.encode("latin-1").decode("utf-8", "replace")


def parse_crypttab(content: bytes) -> dict[str, str]:
    """The names that crypttab(5) gives to what is in encrypted devices: name to device."""
    found: dict[str, str] = {}
    for line in content.decode("utf-8", "replace").split("\n"):
        words = [word for word in re.split(r"[ \t\r]+", line) if word]
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
        self._parents = {block.device: block.parents for block in blocks}
        # Which disk a name of hardware means, as far as that is known.
        self._hardware: dict[str, str] = {}
        self._known_as: dict[str, dict[str, str]] = {}  # the names of a disk, by their kind
        self._schemes: dict[str, set[str]] = {}
        self._buses: set[re.Pattern[str]] | None = None  # those that all names can be of
        for spec in (*specs, *self._crypttab.values()):
            if place := _place(_by_id(spec)):
                self._take_in(place)
        self._known = {block.device for block in blocks}
        self._locked = {block.device for block in blocks if block.type in LOCKED}
        self._btrfs = {block.device for block in blocks if block.type == "btrfs"}
        # What keys have opened has a name of imgtool's, which is none of the guest's.
        self._named_by_us = {block.device for block in blocks if block.kind == "mapped"}
        self._disks = [block.device for block in blocks if block.kind == "device"]
        self._arrays = [block.device for block in blocks if block.kind == "md"]
        self._inside = contents(blocks)
        # By each of their names, as it is written and in any case.
        self._named: dict[tuple[str, str], list[str]] = {}
        self._in_any_case: dict[tuple[str, str], list[str]] = {}
        self._asked: dict[tuple[str, str], list[str]] = {}
        for block in blocks:
            self._index(block)

    def _take_in(self, place: _Place) -> None:
        if place.scheme not in self._schemes:
            self._schemes[place.scheme] = set()
            buses = {bus for bus in _BUSES if bus.match(place.scheme)}
            if buses:  # others go with any, such as by-path
                self._buses = buses if self._buses is None else self._buses & buses
        self._schemes[place.scheme].add(place.disk)

    def _index(self, block: Block) -> None:
        if block.is_member:
            return
        for kind in ("uuid", "label", "partuuid", "partlabel", "dm_uuid"):
            if (value := getattr(block, kind)) and _LOST not in value:
                self._named.setdefault((kind, value), []).append(block.device)
        for kind in ("uuid", "partuuid"):
            if value := getattr(block, kind):
                self._in_any_case.setdefault((kind, value.lower()), []).append(block.device)
        if block.uuid and block.device in self._locked:
            plain = block.uuid.replace("-", "").lower()
            self._named.setdefault(("plain", plain), []).append(block.device)

    def _with(self, kind: str, value: str) -> list[str]:
        """The devices of this name."""
        found = self._named.get((kind, value))
        # In upper or in lower case, depending on who wrote it.
        found = found or self._in_any_case.get((kind, value.lower()), [])
        if len(found) < 2:
            return found
        if (kind, value) not in self._asked:
            self._asked[kind, value] = self._apart(found)
        return self._asked[kind, value]

    def _apart(self, found: Sequence[str]) -> list[str]:
        """Those devices that do not hold one another, nor are parts of one filesystem."""
        inside = dict.fromkeys(self._inside.get(device, device) for device in found)
        # A disk and the partition at its start are one filesystem, as on an image of a CD.
        apart = [one for one in inside if not inside.keys() & set(self._parents.get(one, ()))]
        return apart[:1] if self._btrfs.issuperset(apart) else apart

    def several(self, spec: str) -> list[str]:
        """The devices that `spec` may mean where it means several, so that `find` finds none."""
        spec = _by_id(spec)
        if _ARRAY.fullmatch(spec):
            return self._arrays if len(self._arrays) > 1 else []
        found = self._by_tag(spec)
        return found if found is not None and len(found) > 1 else []

    def learn(self, spec: str, device: str) -> None:
        """Take in that `spec` is the guest's name of `device`."""
        place = _place(_by_id(spec))
        if place is not None:
            self._take_in(place)
            disk = device.removesuffix(place.partition)
            if disk in self._disks:
                self._hardware[place.disk] = disk
                kind = place.scheme if place.number is None else _KERNEL
                self._known_as.setdefault(disk, {})[kind] = place.disk

    def find(self, spec: str) -> Named | None:
        """The device that `spec` means: a filesystem's, or an encrypted one that is locked.

        None if there is none, or nobody can tell which.
        """
        spec = _by_id(spec)
        if _LOST in spec:
            return None
        found = self._told_by_itself(spec) or self._told_by_place(spec)
        if found is None:
            return None
        device = self._inside.get(found.device, found.device)
        return Named(device, found.guessed) if device in self._filesystems else None

    def _by_tag(self, spec: str) -> list[str] | None:
        """The devices that have what a spec says of its device; None for another kind of name."""
        if tag := _TAG.fullmatch(spec):
            return self._with(tag[1].lower(), _unquote(tag[2]))
        if folder := _FOLDER.fullmatch(spec):
            return self._with(folder[1], unescape(folder[2]))
        if lvm := _LVM.fullmatch(spec):
            return self._with("dm_uuid", lvm[1])
        if crypt := _CRYPT.fullmatch(spec):
            return self._with("plain", crypt[1])
        return None

    def _told_by_itself(self, spec: str) -> Named | None:
        if (name := _mapper_name(spec)) is not None:
            return self._find_mapped(name)
        found = self._by_tag(spec)
        if found is not None:
            return Named(found[0], guessed=False) if len(found) == 1 else None
        by_hardware = _place(spec) is not None or _ARRAY.fullmatch(spec) is not None
        if spec in self._known and not by_hardware:
            return Named(spec, guessed=False)
        return None

    def _find_mapped(self, name: str) -> Named | None:
        for layers in range(_MOST_LAYERS):
            for device in (mapper_to_volume(name) or "", f"/dev/mapper/{name}"):
                if device in self._known and device not in self._named_by_us:
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
        if array := _ARRAY.fullmatch(spec):
            return self._array(array[1] or array[2] or "")
        place = _place(spec)
        if place is None:
            return None
        disk = self._hardware.get(place.disk) or self._disk_at(place)
        return None if disk is None else Named(f"{disk}{place.partition}", guessed=True)

    def _array(self, partition: str) -> Named | None:
        """The only array, by whichever name: the number that the kernel gave it does not last."""
        if len(self._arrays) != 1:
            return None
        part = f"{self._arrays[0]}p{partition}"
        if partition and part in self._known:
            return Named(part, guessed=True)
        # A name such as md/raid-p1 may end so by itself.
        split = any(self._arrays[0] in parents for parents in self._parents.values())
        return None if partition and split else Named(self._arrays[0], guessed=True)

    def _disk_at(self, place: _Place) -> str | None:
        """The disk that a name of which nothing is known seems to mean."""
        disks = self._disks
        if self._buses is not None and not self._buses:
            return None  # of disks of two kinds the place of one among the others tells nothing
        names = self._schemes.get(place.scheme, set())
        if place.number is None:
            # Of two names of one kind the one would be that of a disk that is not here.
            several = len(names) > (place.disk in names)
            disk = disks[0] if len(disks) == 1 and not several else None
        else:
            disk = disks[place.number] if place.number < len(disks) else None
        if disk is None:
            return None
        # The guest may have counted its disks in another order, or it is a disk of another kind.
        kind = place.scheme if place.number is None else _KERNEL
        known_as = self._known_as.get(disk, {}).get(kind, place.disk)
        return disk if known_as == place.disk else None


def _mapper_name(spec: str) -> str | None:
    for prefix in _MAPPED:
        if spec.startswith(prefix):
            return unescape(spec.removeprefix(prefix))
    return None


def _by_id(spec: str) -> str:
    """`ID=`, a tag of newer libmount, as the folder that it stands for."""
    if spec.startswith("ID="):
        return f"/dev/disk/by-id/{_unquote(spec.removeprefix('ID='))}"
    return spec


def _unquote(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value
