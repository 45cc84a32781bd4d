"""The guest as the sandboxed worker reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, BinaryIO

from imgtool.engines.direct.parent import questions
from imgtool.engines.direct.parent.client import Client, WorkerFailed
from imgtool.engines.direct.parent.mount_options import unreplayed_devices
from imgtool.engines.direct.parent.responses import (
    AnswerStream,
    Contents,
    exclusion_path,
    spool_rows,
    survey_for_tar,
)
from imgtool.engines.direct.parent.volumes import WorkerVolume, WorkerVolumes
from imgtool.engines.direct.replay import host
from imgtool.engines.direct.wire import frames as wire_frames
from imgtool.engines.direct.wire.messages import Data, Problem
from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.errors import (
    EngineError,
    ImgtoolError,
    NotInGuestError,
    UsageError,
)
from imgtool.formats.checksums import CHECKSUMS
from imgtool.formats.xattrs import Xattrs
from imgtool.guest.blocks import BIOS_BOOT, UNKNOWN, unmeasured_rows
from imgtool.guest.guest import Guest, OnProblem, Stretches
from imgtool.guest.layout import discover, holds_files, survey, there_is
from imgtool.guest.model import (
    Device,
    DiskExtent,
    Entry,
    Layout,
    Mount,
    OperatingSystem,
    SpaceUsage,
)
from imgtool.text import printable

if TYPE_CHECKING:
    from imgtool.image.qemu.clusters import Clusters

log = logging.getLogger(__name__)
_LARGE = 32 << 20  # below it to ask where a file lies costs more than it saves


class DirectGuest(Guest):
    """A guest read by a worker in the sandbox."""

    engine = "direct"

    def __init__(
        self,
        client: Client,
        *,
        image: str,
        sandbox: str = "",
        disks: Sequence[Sequence[str]],
        lost: Sequence[Sequence[tuple[int, int]]] = (),
        mounts: Sequence[Mount] = (),
        root: str | None = None,
        replayed: Collection[int] = (),
        clusters: Callable[[], Sequence[Clusters | None]] = tuple,
        notice: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._client = client
        self._replayed = replayed
        self._clusters = clusters  # of each disk; None for those that only QEMU can read
        self.image = image
        self._given = tuple(mounts)
        self._root = root
        self._notice = notice
        self._mounted = False
        self._layout: Layout | None = None
        started = time.monotonic()
        argvs, left_alone = [list(argv) for argv in disks], unreplayed_devices(mounts)
        self._devices = client.call(
            questions.opening(argvs, lost, left_alone, ring=client.shared, scratch=client.scratch)
        )
        took = time.monotonic() - started
        log.info("sandbox: worker, QEMU and volumes ready in %.3f s (%s)", took, sandbox)
        self._blocks = self._devices.blocks
        self._volumes = WorkerVolumes(client, self._blocks)
        if self._given and self._given[0].mountpoint != "/":
            raise Unsupported("nothing is to be mounted at /, or not first")

    @property
    def disk_sizes(self) -> list[int]:
        """The sizes of the disks in bytes, in their order."""
        return self._devices.disk_sizes

    def journals(self) -> list[host.DiskRange]:
        """Where filesystems are that need their journal replayed before they can be read."""
        with self._client.in_layout_time():
            journals = self._client.call(questions.journals())
        found: list[host.DiskRange] = []
        for device, places in journals:
            if len(places) != 1:
                raise Unsupported(f"the journal of {printable(device)} lies in pieces")
            disk, offset, size = places[0]
            if disk >= len(self.disk_sizes) or offset + size > self.disk_sizes[disk]:
                raise self._client.failure("a place on no disk")
            found.append((disk, offset, size))
        return found

    # The layout

    @property
    def layout(self) -> Layout:
        """Which filesystem is mounted where; discovered at the first use."""
        if self._layout is None:
            started = time.monotonic()
            with self._client.in_layout_time():
                self._layout = self._given_layout() if self._given else self._discover()
            log.info("layout: discovered in %.3f s", time.monotonic() - started)
            self._tell(self._layout)
        return self._layout

    def _discover(self) -> Layout:
        # What was refused could be, or name, the operating system: unless the one that was found
        # mounts it, only the appliance knows the layout.
        self._mounted = False
        try:
            found = discover(self._volumes, root=self._root)
        except NotInGuestError as error:
            if self._volumes.refused:
                raise Unsupported(next(iter(self._volumes.refused.values()))) from error
            raise
        known = {mount.source for mount in found.mounts if mount.mountpoint != "/"}
        for device, reason in self._volumes.refused.items():
            if found.root is None or device not in known:
                raise Unsupported(reason)
        if any(mount.source.startswith("btrfsvol:") for mount in found.mounts):
            raise Unsupported("btrfs subvolumes")
        return found

    def _given_layout(self) -> Layout:
        known = {block.device for block in self._volumes.filesystems()}
        for mount in self._given:
            if mount.source.startswith("btrfsvol:"):
                raise Unsupported("btrfs subvolumes")
            if mount.source not in known:
                if any(block.type in ("btrfs", "crypto_LUKS") for block in self._blocks):
                    raise Unsupported(f"{mount.source} is not known without the appliance")
                raise NotInGuestError(
                    "the image has no such filesystem",
                    subject=mount.source,
                    hint=there_is(known),
                )
        self._client.call(questions.look(self._given[0].source))
        windows = WorkerVolume(self._client).is_dir("/Windows/System32")
        return Layout(self._given, os_type="windows" if windows else None)

    def _mount_layout(self) -> None:
        if self._mounted:
            return
        mounts = self.layout.mounts
        said = self._mount(mounts)
        for mount, reason in zip(mounts, said, strict=True):
            if reason is not None:
                line = f"the filesystem cannot be mounted: {reason}"
                if self._given:
                    raise EngineError(line, subject=mount.source)
                if reason != wire_frames.NO_PLACE:  # else the guest does not mount it either
                    self._unshown[mount.mountpoint] = f"{line} ({mount.source})"
                self._notice(f"{mount.mountpoint} is not shown: {line} ({mount.source})")
        self._mounted = True

    def _mount(self, mounts: Sequence[Mount]) -> list[str | None]:
        """Mount in the worker; for each mount None, or why it is not there."""
        return self._client.call(
            questions.mount([(mount.source, mount.mountpoint) for mount in mounts])
        )

    # Reading

    def _at(self, typed: str | bytes) -> str:
        path = wire_frames.text(self.path(typed))
        self._mount_layout()
        if hidden := self._hidden(wire_frames.name(path)):
            raise hidden
        if self.windows:
            path = wire_frames.text(self._client.call(questions.spelling(path)))
        return path

    @contextlib.contextmanager
    def _about(self, path: str) -> Iterator[None]:
        """Errors from the worker get the path that they are about."""
        try:
            yield
        except (NotInGuestError, EngineError) as error:
            if error.subject is None:
                error.subject = printable(path)
            raise

    def resolve(self, path: str | bytes) -> bytes:
        """The path without symbolic links; `NotInGuestError` if it leads nowhere."""
        at = self._at(path)
        with self._about(at):
            return self._client.call(questions.resolve(at))

    def lstat(self, path: str | bytes) -> Entry:
        """One path as it is; a symbolic link is not followed."""
        at = self._at(path)
        with self._about(at):
            return self._client.call(questions.lstat(at))

    def _list(
        self,
        path: str | bytes,
        deep: bool,
        checksum: str | None,
        on_problem: OnProblem | None,
        xattrs: bool,
        written: Stretches | None = None,
    ) -> Iterator[Entry]:
        at = self._at(path)
        walk = questions.walk(at, deep, checksum, xattrs, written)
        with self._about(at), spool_rows(self._client, walk) as rows:
            for row in rows:
                if not isinstance(row, Problem):
                    yield row
                elif isinstance(row.reason, int):
                    self._oversized_xattrs += row.reason
                elif on_problem is None:
                    subject = printable(wire_frames.text(row.path))
                    raise EngineError(row.reason, subject=subject)
                else:
                    on_problem(row.path, row.reason)

    def entries(
        self, path: str | bytes, *, xattrs: bool = False, on_problem: OnProblem | None = None
    ) -> Iterator[Entry]:
        """What is in a directory, sorted by name as bytes."""
        return self._list(path, False, None, on_problem, xattrs)

    def walk(
        self,
        path: str | bytes = "/",
        *,
        checksum: str | None = None,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> Iterator[Entry]:
        """Everything below a directory: parents first, siblings sorted by name as bytes."""
        return self._list(path, True, checksum, on_problem, xattrs)

    def written_stretches(self, links: Sequence[int | None]) -> Stretches:
        """Which stretches of each disk come from the topmost `links` of its chain."""
        above = [
            # What was replayed is in an overlay on top of them.
            None if number is None else number + (disk in self._replayed)
            for disk, number in enumerate(links)
        ]
        return self._client.call(questions.written(above))

    def walk_unshared(
        self,
        path: str | bytes,
        *,
        checksum: str,
        written: Stretches,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> Iterator[Entry]:
        """`walk` with checksums, but not of files whose data are all outside `written`."""
        return self._list(path, True, checksum, on_problem, xattrs, written)

    def xattrs(self, path: str | bytes) -> Xattrs:
        """The extended attributes of one path as it is; a symbolic link is not followed."""
        at = self._at(path)
        with self._about(at):
            xattrs, oversized = self._client.call(questions.xattrs(at))
        self._oversized_xattrs += oversized
        return xattrs

    def checksum(self, kind: str, path: str | bytes) -> str:
        """The md5, sha1 or sha256 of a regular file, in hexadecimal."""
        if kind not in CHECKSUMS:
            raise UsageError(f"no such checksum; choose from {', '.join(CHECKSUMS)}", subject=kind)
        at = wire_frames.text(self._regular(path).path)
        with self._about(at):
            return self._client.call(questions.checksum(at, kind))

    def _regular(self, path: str | bytes) -> Entry:
        found = self.lstat(self.resolve(path))
        if found.type != "file":
            raise EngineError(
                f"not a regular file but a {found.type}",
                subject=printable(wire_frames.text(found.path)),
            )
        return found

    @contextlib.contextmanager
    def _stream(
        self,
        at: str,
        question: questions.Question[Data | Problem],
        *,
        most: int | None = None,
        on_problem: OnProblem | None = None,
    ) -> Iterator[BinaryIO]:
        parts = self._client.stream(question)
        with self._about(at), contextlib.closing(parts):
            # A refusal comes now, not when somebody reads.
            first = list(itertools.islice(parts, 1))
            stream = AnswerStream(self._client, itertools.chain(first, parts), most, on_problem)
            yield Contents(stream)

    def open(self, path: str | bytes) -> AbstractContextManager[BinaryIO]:
        """A regular file's bytes as a stream; links are followed inside the guest."""
        return self._part(self._regular(path), 0, (1 << 63) - 1)

    def open_range(
        self, path: str | bytes, offset: int, length: int
    ) -> AbstractContextManager[BinaryIO]:
        """A part of a regular file as a stream."""
        return self._part(self._regular(path), offset, length)

    def _part(self, file: Entry, offset: int, length: int) -> AbstractContextManager[BinaryIO]:
        most = max(min(length, file.size - offset), 0)
        at = wire_frames.text(file.path)
        if most >= _LARGE and any(self._clusters()):
            return self._from_the_files(at, offset, most)
        return self._stream(at, questions.read(at, offset, length), most=most)

    @contextlib.contextmanager
    def _from_the_files(self, at: str, offset: int, most: int) -> Iterator[BinaryIO]:
        """A part of a large file, as far as it can be from the image's own files."""
        from imgtool.engines.direct.parent.host_reader import (  # most commands do without
            PlainStream,
        )

        with self._about(at), contextlib.ExitStack() as stack:

            def streamed(start: int) -> BinaryIO:
                left = offset + most - start
                stream = self._stream(at, questions.read(at, start, left), most=left)
                return stack.enter_context(stream)

            found = self._client.call(questions.runs(at, offset, most, self.disk_sizes))
            if found is None:
                yield streamed(offset)
                return
            stream = PlainStream(found, self._clusters(), offset, offset + most, streamed)
            yield Contents(stream)

    def tar(
        self,
        path: str | bytes,
        excludes: Sequence[bytes] = (),
        *,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> AbstractContextManager[BinaryIO]:
        """A directory's content (names relative to it) as a stream in tar format."""
        at = wire_frames.text(self.resolve(path))
        # What has to be refused is refused before the stream begins.
        survey_for_tar(self, at, xattrs, on_problem)
        names = [wire_frames.text(exclusion_path(at, pattern)) for pattern in excludes]
        question = questions.tar(at, names, xattrs, passes_over=on_problem is not None)
        return self._stream(at, question, on_problem=on_problem)

    def data_ranges(self, path: str | bytes) -> Sequence[tuple[int, int]]:
        """Where a sparse file has data: (offset, length) in bytes, ascending."""
        file = self._regular(path)
        at = wire_frames.text(file.path)
        with self._about(at):
            return self._client.call(questions.ranges(at, file.size))

    def extents(self, path: str | bytes) -> Sequence[DiskExtent] | None:
        """Where on the guest's disks a regular file lies; None where the worker cannot tell."""
        file = self._regular(path)
        at = wire_frames.text(file.path)
        with self._about(at):
            found = self._client.call(questions.runs(at, 0, max(file.size, 1), self.disk_sizes))
        if found is None:
            return None
        return [DiskExtent(run.start, run.end - run.start, run.disk, run.at) for run in found]

    # Whole guests

    def _mountpoints(self) -> dict[str, str]:
        try:
            return {mount.source: mount.mountpoint for mount in self.layout.mounts}
        except WorkerFailed:
            raise
        except ImgtoolError:
            return {}  # no operating system, or several: the devices are listed all the same

    def devices(self, *, everything: bool = False) -> tuple[Device, ...]:
        """The filesystems; with `everything` also partitions, LVs, VGs, PVs and devices."""
        for block in self._blocks:
            if block.type == "btrfs":
                raise Unsupported(f"{block.device} is btrfs")
        by_name = {block.device: block for block in self._blocks}
        mountpoints = self._mountpoints()
        rows = [
            dataclasses.replace(
                row,
                label=by_name[row.device].label,
                uuid=by_name[row.device].uuid,
                size=by_name[row.device].size,
                mountpoint=mountpoints.get(row.device),
            )
            for row in self._volumes.filesystems()
        ]
        if everything:
            rows += self._devices.groups
            for kind in ("partition", "device"):
                for block in self._blocks:
                    if block.kind == kind:
                        rows.append(
                            Device(kind, block.device, size=block.size, parents=block.parents)
                        )
        return tuple(rows)

    def usage(self) -> tuple[SpaceUsage, ...]:
        """The space of every filesystem, with an `error` where one cannot be mounted."""
        rows = []
        mountpoints = self._mountpoints()
        types = {block.device: block.parttype for block in self._blocks}
        unread = unmeasured_rows(self._volumes.filesystems(), self._blocks)
        for filesystem in self._volumes.filesystems():
            device, kind = filesystem.device, filesystem.type
            if not holds_files(kind):
                if why := unread.get(device):
                    rows.append(SpaceUsage(self.image, device, None, kind, error=why))
                continue
            if kind == UNKNOWN:
                if types[device] == BIOS_BOOT:
                    continue
                reason = "no known filesystem"
                rows.append(
                    SpaceUsage(self.image, device, mountpoints.get(device), kind, error=reason)
                )
                continue
            space = self._client.call(questions.usage(device))
            rows.append(
                SpaceUsage(
                    image=self.image,
                    device=device,
                    mountpoint=mountpoints.get(device),
                    type=kind,
                    size=space.size,
                    used=space.used,
                    available=space.available,
                    inodes=space.inodes,
                    inodes_used=space.inodes_used,
                )
            )
        return tuple(rows)

    def operating_systems(self, *, packages: bool = False) -> tuple[OperatingSystem, ...]:
        """What is installed in the guest."""
        found = []
        with self._client.in_layout_time():
            roots = survey(self._volumes).roots
        for reason in self._volumes.refused.values():
            raise Unsupported(reason)
        for root in roots:
            with self._client.in_layout_time():
                layout = discover(self._volumes, root=root.source)
                self._tell(layout)
                self._mount(layout.mounts)
            mountpoints = {mount.mountpoint: mount.source for mount in layout.mounts}
            asked = questions.inspect(root.source, dict(sorted(mountpoints.items())), packages)
            found.append(self._client.call(asked))
        self._mounted = False
        return tuple(found)
