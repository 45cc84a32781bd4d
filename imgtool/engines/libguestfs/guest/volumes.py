"""The appliance's answers to layout discovery, encrypted devices opened on the way."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from imgtool.engines.libguestfs.guest.blocks import list_blocks
from imgtool.engines.libguestfs.guest.calls import Calls
from imgtool.engines.libguestfs.guest.sets import Sets, look_at
from imgtool.errors import EngineError, HostError
from imgtool.guest.blocks import LOCKED, Block, filesystems_on, locked_devices
from imgtool.guest.keys import Key, keys_told
from imgtool.guest.layout import BTRFS_VOLUME, LAYOUT_FILE_LIMIT
from imgtool.guest.model import Device
from imgtool.host import program_messages

log = logging.getLogger(__name__)

_ON_DISK = re.compile(
    re.escape(BTRFS_VOLUME) + r"/dev/(?P<disk>sd[a-z]+)(?P<rest>[0-9]*/.*)", re.DOTALL
)


def reason(error: RuntimeError) -> str:
    """What a failed call says, in one line and without the call's own name."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "unknown error"
    parts = text.split(": ")
    return ": ".join(parts[1:]) if len(parts) > 1 else text


def guest_names(blocks: Sequence[Block], sources: Iterable[str]) -> dict[str, str]:
    """Each source as libguestfs reports it, with the name that its calls take.

    libguestfs translates the kernel's disk names in its answers to its own, but not those within
    the names of btrfs subvolumes (1.48).
    """
    disks = {block.kernel: block.device for block in blocks if block.kind == "device"}
    names = {}
    for source in sources:
        matched = _ON_DISK.fullmatch(source)
        if matched and matched["disk"] in disks:
            names[source] = f"{BTRFS_VOLUME}{disks[matched['disk']]}{matched['rest']}"
        else:
            names[source] = source
    return names


class ApplianceVolume:
    """The filesystem that is mounted at `/` at this moment."""

    def __init__(self, handle: Any, calls: Calls) -> None:
        self._handle = handle
        self._calls = calls

    def read(self, path: str, limit: int = LAYOUT_FILE_LIMIT) -> bytes | None:
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
    """The guest's filesystems as the appliance sees them."""

    def __init__(
        self,
        handle: Any,
        calls: Calls,
        keys: Sequence[Key],
        notice: Callable[[str], None],
        *,
        write: bool = False,
    ) -> None:
        self._handle = handle
        self._calls = calls
        self._keys = keys
        self._notice = notice
        self._write = write
        self._sets = Sets()
        self._opened: set[str] = set()
        self._blocks: tuple[Block, ...] | None = None
        self._filesystems: tuple[Device, ...] | None = None
        # What statvfs said while a filesystem was mounted to be looked into: a mount takes longer.
        self.space: dict[str, dict[str, int]] = {}

    def blocks(self) -> Sequence[Block]:
        """The block devices, with what is in the encrypted ones that a key opens."""
        if self._blocks is None:
            started = time.monotonic()
            found = self._list_blocks()
            while self._keys:
                closed = [b for b in found if b.type in LOCKED and b.device not in self._opened]
                unlocked = [b for b in closed if self._unlock(b)]
                if not unlocked:
                    break
                self._handle.lvm_scan(True)
                found = self._list_blocks()
            self._blocks = found
            for line in self._sets.lines:
                self._notice(line)
            encrypted = {b.device: b.uuid or "" for b in found if b.type in LOCKED}
            for line in keys_told(self._keys, encrypted, locked_devices(found)):
                self._notice(line)
            log.info("block devices: listed in %.1f s", time.monotonic() - started)
        return self._blocks

    def _list_blocks(self) -> tuple[Block, ...]:
        found, lacking = list_blocks(self._handle)
        self._sets = look_at(self._handle, found, lacking=lacking, write=self._write)
        if self._sets.changed:
            found, _ = list_blocks(self._handle)
        return tuple(block for block in found if block.device not in self._sets.idle)

    def block(self, device: str) -> Block | None:
        """The block device of this name."""
        return next((block for block in self.blocks() if block.device == device), None)

    def _unlock(self, block: Block) -> bool:
        handle, device = self._handle, block.device
        for key in self._keys:
            if not key.fits(device, block.uuid or ""):
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
            self._filesystems = filesystems_on(
                self.blocks(), self._subvolumes, self._opened | self._sets.parts
            )
        return self._filesystems

    def _subvolumes(self, device: str) -> list[Device]:
        """The subvolumes but for the default one, which is what the device itself mounts."""
        try:
            default = self._handle.btrfs_subvolume_get_default(device)
            listed = self._handle.btrfs_subvolume_list(device)
        except RuntimeError as error:
            log.info("%s: the subvolumes cannot be listed: %s", device, reason(error))
            return []
        return [
            Device("filesystem", f"{BTRFS_VOLUME}{device}/{row['btrfssubvolume_path']}", "btrfs")
            for row in listed
            if row["btrfssubvolume_id"] != default
        ]

    @contextlib.contextmanager
    def look_into(self, source: str) -> Iterator[ApplianceVolume]:
        """Mount one filesystem, read-only, for as long as the block runs."""
        try:
            self.mount(source, "/", "ro")
        except RuntimeError as error:
            told = program_messages.by_mount(str(error))
            raise EngineError(told.means, subject=source, hint=told.step) from error
        try:
            with contextlib.suppress(RuntimeError):
                self.space[source] = self._handle.statvfs("/")
            yield ApplianceVolume(self._handle, self._calls)
        finally:
            self._handle.umount_all()

    def mount(self, source: str, mountpoint: str, options: str) -> None:
        """Mount a filesystem; `RuntimeError` as the call raises it."""
        try:
            self._handle.mount_options(options, source, mountpoint)
        except RuntimeError as error:
            block = self.block(source)
            if block is None or not block.type or "more filesystems" not in str(error):
                raise
            # mount(8) sees two signatures; which of them counts is known here.
            self._handle.mount_vfs(options, block.type, source, mountpoint)

    def subvolume_by_id(self, device: str, number: int) -> str | None:
        """The path of the btrfs subvolume with this id."""
        try:
            listed = self._handle.btrfs_subvolume_list(device)
        except RuntimeError as error:
            log.info("%s: the subvolumes cannot be listed: %s", device, reason(error))
            raise HostError(
                "the subvolumes of its btrfs cannot be listed",
                subject=device,
                hint="it may be damaged; -v shows what the appliance said",
            ) from error
        for row in listed:
            if row["btrfssubvolume_id"] == number:
                return str(row["btrfssubvolume_path"])
        return None


def is_subvolume(source: str) -> bool:
    """Whether a source names a btrfs subvolume rather than a device."""
    return source.startswith(BTRFS_VOLUME)
