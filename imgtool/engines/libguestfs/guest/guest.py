"""The guest as the appliance sees it: reading."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from imgtool.engines.libguestfs.appliance.launch import kill
from imgtool.engines.libguestfs.guest import devices, fsck, inspection, usage, walk
from imgtool.engines.libguestfs.guest.calls import CallFailed, Calls
from imgtool.engines.libguestfs.guest.stream import open_stream
from imgtool.engines.libguestfs.guest.volumes import ApplianceVolume, ApplianceVolumes, reason
from imgtool.errors import (
    EngineError,
    Force,
    ImageError,
    ImgtoolError,
    NotInGuestError,
    Reason,
    UsageError,
)
from imgtool.formats.checksums import CHECKSUMS
from imgtool.formats.files import Undetermined
from imgtool.formats.xattrs import Xattrs
from imgtool.guest.guest import Guest, OnProblem
from imgtool.guest.guest_files import GuestFiles
from imgtool.guest.hibernation import refuse_sleeping_devices, refuse_sleeping_files
from imgtool.guest.hidden import hidden_mount
from imgtool.guest.keys import Key
from imgtool.guest.layout import NothingMounts, btrfs_device, discover, there_is
from imgtool.guest.mending import keeps_journal, mending, needs_replay
from imgtool.guest.model import (
    Device,
    Entry,
    Layout,
    Mount,
    OperatingSystem,
    SpaceUsage,
)
from imgtool.guest.operating_system import identify
from imgtool.guest.packages import installed_packages
from imgtool.host import interrupt, program_messages
from imgtool.text import printable

log = logging.getLogger(__name__)

_EXTENT = re.compile(rb"^\s*\d+:\s*(\d+)\.\.\s*(\d+):\s*\d+\.\.\s*\d+:\s*(\d+):(.*)$", re.MULTILINE)
# What mount(8) says where the kernel would have to write; btrfs has an I/O error for it.
_WRITE_REFUSED = re.compile("read-only|write-protected|Input/output error|can't read superblock")
# After Ctrl-C a call that is no transfer gets this long before the appliance is stopped.
GRACE = 5.0


class LibguestfsGuest(Guest):
    """A guest in a launched appliance."""

    engine = "libguestfs"

    def __init__(
        self,
        handle: Any,
        *,
        image: str,
        mounts: Sequence[Mount] = (),
        root: str | None = None,
        keys: Sequence[Key] = (),
        write: bool = False,
        force: Force = (),
        notice: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.handle = handle
        self.calls = Calls(handle)
        self.image = image
        self.write = write
        self._force = force
        self._given = tuple(mounts)
        self._root = root
        self._notice = notice
        self.volumes = ApplianceVolumes(handle, self.calls, keys, notice, write=write)
        self._layout: Layout | None = None
        self._mounted = False
        self.unsound: tuple[fsck.FsckFailure, ...] = ()

    @contextlib.contextmanager
    def cancellable(self) -> Iterator[None]:
        """While the block runs Ctrl-C cancels the transfer, or stops the appliance."""
        timers: list[threading.Timer] = []

        def cancel() -> None:
            self.handle.user_cancel()
            timer = threading.Timer(GRACE, kill, (self.handle,))
            timer.daemon = True
            timer.start()
            timers.append(timer)

        try:
            with interrupt.on_interrupt(cancel):
                yield
        finally:
            for timer in timers:
                timer.cancel()

    def interrupted(self) -> bool:
        """Whether the user asked to stop."""
        return interrupt.pending()

    def _written_to(self) -> tuple[fsck.Filesystem, ...]:
        """The filesystems that calls have written to."""
        if not self.calls.touched:
            return ()
        found = set()
        for path in self.calls.touched:
            if Reason.HIDDEN_MOUNT not in self._force and (place := self._hidden_at(path)):
                # It went into the folder below, where the guest would never see it.
                raise hidden_mount(place, self._unshown[place])
            for mount in sorted(self.layout.mounts, key=lambda m: -len(m.mountpoint)):
                below = mount.mountpoint.rstrip("/").encode() + b"/"
                shown = mount.mountpoint not in self._unshown
                if shown and (path.rstrip(b"/") + b"/").startswith(below):
                    found.add(mount)
                    break
        return fsck.filesystems(self.volumes, sorted(mount.source for mount in found))

    def finish(self) -> None:
        """Unmount everything and wait until the appliance has written all of it to the image.

        What was written to is checked, as far as that is cheap: `unsound` tells the result.
        """
        written = self._written_to()
        try:
            self.handle.umount_all()
            started = time.monotonic()
            self.unsound = fsck.check(self.handle, written)
            if written:
                log.info("filesystems: checked in %.1f s", time.monotonic() - started)
            self.handle.shutdown()
        except RuntimeError as error:
            raise EngineError(
                f"the changes could not be written: {reason(error)}", subject=self.image
            ) from error

    # The layout

    @property
    def layout(self) -> Layout:
        """Which filesystem is mounted where; discovered at the first use."""
        if self._layout is None:
            if self._given:
                self._layout = self._given_layout()
            else:
                started = time.monotonic()
                try:
                    self._layout = discover(self.volumes, root=self._root)
                except NothingMounts as error:
                    raise self._unwritable(error) from error
                log.info("layout: discovered in %.1f s", time.monotonic() - started)
                self._tell(self._layout)
        return self._layout

    def _given_layout(self) -> Layout:
        blocks = {block.device for block in self.volumes.blocks()}
        for device in {self._device(mount) for mount in self._given if self._only_shown(mount)}:
            if device in blocks:
                # Or the kernel would replay its journal, of a btrfs when its volumes are listed.
                self.handle.blockdev_setro(device)
        known = {filesystem.device for filesystem in self.volumes.filesystems()}
        for mount in self._given:
            # Of a damaged one it is the user who knows that it is a filesystem.
            told = mount.source in blocks and (mount.options or mount.fstype)
            if mount.source not in known and not told:
                raise NotInGuestError(
                    "the image has no such filesystem",
                    subject=mount.source,
                    hint=there_is(known),
                )
        try:
            self._mount(self._given[0])
        except EngineError as error:
            raise self._unwritable(error) from error
        os_type = "windows" if self._has_windows() else None
        self.handle.umount_all()
        return Layout(self._given, os_type=os_type)

    def _has_windows(self) -> bool:
        try:
            found = self.calls.case_sensitive_path(b"/Windows/System32")
            return self.calls.lstat(found).type == "directory"
        except CallFailed:
            return False

    def _only_shown(self, mount: Mount) -> bool:
        """Whether nothing may be written to its device, though it could be."""
        shown = [one for one in self._given if "ro" in one.options.split(",")]
        written = {self._device(one) for one in self._given if one not in shown}
        return self.write and mount in shown and self._device(mount) not in written

    def _device(self, mount: Mount) -> str:
        blocks = [Device("device", block.device) for block in self.volumes.blocks()]
        return btrfs_device(mount.source, blocks) or mount.source

    def _mount(self, mount: Mount) -> None:
        options = [mount.options] if mount.options else []
        if not self.write:
            options.insert(0, "ro")
        try:
            if mount.fstype:
                self.handle.mount_vfs(
                    ",".join(options), mount.fstype, mount.source, mount.mountpoint
                )
            else:
                self.volumes.mount(mount.source, mount.mountpoint, ",".join(options))
        except RuntimeError as error:
            told = program_messages.by_mount(str(error))
            shown = self._only_shown(mount)
            block = self.volumes.block(self._device(mount)) if shown else None
            if block and keeps_journal(block.type) and _WRITE_REFUSED.search(str(error)):
                raise needs_replay(mount.source, mount.mountpoint, str(block.type)) from error
            raise EngineError(
                f"the filesystem cannot be mounted: {told.means}",
                subject=mount.source,
                hint=told.step,
            ) from error

    def mount_layout(self) -> None:
        """Mount everything where the layout says. What is not the root may fail, with a line."""
        if self._mounted:
            return
        mounts = self.layout.mounts
        started = time.monotonic()
        must_be_awake = self.write and Reason.HIBERNATED not in self._force
        if must_be_awake:
            refuse_sleeping_devices(self.volumes.blocks())
        for mount in mounts:
            try:
                self._mount(mount)
            except EngineError as error:
                if mount.mountpoint == "/" or self._given:
                    raise self._unwritable(error) from error
                if self.handle.is_dir(mount.mountpoint, followsymlinks=True):
                    self._unshown[mount.mountpoint] = str(error)  # else the guest cannot either
                self._notice(f"{mount.mountpoint} is not shown: {error}")
        if self.write:
            written = [mount.source for mount in mounts if "ro" not in mount.options.split(",")]
            known = fsck.filesystems(self.volumes, written)
            fsck.refuse_unless_writable(self.handle, mounts, known, self._force)
        if must_be_awake:
            refuse_sleeping_files(ApplianceVolume(self.handle, self.calls).read)
        log.info("layout: mounted in %.1f s", time.monotonic() - started)
        self._mounted = True

    def _unwritable(self, error: ImgtoolError) -> ImgtoolError:
        """What to raise for what cannot be mounted: who wants to write is told what to do."""
        if not self.write:
            return error
        rows = [one for one in self.volumes.filesystems() if error.subject in (None, one.device)]
        return ImageError(
            f"{error.message}; its journal does not mend it",
            subject=error.subject,
            hint=mending(rows[0].device, rows[0].type) if rows else error.hint,
        )

    def unmount_layout(self) -> None:
        """Unmount everything; the next use of a path mounts it again."""
        self.handle.umount_all()
        self._mounted = False

    # Reading

    def at(self, typed: str | bytes) -> bytes:
        """The guest path that is meant, in the spelling of the guest, with the layout mounted."""
        path = self.path(typed)
        self.mount_layout()
        if not self.write and (hidden := self._hidden(path)):
            raise hidden
        if self.windows:
            with contextlib.suppress(CallFailed):  # the path itself may not exist yet
                path = self.calls.case_sensitive_path(path)
        return path

    def _missing(self, error: CallFailed, path: bytes) -> EngineError | NotInGuestError:
        # libguestfs gives the errno of most calls; of some only the words.
        if error.errno in (2, 20) or "No such file" in error.message:
            return NotInGuestError(
                "no such file or directory in the guest", subject=printable(path)
            )
        return error

    def resolve(self, path: str | bytes) -> bytes:
        """The path without symbolic links; `NotInGuestError` if it leads nowhere."""
        found = self.at(path)
        try:
            return self.calls.realpath(found)
        except CallFailed as error:
            raise self._missing(error, found) from error

    def lstat(self, path: str | bytes) -> Entry:
        """One path as it is; a symbolic link is not followed."""
        found = self.at(path)
        try:
            return self.calls.lstat(found)
        except CallFailed as error:
            raise self._missing(error, found) from error

    def entries(
        self, path: str | bytes, *, xattrs: bool = False, on_problem: OnProblem | None = None
    ) -> Iterator[Entry]:
        """What is in a directory, sorted by name as bytes."""
        found = self.at(path)
        with self.cancellable():
            yield from walk.children(self.calls, found, on_problem, xattrs=xattrs)

    def walk(
        self,
        path: str | bytes = "/",
        *,
        checksum: str | None = None,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> Iterator[Entry]:
        """Everything below a directory: parents first, siblings sorted by name as bytes."""
        found = self.at(path)
        with self.cancellable():
            for entry in walk.walk(self.calls, found, on_problem, xattrs=xattrs):
                if checksum is None or entry.type != "file":
                    yield entry
                    continue
                yield self.with_checksum(entry, checksum, on_problem)

    def xattrs(self, path: str | bytes) -> Xattrs:
        """The extended attributes of one path as it is; a symbolic link is not followed."""
        found = self.at(path)
        try:
            return self.calls.xattrs(found)
        except CallFailed as error:
            raise self._missing(error, found) from error

    @property
    def oversized_xattrs(self) -> int:
        """How many extended attributes were left out so far, being longer than Linux gives any."""
        return self.calls.oversized_xattrs

    def checksum(self, kind: str, path: str | bytes) -> str:
        """The md5, sha1 or sha256 of a regular file, in hexadecimal."""
        if kind not in CHECKSUMS:
            raise UsageError(f"no such checksum; choose from {', '.join(CHECKSUMS)}", subject=kind)
        return self.calls.checksum(kind, self._regular(path))

    def _regular(self, path: str | bytes) -> bytes:
        found = self.resolve(path)
        kind = self.calls.lstat(found).type
        if kind != "file":
            raise EngineError(f"not a regular file but a {kind}", subject=printable(found))
        return found

    def _stream(self, call: Callable[[str], None]) -> AbstractContextManager[BinaryIO]:
        @contextlib.contextmanager
        def stream() -> Iterator[BinaryIO]:
            with self.cancellable(), open_stream(call, self.handle.user_cancel) as reading:
                yield reading

        return stream()

    def open(self, path: str | bytes) -> AbstractContextManager[BinaryIO]:
        """A regular file's bytes as a stream; links are followed inside the guest."""
        found = self._regular(path)
        return self._stream(lambda name: self.calls.download(found, name))

    def open_range(
        self, path: str | bytes, offset: int, length: int
    ) -> AbstractContextManager[BinaryIO]:
        """A part of a regular file as a stream."""
        found = self._regular(path)
        return self._stream(lambda name: self.calls.download_range(found, name, offset, length))

    def tar(
        self,
        path: str | bytes,
        excludes: Sequence[bytes] = (),
        *,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> AbstractContextManager[BinaryIO]:
        """A directory's content (names relative to it) as a stream in tar format; what cannot be
        read is an error at its end.
        """
        found = self.resolve(path)

        def call(name: str) -> None:
            self.calls.has_new_errors()  # what was found before
            self.calls.tar_out(found, name, excludes, xattrs=xattrs)
            if self.calls.has_new_errors():
                raise EngineError(walk.PASSED_OVER, subject=printable(found))

        return self._stream(call)

    def data_ranges(self, path: str | bytes) -> Sequence[tuple[int, int]]:
        """Where a sparse file has data, from the kernel's own map of it (FIEMAP)."""
        found = self._regular(path)
        size = self.calls.lstat(found).size
        quoted = shlex.quote(os.fsdecode(b"/sysroot" + found))
        try:
            said = self.calls.shell(found, [b"filefrag", b"-e", b"-b1", os.fsencode(quoted)])
        except CallFailed:
            return [(0, size)]
        ranges = []
        for match in _EXTENT.finditer(said):
            start, length = int(match[1]), int(match[3])
            if b"unwritten" not in match[4] and start < size:
                ranges.append((start, min(length, size - start)))
        return ranges

    # Whole guests

    def devices(self, *, everything: bool = False) -> tuple[Device, ...]:
        """The filesystems; with `everything` also partitions, LVs, VGs, PVs and devices."""
        return devices.devices(self, everything=everything)

    def usage(self) -> tuple[SpaceUsage, ...]:
        """The space of every filesystem, with an `error` where one cannot be mounted."""
        return usage.usage(self)

    def operating_systems(self, *, packages: bool = False) -> tuple[OperatingSystem, ...]:
        """What is installed in the guest, by libguestfs's own inspection.

        Where that gives up, as it does on an fstab that lies, the guest's files are asked.
        """
        self.unmount_layout()
        found: list[OperatingSystem] = []
        try:
            # Listing the blocks opens encrypted devices, which inspection then sees.
            found += inspection.operating_systems(
                self.handle, self.volumes.blocks(), packages=packages
            )
        except inspection.InspectionFailed as error:
            self.unmount_layout()  # it leaves behind what it had mounted
            layout = self.layout
            if layout.root is None:
                raise
            try:
                told = self._told_by_files(layout, packages=packages)
            except Undetermined as reason:
                log.info("the files do not tell either: %s", reason)
                raise error from reason
            self._notice(f"{error.message}; told from the guest's files instead")
            return (told,)
        return tuple(self._with_own_layout(one, packages=packages) for one in found)

    def _told_by_files(self, layout: Layout, *, packages: bool) -> OperatingSystem:
        """What the files of a layout with a root say. `Undetermined` where they do not tell."""
        assert layout.root is not None
        self.unmount_layout()
        self._layout = layout
        files = GuestFiles(self)
        mountpoints = {mount.mountpoint: mount.source for mount in layout.mounts}
        found = identify(files, layout.root, mountpoints)
        if packages:
            rows = installed_packages(files, found.package_format)
            found = dataclasses.replace(found, applications=rows)
        return found

    def _with_own_layout(self, found: OperatingSystem, *, packages: bool) -> OperatingSystem:
        """What inspection found, with the mount points that it does not follow.

        It does not know every name that fstab has for devices; without a /usr it is wrong.
        """
        try:
            layout = discover(self.volumes, root=found.root)
        except NotInGuestError:
            return found
        self._tell(layout)
        mountpoints = {mount.mountpoint: mount.source for mount in layout.mounts}
        if not mountpoints.keys() >= found.mountpoints.keys():
            return found
        if mountpoints.get("/usr") != found.mountpoints.get("/usr"):
            try:
                return self._told_by_files(layout, packages=packages)
            except Undetermined as reason:
                log.info("the files do not tell: %s", reason)
        return dataclasses.replace(found, mountpoints=dict(sorted(mountpoints.items())))
