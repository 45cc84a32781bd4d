"""`mount`, `umount`, `cleanup`: from an image to files under a directory, and back to nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import (
    EngineError,
    HostError,
    ImageError,
    ImgtoolError,
    NotInGuestError,
    Reason,
    RefusedError,
    UsageError,
    join_names,
)
from imgtool.formats.partition_table import disk_name
from imgtool.guest.hibernation import refuse_sleeping_devices, refuse_sleeping_files
from imgtool.guest.model import Mount
from imgtool.guest.partitions import partitions_of
from imgtool.host.process import Limits, find, run
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.snapshot_view import at_snapshot
from imgtool.image.chain.steady import steady
from imgtool.image.change.guards import refuse_to_write
from imgtool.image.change.recovery import recover
from imgtool.image.checks.doubts import doubts_of
from imgtool.image.locking.locks import warn_if_written
from imgtool.mount import kernel, plan
from imgtool.mount.journal import Journal, journals, remove_empty_folders
from imgtool.mount.mechanisms import appliance
from imgtool.mount.mechanisms.available import no_device_mapper
from imgtool.mount.mechanisms.mechanisms import DeviceMechanism, Mechanism
from imgtool.mount.mechanisms.registry import AUTO, VIA, mechanisms
from imgtool.mount.mounter import MountAttempt, MountRequest, NeedsOverlay
from imgtool.mount.plan import Disk, Item, Volume
from imgtool.mount.steps import steps
from imgtool.text import typed

log = logging.getLogger(__name__)


def _target(path: Path) -> Path:
    target = Path(os.path.realpath(path))  # as mountinfo will show it
    try:
        if not target.exists():
            raise UsageError("no such directory", subject=path, hint=f"mkdir -p {typed(path)}")
        if not target.is_dir():
            raise UsageError("not a directory", subject=path)
        if kernel.mounted_at(str(target)) is not None:
            raise RefusedError(
                "something is mounted there already",
                subject=path,
                hint="'imgtool mounts' lists imgtool's own; imgtool umount, or another directory",
            )
        if any(target.iterdir()):
            raise RefusedError(
                "the directory is not empty", subject=path, hint="mount at an empty directory"
            )
    except ImgtoolError:
        raise
    except OSError as error:
        raise HostError(
            f"it cannot be looked into: {error.strerror}",
            subject=path,
            hint="mount at a directory of your own",
        ) from error
    return target


def _unusable(mechanism: type[Mechanism], chains: Sequence[Chain]) -> str | None:
    formats = {link.format for chain in chains for link in chain.links}
    if mechanism.raw_only and formats != {"raw"}:
        return f"it takes raw images, and this is {', '.join(sorted(formats - {'raw'}))}"
    return mechanism.missing()


def choose(via: str, chains: Sequence[Chain]) -> tuple[str, type[Mechanism]]:
    """The mechanism and its name. `auto` takes the first that works, least risk first."""
    why_not: list[str] = []
    for name, mechanism in mechanisms(via):
        reason = _unusable(mechanism, chains)
        if reason is None:
            for line in why_not:
                log.info("mechanism: not %s", line)
            log.info("mechanism: %s", name)
            return name, mechanism
        why_not.append(f"{name}: {reason}")
    hint = "'imgtool doctor' explains" if via == AUTO else "--via auto takes what works here"
    raise HostError("it cannot be mounted here: " + "; ".join(why_not), hint=hint)


def _check_images(wanted: MountRequest, chains: Sequence[Chain]) -> None:
    _refuse_if_mounted(wanted, chains)  # first, since it knows what to do about it
    for chain in chains:
        if wanted.writable:
            if line := recover(chain.active.path, backing_dirs=wanted.backing_dirs):
                wanted.notice(line)
            refuse_to_write(chain, wanted.backing_dirs, force=wanted.force)
        else:
            for line in (warn_if_written(chain), *doubts_of(chain)):
                if line:
                    wanted.notice(line)


def _files_written_to(wanted: MountRequest, chains: Sequence[Chain]) -> list[Path]:
    """The files that the mount will write to: of a chain the active image's alone."""
    return [path for chain in chains for path in chain.active.files] if wanted.writable else []


def _identities(paths: Iterable[str | Path]) -> set[tuple[int, int]]:
    found = set()
    for path in paths:
        with contextlib.suppress(OSError):  # gone by now
            status = os.stat(path)  # noqa: PTH116
            found.add((status.st_dev, status.st_ino))
    return found


def _refuse_if_mounted(wanted: MountRequest, chains: Sequence[Chain], besides: str = "") -> None:
    used = _identities(path for chain in chains for path in chain.files)
    written = _identities(_files_written_to(wanted, chains))
    for journal in journals():
        conflict = (written & _identities(journal.images)) | (used & _identities(journal.written))
        if journal.id != besides and conflict:
            shared = [path for path in journal.images if _identities([path]) & conflict]
            raise RefusedError(
                f"it is mounted at {journal.mountpoint}"
                + (", to be written" if journal.writable else ""),
                subject=join_names(shared),
                hint=f"imgtool umount {typed(journal.mountpoint)}",
            )


