"""The appliance's answers to layout discovery, encrypted devices opened on the way."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from imgtool.engines.libguestfs.calls import Calls
from imgtool.errors import EngineError, HostError
from imgtool.guest.keys import Key
from imgtool.guest.layout import BTRFS_VOLUME, SMALL_FILE
from imgtool.guest.model import Device

log = logging.getLogger(__name__)

_SCSI_DISKS = (
    'for d in /sys/block/sd*; do echo "${d##*/} $(basename "$(readlink "$d/device")")"; done'
)
_ON_DISK = re.compile(
    re.escape(BTRFS_VOLUME) + r"(?P<disk>/dev/sd[a-z]+)(?P<rest>[0-9]*/.*)", re.DOTALL
)


def reason(error: RuntimeError) -> str:
    """What a failed call says, in one line and without the call's own name."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "unknown error"
    parts = text.split(": ")
    return ": ".join(parts[1:]) if len(parts) > 1 else text


def guest_names(handle: Any, sources: Iterable[str]) -> dict[str, str]:
    """Each source as libguestfs reports it, with the name that its calls take.

    libguestfs numbers the guest's disks in the order in which they were added, whatever the
    appliance's kernel calls them: `/dev/sda` may be the kernel's `/dev/sdb`. It translates the
    devices in its answers, but not those within btrfs subvolumes' names (1.48).
    """
    names = {source: source for source in sources}
    subvolumes = [source for source in names if is_subvolume(source)]
    if not subvolumes:
        return names
    try:
        listed = handle.debug("sh", [_SCSI_DISKS])
    except RuntimeError as error:
        raise EngineError(f"the disks cannot be listed: {reason(error)}") from error
    rows = [line.split() for line in listed.splitlines()]
    by_address = sorted((tuple(map(int, row[1].split(":"))), row[0]) for row in rows)
    kernel = [f"/dev/{name}" for _, name in by_address]
    given = dict(zip(kernel, handle.list_devices(), strict=False))  # the last is the appliance's
    for source in subvolumes:
        matched = _ON_DISK.fullmatch(source)
        if matched and matched["disk"] in given:
            names[source] = f"{BTRFS_VOLUME}{given[matched['disk']]}{matched['rest']}"
    return names


class ApplianceVolume:
    """The filesystem that is mounted at `/` at this moment."""

    def __init__(self, handle: Any, calls: Calls) -> None:
        self._handle = handle
        self._calls = calls

    def read(self, path: str, limit: int = SMALL_FILE) -> bytes | None:
        """The first `limit` bytes of a regular file; None if there is none."""
        try:
            if not self._handle.is_file(path, followsymlinks=True):
                return None
            return bytes(self._handle.pread(path, limit, 0))
        except RuntimeError as error:
            log.debug("reading %s: %s", path, reason(error))
            return None

    def is_dir(self, path: str) -> bool:
        """Whether the path is a directory; any case where the filesystem ignores it."""
        try:
            if self._handle.is_dir(path, followsymlinks=True):
                return True
            if "Windows" not in path:
                return False
            found = self._calls.case_sensitive_path(path.encode())
            return bool(self._handle.is_dir(found.decode("utf-8", "replace")))
        except (RuntimeError, EngineError):
            return False


class ApplianceVolumes:
    """The guest's filesystems as the appliance lists them."""

    def __init__(self, handle: Any, calls: Calls, keys: Sequence[Key]) -> None:
        self._handle = handle
        self._calls = calls
        self._keys = keys
        self._opened: set[str] = set()
        self._filesystems: tuple[Device, ...] | None = None

    def disks(self) -> Sequence[str]:
        """The guest's disks in their order."""
        return list(self._handle.list_devices())

    def _unlock(self, device: str) -> bool:
        handle = self._handle
        try:
            uuid = handle.luks_uuid(device)
        except RuntimeError:
            uuid = ""
        for key in self._keys:
            if not key.fits(device, uuid):
                continue
            name = f"imgtool-luks{len(self._opened)}"
            try:
                handle.cryptsetup_open(device, key.passphrase, name)
            except RuntimeError as error:
                log.info("%s: the key %r does not open it: %s", device, key.selector, error)
                continue
            self._opened.add(device)
            return True
        return False

    def filesystems(self) -> Sequence[Device]:
        """The filesystems; LUKS devices that a key opens are replaced by what is in them."""
        if self._filesystems is None:
            found = self._listed()
            while self._keys:
                closed = [d for d, t in found.items() if t == "crypto_LUKS"]
                unlocked = [d for d in closed if d not in self._opened and self._unlock(d)]
                if not unlocked:
                    break
                self._handle.lvm_scan(True)
                found = self._listed()
            self._filesystems = tuple(
                Device("filesystem", name, None if kind == "unknown" else kind)
                for name, kind in found.items()
                if name not in self._opened
            )
        return self._filesystems

    def _listed(self) -> dict[str, str]:
        """The filesystems, and what libguestfs leaves out: LUKS devices, and what is in them."""
        handle = self._handle
        try:
            listed = handle.list_filesystems()
            names = guest_names(handle, listed)
            found = {names[source]: kind for source, kind in listed.items()}
            partitions = set(handle.list_partitions())
            whole = {handle.part_to_dev(partition) for partition in partitions}
            others = {*handle.list_devices(), *handle.lvs(), *partitions} - whole
            for device in sorted(others - found.keys()):
                if self._type(device) == "crypto_LUKS":
                    found[device] = "crypto_LUKS"
            for device in handle.list_dm_devices():
                kind = self._type(device)
                if kind and kind != "LVM2_member":
                    found[device] = kind
        except RuntimeError as error:
            raise EngineError(f"the filesystems cannot be listed: {reason(error)}") from error
        return found

    def _type(self, device: str) -> str:
        try:
            return str(self._handle.vfs_type(device))
        except RuntimeError:
            return ""

    @contextlib.contextmanager
    def look_into(self, source: str) -> Iterator[ApplianceVolume]:
        """Mount one filesystem, read-only, for as long as the block runs."""
        try:
            self._handle.mount_ro(source, "/")
        except RuntimeError as error:
            raise EngineError(reason(error), subject=source) from error
        try:
            yield ApplianceVolume(self._handle, self._calls)
        finally:
            self._handle.umount_all()

    def device_with(self, kind: str, value: str) -> str | None:
        """The device with this filesystem `uuid` or `label`, GPT `partuuid` or `partlabel`."""
        handle = self._handle
        try:
            if kind == "uuid":
                return str(handle.findfs_uuid(value))
            if kind == "label":
                return str(handle.findfs_label(value))
        except RuntimeError:
            return None
        for partition in handle.list_partitions():
            with contextlib.suppress(RuntimeError):  # not GPT, or no number
                disk = handle.part_to_dev(partition)
                number = handle.part_to_partnum(partition)
                if kind == "partuuid":
                    found = handle.part_get_gpt_guid(disk, number)
                else:
                    found = handle.part_get_name(disk, number)
                if found.lower() == value.lower():
                    return str(partition)
        return None

    def subvolume_by_id(self, device: str, number: int) -> str | None:
        """The path of the btrfs subvolume with this id."""
        try:
            listed = self._handle.btrfs_subvolume_list(device)
        except RuntimeError as error:
            raise HostError(f"the subvolumes cannot be listed: {reason(error)}") from error
        for row in listed:
            if row["btrfssubvolume_id"] == number:
                return str(row["btrfssubvolume_path"])
        return None


def is_subvolume(source: str) -> bool:
    """Whether a source names a btrfs subvolume rather than a device."""
    return source.startswith(BTRFS_VOLUME)
