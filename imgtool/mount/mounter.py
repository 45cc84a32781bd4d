"""One attempt to mount what is wanted, by one mechanism, step by step."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import (
    EngineError,
    Force,
    HostError,
    ImgtoolError,
    NotInGuestError,
    Reason,
    RefusedError,
    join_names,
)
from imgtool.guest.hidden import refuse_hidden
from imgtool.guest.mending import (
    FOR_READING,
    has_errors,
    keeps_journal,
    needs_replay,
    refuse_only_read,
)
from imgtool.host.process import find
from imgtool.mount import filesystems, kernel
from imgtool.mount.mechanisms.mechanisms import DeviceMechanism
from imgtool.mount.plan import DiskRange, Item, Volume, only_the_appliance
from imgtool.mount.steps import mapper, steps
from imgtool.opening import ReadOptions

log = logging.getLogger(__name__)

_READ_ONLY_DEVICE = (errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class MountRequest(ReadOptions):
    """What is to be mounted where, as the user says it; `partition` and `lv` name one filesystem,
    `mounts` a layout; without them the guest's own layout is looked for. What reads it is said by
    `via`, and not by `engine`."""

    image: Path
    mountpoint: Path
    via: str = "auto"
    partition: int | None = None
    lv: str | None = None
    writable: bool = False
    executable: bool = False
    force: Force = ()

    def refuse_hidden(self, unshown: Mapping[str, str], optional: Container[str] = ()) -> None:
        """Raise `RefusedError` where it is to be written to, and not all of it is shown."""
        if self.writable and Reason.HIDDEN_MOUNT not in self.force:
            refuse_hidden(unshown, optional, self.notice)


class NeedsOverlay(Exception):
    """The kernel wants to write to what is read-only: a journal is to be replayed."""


class MountAttempt:
    """One attempt to mount the items."""

    def __init__(self, wanted: MountRequest, mechanism: DeviceMechanism, target: Path) -> None:
        self._wanted = wanted
        self._mechanism = mechanism
        self._journal = mechanism.journal
        self._target = target
        self._groups: dict[str, mapper.VolumeGroupActivation] = {}
        self._written: set[DiskRange | Volume] = set()

    def mount(self, items: Sequence[Item], host: set[str]) -> None:
        """All items; `host` are names and UUIDs of the host's own volume groups."""
        self._journal.do(steps.UdevRule(self._journal.id))
        self._mechanism.start()
        needed = dict.fromkeys(i.source.group for i in items if isinstance(i.source, Volume))
        if needed:
            self._activate(list(needed), host)
        self._written = {item.source for item in items if "ro" not in item.options.split(",")}
        for number, item in enumerate(items):
            try:
                self._mount(item)
            except (EngineError, HostError, NotInGuestError) as error:
                if number == 0 or self._wanted.mounts:
                    raise
                if not isinstance(error, NotInGuestError):  # else the guest cannot mount it either
                    self._wanted.refuse_hidden({item.at: str(error)})
                self._wanted.notice(f"{item.at} is not shown: {error}")
        self._mechanism.release()

    def _activate(self, needed: Sequence[str], host: set[str]) -> None:
        devices = [
            self._mechanism.block(place)
            for disk in self._mechanism.disks
            for place in disk.places
            if filesystems.type_at(
                self._mechanism.disk(place.disk), place.offset, place.size if place.number else 0
            )
            == "LVM2_member"
        ]
        answer = (
            mapper.lvm(
                devices, "pvs", "--noheadings", "--separator", "|", "-o", "pv_name,vg_name,vg_uuid"
            )
            if devices
            else ""
        )
        members: dict[str, list[str]] = {}
        uuids: dict[str, set[str]] = {}
        for line in answer.splitlines():
            device, group, uuid = line.strip().split("|")
            members.setdefault(group, []).append(device)
            uuids.setdefault(group, set()).add(uuid)
        for number, group in enumerate(needed):
            if group not in members:
                there = join_names(sorted(name for name in members if name)) or "none"
                raise NotInGuestError(
                    "no such volume group", subject=group, hint=f"volume groups: {there}"
                )
            if len(uuids[group]) > 1:
                raise HostError(
                    "two volume groups have this name", subject=group, hint="--via fuse"
                )
            clone = not self._wanted.writable
            if not clone and (group in host or uuids[group] & host):
                raise RefusedError(
                    "the host, or another mount, has a volume group of this name or UUID",
                    subject=group,
                    hint="mount it without --rw, which uses a renamed clone, or --via fuse --rw",
                )
            name = f"imgtool_{self._journal.id}_{number}" if clone else group
            step = mapper.VolumeGroupActivation(members[group], group, name, clone)
            self._journal.do(step)
            self._groups[group] = step

    def _device(self, item: Item) -> str:
        source = item.source
        if isinstance(source, Volume):
            node = self._groups[source.group].volume(source.name)
            if not Path(node).exists():
                raise NotInGuestError("no such logical volume", subject=source)
            log.info("%s: %s", source, node)
            return node
        device = self._mechanism.block(source)
        log.info(
            "%s: offset %d (%d * 512), size %d: %s",
            source,
            source.offset,
            source.offset // 512,
            source.size,
            device,
        )
        return device

    def _place(self, at: str) -> Path:
        """Where an item goes. No component may be a link: it would lead out into the host."""
        place = self._target
        for part in at.split("/"):
            if part in ("", "."):
                continue
            place = place / part
            if part == ".." or place.is_symlink() or not place.is_dir():
                raise NotInGuestError("the guest has no such directory to mount it at", subject=at)
        return place

    def _mount(self, item: Item) -> None:
        place = self._place(item.at)
        device = self._device(item)
        found = item.fstype or filesystems.type_at(device)
        source = item.source
        subject = f"{source}"
        kind = filesystems.kind_of(found, subject)
        alone = "degraded" not in item.options.split(",")
        if kind.type == "btrfs" and alone and filesystems.btrfs_devices(device) > 1:
            raise only_the_appliance(subject)
        writable = self._wanted.writable and "ro" not in item.options.split(",")
        if writable and kind.type in FOR_READING:
            refuse_only_read(subject, item.at, kind.type)
            writable = False
        only_shown = self._wanted.writable and not writable and source not in self._written
        if only_shown:  # or the kernel would replay its journal
            device = self._mechanism.read_only(device)
        careful = writable and Reason.DAMAGED not in self._wanted.force
        if careful and kind.type == "ext4" and filesystems.ext_has_errors(device):
            raise has_errors(subject)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        flags |= 0 if self._wanted.executable else kernel.MS_NOEXEC
        flags |= 0 if writable else kernel.MS_RDONLY
        data = [kind.data, *self._data(item)]
        make = steps.Filesystem
        if kind.type == "ntfs3" and not filesystems.has_type("ntfs3") and find("ntfs-3g"):
            log.info("%s: the kernel has no driver for NTFS: by ntfs-3g", source)
            make, data = steps.NtfsProgram, data[1:]
            if writable and Reason.HIBERNATED in self._wanted.force:
                data.append("remove_hiberfile")
        step = make(device, str(place), kind.type, flags, ",".join(word for word in data if word))
        try:
            must_be_awake = Reason.HIBERNATED not in self._wanted.force
            if writable and kind.type == "ntfs3" and must_be_awake:
                self._refuse_hibernated(step)
            self._journal.do(step)
        except OSError as error:
            if isinstance(error, ImgtoolError):
                raise
            # btrfs says EIO where it has a log to replay.
            dirty = error.errno in _READ_ONLY_DEVICE or (
                kind.type == "btrfs" and error.errno == errno.EIO
            )
            if dirty and not (self._mechanism.overlays or self._wanted.writable):
                raise NeedsOverlay from error
            if dirty and only_shown and keeps_journal(found):
                named = subject if isinstance(source, DiskRange) else f"/dev/{subject}"
                raise needs_replay(named, item.at, str(found)) from error
            raise filesystems.refusal(error, kind, subject) from error
        if writable and os.statvfs(place).f_flag & os.ST_RDONLY:
            refuse_only_read(subject, item.at, kind.type)

    def _refuse_hibernated(self, step: steps.Filesystem) -> None:
        looked = dataclasses.replace(step, flags=step.flags | kernel.MS_RDONLY)
        self._journal.do(looked)
        asleep = False
        try:
            with (Path(looked.target) / "hiberfil.sys").open("rb") as file:
                asleep = file.read(4).lower() == b"hibr"
        except OSError:
            log.info("no hiberfil.sys can be read")
        self._journal.undo_last()
        if asleep:
            raise RefusedError(
                "Windows is hibernated: to write to it would lose data",
                subject=self._wanted.image,
                hint="start and shut down the guest",
                reason=Reason.HIBERNATED,
            )

    @staticmethod
    def _data(item: Item) -> Iterator[str]:
        if item.subvolume is not None:
            if "," in item.subvolume:  # what follows would be an option, of the guest's choice
                raise EngineError(
                    "the kernel takes no subvolume with a comma in its name",
                    subject=item.subvolume,
                    hint="--via fuse",
                )
            yield f"subvol={item.subvolume}"
        general = ("ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "defaults")
        yield from (word for word in item.options.split(",") if word and word not in general)