def _start(wanted: MountRequest, chains: Sequence[Chain], target: Path, mechanism: str) -> Journal:
    """A new journal, unless another mount is in the way. Raises `RefusedError`.

    It is written before the others are looked at, so that of two mounts at the same time neither
    overlooks the other. What an earlier one left behind at this directory is undone.
    """
    images = [path for chain in chains for path in chain.files]
    written = _files_written_to(wanted, chains)
    journal = Journal.start(images, target, mechanism, written, snapshot=wanted.snapshot)
    try:
        for other in journals():
            if other.mountpoint == str(target) and other.id != journal.id:
                with other.lock() as there:
                    if there:
                        other.undo()
        _refuse_if_mounted(wanted, chains, besides=journal.id)
    except BaseException:
        journal.undo()
        journal.unlock()
        raise
    return journal


def _disk(number: int, chain: Chain, wanted: MountRequest) -> Disk:
    table = partitions_of(chain, device=disk_name(number), snapshot=wanted.snapshot)
    for problem in table.problems:
        wanted.notice(problem)
    return Disk(number, chain.active.virtual_size, tuple(table.partitions))


def _items(wanted: MountRequest, disks: Sequence[Disk]) -> list[Item]:
    if wanted.partition is not None:
        return [Item(plan.partition(disks, wanted.partition))]
    if wanted.lv is not None:
        return [Item(plan.volume(wanted.lv))]
    mounts = wanted.parsed_mounts()
    if mounts and not any(m.source.startswith("btrfsvol:") for m in mounts):
        return [
            Item(plan.source_of(m.source, disks), m.mountpoint, m.fstype, None, m.options)
            for m in mounts
        ]
    from imgtool.opening import open_guest

    with open_guest(wanted.image, **wanted.keywords(), notice=wanted.notice) as guest:
        wanted.refuse_hidden(guest.layout.missed, guest.layout.optional)
        return plan.items_of(guest.layout, disks, [row.device for row in guest.devices()])


def _refuse_sleeping(wanted: MountRequest) -> None:
    """Raise `RefusedError` for a Linux guest that is hibernated, as far as that can be told without
    an appliance; of Windows its filesystem tells (`MountAttempt`)."""
    from imgtool.opening import open_guest

    def read(path: str, limit: int) -> bytes | None:
        try:
            with guest.open_range(path, 0, limit) as stream:
                return stream.read(limit)
        except (EngineError, ImageError, NotInGuestError) as error:
            log.info("%s: not looked into: %s", path, error)
            return None

    try:
        direct = dataclasses.replace(wanted, engine="direct", keys=())
        with open_guest(direct.image, **direct.keywords(), notice=direct.notice) as guest:
            refuse_sleeping_devices(guest.devices())
            refuse_sleeping_files(read)
    except (EngineError, ImageError, NotInGuestError) as error:
        log.info("whether the guest is hibernated is not known: %s", error)


def _host_groups() -> set[str]:
    """Names and UUIDs of the host's volume groups, and names of those that are mapped."""
    found: set[str] = set()
    for argv in (
        ["lvm", "vgs", "--noheadings", "-o", "vg_name,vg_uuid"],
        ["dmsetup", "info", "-c", "--noheadings", "-o", "vg_name"],
    ):
        try:
            found.update(run(argv, limits=Limits(wall=60)).stdout.decode().split())
        except HostError as error:
            log.info("the host's volume groups: %s", error)
    return found


def _absolute(path: str | Path) -> str:
    return str(Path(path).absolute())


def _request(wanted: MountRequest, target: Path) -> appliance.Request:
    mounts = wanted.parsed_mounts()
    if wanted.partition is not None:
        mounts = [Mount(f"/dev/sda{wanted.partition}", "/")]
    elif wanted.lv is not None:
        mounts = [Mount(f"/dev/{plan.volume(wanted.lv)}", "/")]
    return {
        "image": _absolute(wanted.image),
        "add": [_absolute(path) for path in wanted.add],
        "format": wanted.format,
        "snapshot": wanted.snapshot,
        "mounts": [
            {
                "source": mount.source,
                "mountpoint": mount.mountpoint,
                "options": mount.options,
                "fstype": mount.fstype,
            }
            for mount in mounts
        ],
        "root": wanted.root,
        # Their files may be named from here, or be gone when the appliance starts.
        "keys": [str(key) for key in wanted.parsed_keys()],
        "backing_dirs": [_absolute(path) for path in wanted.backing_dirs],
        "target": str(target),
        "writable": wanted.writable,
        "force": list(wanted.force),
        "executable": wanted.executable,
    }


def _undo_after(error: BaseException, journal: Journal) -> None:
    """Undo what was done before an error, which is the one that the user is told."""
    try:
        journal.undo()
    except ImgtoolError as another:
        log.info("undoing it failed too: %s", another)
        if isinstance(error, ImgtoolError):
            error.hint = f"not all of it could be undone ({another}): imgtool cleanup"


