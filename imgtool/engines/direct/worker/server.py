"""The worker: the only process that looks at what an image contains, confined before it does.

It reads requests from standard input and writes frames (see `frames`) to standard output, one
request at a time, until standard input ends. It holds no secret, has no place to write to, and may
not start programs once the image is open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import stat
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from imgtool.engines.direct.wire import frames, requests, seccomp
from imgtool.engines.direct.wire.extents import Extent
from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.wire.ring import SLOT
from imgtool.engines.direct.worker.async_reader import LARGE, Contents, map_file
from imgtool.engines.direct.worker.fs.base import Filesystem, PathNotFound, ReadFailed
from imgtool.engines.direct.worker.requests import Requests, Stopped
from imgtool.engines.direct.worker.slots import Slots
from imgtool.engines.direct.worker.sources import CannotOpen, Disk, DiskServerGone
from imgtool.engines.direct.worker.tree import Found, Tree
from imgtool.engines.direct.worker.tree_files import TreeFiles, pieces
from imgtool.engines.direct.worker.volumes import Volumes
from imgtool.formats.checksums import CHECKSUMS
from imgtool.formats.xattrs import Xattrs

_BATCH = 500
_NAMES = 256 << 10
_MOST_RANGES = 150_000  # what fits in one frame
_LARGEST_SMALL = 1 << 20
_MOST_RUNS = 100_000  # what fits in one frame
_LEAST_LENT = 64 << 10  # a pipe is as good for less
_SIGN_OF_LIFE = 5.0  # seconds, far less than the parent's patience with silence


class Refused(Exception):
    """A request that cannot be: the parent is not who it should be."""


class Worker:
    """The state of one conversation: disks, volumes, and the tree that was mounted."""

    def __init__(self, asked: Requests, out: BinaryIO, disks: Sequence[Disk]) -> None:
        self._requests = asked
        self._out = out
        self._unopened: Sequence[Disk] | None = disks
        self._slots: Slots | None = None
        self._volumes: Volumes | None = None
        self._tree: Tree | None = None

    def serve(self) -> None:
        """Answer requests until there are no more."""
        while (request := self._requests.next()) is not None:
            if self._slots is not None:
                self._slots.again()
            self.answer(request)

    def answer(self, request: requests.Request) -> None:
        """Answer one request, by the method that has its name."""
        try:
            answer = getattr(self, "do_" + requests.name_of(request))(request)
            if answer is not None:
                self._json(answer)
            frames.send(self._out, frames.END)
        except Stopped:
            frames.send(self._out, frames.END)
        except PathNotFound:
            self._error("missing", "no such file or directory in the guest")
        except Unsupported as error:
            self._error("appliance", str(error))
        except (ReadFailed, CannotOpen) as error:
            kind = "image" if isinstance(error, CannotOpen) else "failed"
            self._error(kind, str(error), getattr(error, "path", None))
        except DiskServerGone as error:
            self._error("lost", str(error))
        except (MemoryError, RecursionError):
            self._error("appliance", "it takes too much memory")
        self._out.flush()

    def _error(self, kind: str, message: str, path: bytes | None = None) -> None:
        error = {"kind": kind, "message": message}
        more = {} if path is None else {"path": frames.text(path)}
        frames.send_json(self._out, frames.ERROR, error | more)

    def _json(self, value: object) -> None:
        frames.send_json(self._out, frames.JSON, value)

    def _data(self, data: bytes | bytearray) -> None:
        if not data:
            return
        if self._slots is None or len(data) < _LEAST_LENT:
            frames.send(self._out, frames.DATA, data)
            self._requests.poll_control()
            return
        whole = memoryview(data)
        for start in range(0, len(data), SLOT):
            part = whole[start : start + SLOT]
            slot = self._slots.acquire()
            assert slot is not None
            self._slots.view(slot, len(part))[:] = part
            self._lend(self._slots, slot, len(part))

    def _lend(self, slots: Slots, slot: int, length: int) -> None:
        frames.send(self._out, frames.GRANT, slots.place(slot, length))
        self._out.flush()

    def _contents(self, filesystem: Filesystem, found: Found, offset: int, length: int) -> None:
        """Bytes of a regular file, in frames of data."""
        end = min(offset + length, found.node.size)
        runs = self._runs(filesystem, found, end - offset)
        if self._slots is None or runs is None:
            for piece in pieces(filesystem, found, offset, length):
                self._data(piece)
            return
        contents = Contents(self._open_volumes.disks, runs, self._slots.view, self._slots.acquire)
        try:
            with contextlib.closing(contents.read(offset, end)) as filled:
                for slot, part in filled:
                    self._lend(self._slots, slot, part)
                    offset += part
        except ReadFailed:
            for piece in pieces(filesystem, found, offset, end - offset):  # up to the damage
                self._data(piece)
            raise

    def _runs(self, filesystem: Filesystem, found: Found, length: int) -> list[Extent] | None:
        """Where a file is, if it pays to read this much of it by that."""
        if self._slots is None or length < LARGE:
            return None
        if not all(disk.overlaps for disk in self._open_volumes.disks):
            return None
        return map_file(self._open_volumes, filesystem, found.place.inode)

    def _read_for_checksum(self, found: Found) -> Iterator[bytes | memoryview]:
        """All of a regular file, in parts that are good until the next one."""
        filesystem = self._mounted_tree.filesystem(found.place)
        slots, runs = self._slots, self._runs(filesystem, found, found.node.size)
        if slots is None or runs is None:
            yield from pieces(filesystem, found, 0, found.node.size)
            return
        contents = Contents(
            self._open_volumes.disks, runs, slots.view, lambda wait: slots.next_slot()
        )
        for slot, length in contents.read(0, found.node.size):
            yield slots.view(slot, length)

    # Disks and volumes

    def do_open(self, request: requests.Open) -> dict[str, object]:
        """Wait for the disks, give up all rights but those to read, find the volumes."""
        disks, self._unopened = self._unopened, None
        if disks is None:
            raise Refused
        if request.ring is not None:
            self._slots = Slots(request.ring, self._requests)
        for disk in disks:
            disk.wait()
        for disk, parts in zip(disks, request.lost, strict=False):
            disk.lose(parts)
        seccomp.confine(seccomp.worker_filter())
        self._volumes = Volumes(disks, request.unreplayed)
        blocks = [
            (*(getattr(b, name) for name in frames.BLOCK[:-1]), b.parents)
            for b in self._volumes.blocks
        ]
        groups = [
            (g.name, g.uuid, g.size, g.physical, [(v.name, v.uuid, v.size) for v in g.logical])
            for g in self._volumes.groups
        ]
        if sum(1 + len(group[3]) + len(group[4]) for group in groups) > frames.MOST_DEVICES:
            raise Unsupported(f"there are more than {frames.MOST_DEVICES} volume groups")
        return {"blocks": blocks, "groups": groups}

    @property
    def _open_volumes(self) -> Volumes:
        if self._volumes is None:
            raise Refused
        return self._volumes

    def _filesystem(self, device: str) -> Filesystem:
        return self._open_volumes.filesystem(device)

    def do_journals(self, request: requests.Journals) -> Sequence[object]:
        """Where the journals are that have to be replayed: device, and its stretches of disks."""
        return self._open_volumes.journals()

    def do_written(self, request: requests.Written) -> Sequence[object]:
        """Which stretches of the disks come from the topmost links of their chains."""
        return self._open_volumes.written_stretches(request.links)

    def do_look(self, request: requests.Look) -> None:
        """Mount one filesystem alone, to be looked into."""
        self._tree = Tree(self._filesystem(request.device))

    def do_mount(self, request: requests.Mount) -> list[str | None]:
        """Mount a layout, the root first; for each mount None, or why it is not there.

        What needs the appliance is mounted too, as a refusal for whoever touches it.
        """
        said: list[str | None] = []
        tree: Tree | None = None
        for device, mountpoint in request.mounts:
            reason = None
            if tree is None:
                tree = Tree(self._filesystem(device))
                said.append(None)
                continue
            filesystem: Filesystem | str
            try:
                filesystem = self._filesystem(device)
            except Unsupported as error:
                filesystem = str(error)
            try:
                tree.mount(frames.name(mountpoint), filesystem)
            except PathNotFound:
                reason = frames.NO_PLACE
            except ReadFailed as error:
                raise Unsupported(f"{mountpoint} cannot be looked up: {error}") from error
            said.append(reason)
        self._tree = tree
        return said

    def do_usage(self, request: requests.Usage) -> list[int]:
        """The numbers of statvfs for one filesystem."""
        try:
            return list(self._filesystem(request.device).usage())
        except ReadFailed as error:
            raise Unsupported(f"{request.device} is damaged: {error}") from error

    # Names

    @property
    def _mounted_tree(self) -> Tree:
        if self._tree is None:
            raise Refused
        return self._tree

    def do_resolve(self, request: requests.Resolve) -> str:
        """The path without symbolic links."""
        return frames.text(self._mounted_tree.resolve(frames.name(request.path))[0])

    def do_spelling(self, request: requests.Spelling) -> str:
        """The path in the case of the names on disk."""
        return frames.text(self._mounted_tree.spelling(frames.name(request.path)))

    def do_lstat(self, request: requests.Lstat) -> list[object]:
        """What lstat says of a path."""
        return _row(self._mounted_tree.lstat(frames.name(request.path)))

    def do_walk(self, request: requests.Walk) -> None:
        """What is in a directory, or everything below it: batches of rows and problems."""
        raw = frames.name(request.path)
        tree = self._mounted_tree
        real, place = tree.resolve(raw)
        if not stat.S_ISDIR(tree.filesystem(place).stat(place.inode).mode):
            raise ReadFailed("not a directory")
        if request.deep and (reason := tree.touches_refused(real)):
            raise Unsupported(reason)
        batch: list[list[object]] = []
        names = 0  # bytes: far down, a few paths fill a frame
        sent = time.monotonic()

        def send() -> None:
            nonlocal names, sent
            self._json(batch)
            self._out.flush()
            self._requests.poll_control()
            batch.clear()
            names, sent = 0, time.monotonic()

        def give(row: list[object], length: int) -> None:
            nonlocal names
            batch.append(row)
            names += length
            if len(batch) >= _BATCH or names >= _NAMES or time.monotonic() - sent >= _SIGN_OF_LIFE:
                send()

        def problem(at: bytes, reason: str) -> None:
            give([frames.text(at), reason], len(at))

        shared = None
        if request.written is not None:
            from imgtool.engines.direct.worker.shared import Shared

            shared = Shared(self._open_volumes, tree, request.written)
        found = tree.walk if request.deep else tree.children
        for child in found(raw, place, problem):
            summed = at = None
            if request.checksum is not None and stat.S_ISREG(child.node.mode):
                try:
                    at = shared.extent_digest(child) if shared else None
                    summed = self._sum(child, request.checksum) if at is None else None
                except ReadFailed as error:
                    problem(child.path, str(error))
            row = _row(child, summed, at)
            length = len(child.path) + len(child.target or b"")
            if request.xattrs:
                pairs: list[list[str]] | None = None
                try:
                    pairs = frames.pairs(self._xattrs(child))
                    if left_out := self._oversized_xattrs(child):
                        give([frames.text(child.path), left_out], len(child.path))
                except ReadFailed as error:
                    problem(child.path, str(error))
                row.append(pairs)
                length += sum(len(name) + len(value) for name, value in pairs or ())
            give(row, length)
        if batch:
            self._json(batch)

    def _xattrs(self, found: Found) -> Xattrs:
        return self._mounted_tree.filesystem(found.place).xattrs(found.place.inode)

    def _oversized_xattrs(self, found: Found) -> int:
        return self._mounted_tree.filesystem(found.place).oversized_xattrs(found.place.inode)

    def do_xattrs(self, request: requests.Xattrs) -> list[object]:
        """The extended attributes of a path, and how many others are too large to be given; a
        symbolic link is not followed."""
        found = self._mounted_tree.lstat(frames.name(request.path))
        return [frames.pairs(self._xattrs(found)), self._oversized_xattrs(found)]

    # Contents

    def _regular(self, path: str) -> tuple[Filesystem, Found]:
        tree = self._mounted_tree
        real, _ = tree.resolve(frames.name(path))
        found = tree.lstat(real)
        if not stat.S_ISREG(found.node.mode):
            raise ReadFailed("not a regular file")
        return tree.filesystem(found.place), found

    def _sum(self, found: Found, kind: str) -> str:
        if kind not in CHECKSUMS:
            raise Refused
        import hashlib

        digest = hashlib.new(kind, usedforsecurity=False)
        sent = time.monotonic()
        for piece in self._read_for_checksum(found):
            digest.update(piece)
            if time.monotonic() - sent >= _SIGN_OF_LIFE:
                frames.send(self._out, frames.ALIVE)
                self._out.flush()
                self._requests.poll_control()
                sent = time.monotonic()
        return digest.hexdigest()

    def do_checksum(self, request: requests.Checksum) -> str:
        """The checksum of a regular file."""
        return self._sum(self._regular(request.path)[1], request.kind)

    def do_read(self, request: requests.Read) -> None:
        """Bytes of a regular file, in frames of data."""
        filesystem, found = self._regular(request.path)
        self._contents(filesystem, found, request.offset, request.length)

    def do_runs(self, request: requests.Runs) -> list[list[int]] | None:
        """Where a part of a regular file lies, as `Extent`; None where nobody knows."""
        filesystem, found = self._regular(request.path)
        runs = map_file(self._open_volumes, filesystem, found.place.inode)
        if runs is None:
            return None
        first = bisect_right(runs, request.offset, key=lambda run: run.end)
        end = request.offset + request.length
        last = bisect_left(runs, end, key=lambda run: run.start)
        return [list(run) for run in runs[first:last]] if last - first <= _MOST_RUNS else None

    def do_small(self, request: requests.Small) -> None:
        """The first bytes of a regular file, whole in one frame; nothing if there is no file, and
        a string if there is nothing in it.
        """
        found = TreeFiles(self._mounted_tree).read(
            frames.text(frames.name(request.path)), min(request.limit, _LARGEST_SMALL)
        )
        if found:
            frames.send(self._out, frames.DATA, found)
        elif found is not None:
            self._json("")

    def do_is_dir(self, request: requests.IsDir) -> bool:
        """Whether a path leads to a directory."""
        raw = frames.name(request.path)
        try:
            _, place = self._mounted_tree.resolve(
                self._mounted_tree.spelling(raw) if request.any_case else raw
            )
            return stat.S_ISDIR(self._mounted_tree.filesystem(place).stat(place.inode).mode)
        except (PathNotFound, ReadFailed):
            return False

    def do_ranges(self, request: requests.Ranges) -> list[list[int]]:
        """Where a regular file has data."""
        filesystem, found = self._regular(request.path)
        ranges = filesystem.ranges(found.place.inode)
        if len(ranges) > _MOST_RANGES:
            raise Unsupported("a sparse file in too many pieces")
        return [list(stretch) for stretch in ranges]

    # What is installed

    def do_inspect(self, request: requests.Inspect) -> dict[str, object]:
        """What the operating system in the mounted tree is, and its packages if asked for."""
        from imgtool.formats.files import Undetermined
        from imgtool.guest.operating_system import identify
        from imgtool.guest.packages import installed_packages

        files = TreeFiles(self._mounted_tree)
        try:
            found = identify(files, request.root, dict(request.mountpoints))
            answer = dataclasses.asdict(found)
            if request.packages:
                rows = installed_packages(files, found.package_format)
                answer["applications"] = [dataclasses.astuple(row) for row in rows]
        except Undetermined as error:
            raise Unsupported(f"inspection: {error}") from error
        return answer

    def do_tar(self, request: requests.Tar) -> None:
        """A directory's content as a tar stream, names relative to it."""
        from imgtool.engines.direct.worker import tar_headers, tar_stream

        raw = frames.name(request.path).rstrip(b"/")
        tree = self._mounted_tree
        real, _ = tree.resolve(raw or b"/")
        if reason := tree.touches_refused(real):
            raise Unsupported(reason)

        def problem(at: bytes, reason: str) -> None:
            if not request.passes_over:
                raise ReadFailed(reason, at)
            self._json([frames.text(at), reason])

        def attributes(found: Found) -> bytes:
            try:
                return tar_headers.attributes(self._xattrs(found)) if request.xattrs else b""
            except ReadFailed:  # the walk before, which asks for all of them, says so
                return b""

        def contents(found: Found) -> None:
            self._contents(tree.filesystem(found.place), found, 0, found.node.size)

        left_out = frozenset(frames.name(text) for text in request.excluded)
        tar_stream.write(tree, raw, left_out, attributes, problem, self._data, contents)


def _row(found: Found, checksum: str | None = None, at: str | None = None) -> list[object]:
    target = None if found.target is None else frames.text(found.target)
    return [frames.text(found.path), found.place.mount, *found.node, target, checksum, at]