def mount(wanted: MountRequest) -> Journal:
    """Mount what is wanted; it stays until `unmount`. Whatever fails is undone.

    Raises `RefusedError` where data would be at risk or the mount point is in use, `HostError`
    where the host lacks something, `NotInGuestError` for a partition, volume or system that is not
    there, `EngineError` for a filesystem that the kernel refuses.
    """
    from imgtool.opening import images_to_read

    if wanted.via not in VIA:
        raise UsageError(f"no such mechanism; choose from {', '.join(VIA)}", subject=wanted.via)
    if wanted.engine != "auto":
        raise UsageError("what reads a mount is said by its mechanism", subject=wanted.engine)
    if wanted.snapshot is not None and wanted.writable:
        raise UsageError(
            "a snapshot cannot be written to",
            subject=wanted.snapshot,
            hint="leave out --rw, or make an image of its own of it: imgtool convert --snapshot"
            f" {typed(wanted.snapshot)} {typed(wanted.image)} NEW",
        )
    wanted = dataclasses.replace(wanted, mounts=wanted.parsed_mounts())
    target = _target(wanted.mountpoint)
    started = time.monotonic()
    with (
        images_to_read(
            [wanted.image, *wanted.add], format=wanted.format, backing_dirs=wanted.backing_dirs
        ) as chains,
        contextlib.ExitStack() as stack,
    ):
        then = [stack.enter_context(at_snapshot(chain, wanted.snapshot)) for chain in chains]
        seen = [stack.enter_context(steady(chain)) for chain in then]
        journal = _mount(wanted, seen, target)
    log.info("mounted in %.2f s", time.monotonic() - started)
    return journal


def _mount(wanted: MountRequest, chains: Sequence[Chain], target: Path) -> Journal:
    _check_images(wanted, chains)
    name, mechanism = choose(wanted.via, chains)
    if not issubclass(mechanism, DeviceMechanism):
        if wanted.partition is not None:  # sooner than the appliance could tell
            plan.partition([_disk(0, chains[0], wanted)], wanted.partition)
        journal = _start(wanted, chains, target, name)
        try:
            try:
                journal.do(
                    steps.Appliance(str(journal.folder), str(target), _request(wanted, target))
                )
            finally:
                for line in appliance.notices(journal.folder):
                    wanted.notice(line)
            journal.finish()
        except BaseException as error:
            _undo_after(error, journal)
            raise
        finally:
            journal.unlock()
        return journal

    if wanted.writable and Reason.HIBERNATED not in wanted.force:
        _refuse_sleeping(wanted)
    disks = [_disk(number, chain, wanted) for number, chain in enumerate(chains)]
    items = _items(wanted, disks)
    if mechanism.by_offset:
        from imgtool.mount.second_opinion import compare_offsets  # only this mechanism needs it

        compare_offsets(wanted, chains, disks, items)
    volumes = any(isinstance(item.source, Volume) for item in items)
    if volumes and (reason := no_device_mapper() or (None if find("lvm") else "lvm is missing")):
        raise HostError(
            f"logical volumes cannot be activated here: {reason}",
            subject=wanted.image,
            hint="--via fuse, or imgtool copy-out",
        )
    host = _host_groups() if volumes and wanted.writable else set()
    # The clone of a volume group is written to: on an overlay.
    overlays = not wanted.writable and (volumes or mechanism.always_overlaid)
    while True:
        journal = _start(wanted, chains, target, name)
        try:
            made = mechanism(
                chains, disks, journal, wanted.writable, overlays, snapshot=wanted.snapshot
            )
            MountAttempt(wanted, made, target).mount(items, host)
            journal.finish()
        except BaseException as error:
            _undo_after(error, journal)
            if isinstance(error, NeedsOverlay):
                log.info("a journal has to be replayed: on an overlay")
                overlays = True
                continue
            raise
        finally:
            journal.unlock()
        return journal


def unmount(mountpoint: Path) -> None:
    """Undo the mount at this directory, all of it; nothing holds the image when this returns.

    Raises `RefusedError` if it is in use, `ImgtoolError` if it is not a mount of imgtool.
    """
    target = os.path.realpath(mountpoint)
    for journal in reversed(journals()):
        if journal.mountpoint == target:
            with journal.lock() as there:
                if there:
                    journal.undo()
            return
    raise ImgtoolError(
        "imgtool has mounted nothing there", subject=mountpoint, hint="'imgtool mounts' lists them"
    )


@dataclass(frozen=True)
class Cleaned:
    """A mount that was left behind; `error` if it could not be undone."""

    journal: Journal
    error: ImgtoolError | None = None


def clean_up() -> list[Cleaned]:
    """Undo what is left of mounts that nobody finished, that broke, or of an earlier boot."""
    done = []
    for journal in reversed(journals()):
        if not journal.left_behind():
            continue
        try:
            with journal.lock() as there:
                # Others may have finished or undone it since it was read.
                if not there or not journal.left_behind():
                    continue
                journal.undo()
            done.append(Cleaned(journal))
        except ImgtoolError as error:
            done.append(Cleaned(journal, error))
    remove_empty_folders()
    return done
