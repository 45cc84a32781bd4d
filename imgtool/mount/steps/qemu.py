"""The steps that QEMU's programs do: overlays, servers of a snapshot, the storage daemon's exports,
nbd devices."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from imgtool.errors import HostError, ImageError
from imgtool.host import program_messages
from imgtool.host.process import Limits, ProgramFailed, command_of, find, processes_naming, run
from imgtool.mount import kernel
from imgtool.mount.steps import udev
from imgtool.mount.steps.step import Save, Step

_MOMENT = Limits(wall=60)
# QEMU with a chain of 200 links stays far below this.
_SERVER_LIMITS = Limits(memory=8 << 30, wall=120)


@dataclass
class Overlay(Step):
    """A throw-away overlay: an empty qcow2 file of `size` bytes."""

    kind: ClassVar[str] = "overlay"
    path: str
    size: int

    def do(self, save: Save) -> None:
        """Make the file. QEMU is told what it stands on when it is opened, not here."""
        run(["qemu-img", "create", "-q", "-f", "qcow2", self.path, str(self.size)], limits=_MOMENT)

    def undo(self) -> None:
        """Remove the file."""
        Path(self.path).unlink(missing_ok=True)


def _servers(program: str, folder: str) -> list[int]:
    """The processes of a program that were started for the mount with this folder."""
    return [
        pid
        for pid in processes_naming(folder)
        if Path((command_of(pid) or [""])[0]).name == program
    ]


def _last_line(error: ProgramFailed) -> str:
    lines = error.stderr.strip().splitlines()
    return lines[-1].split(": ", 1)[-1] if lines else str(error)


@dataclass
class Snapshot(Step):
    """A disk as it was at an internal snapshot, served on a socket for the steps after this one.

    `image` is what qemu-nbd opens, `id` the snapshot's. Only qemu-nbd can open one: the block layer
    that the storage daemon and its like are given has no option for it.
    """

    kind: ClassVar[str] = "snapshot"
    folder: str
    image: str
    index: int
    id: str

    @property
    def socket(self) -> str:
        """Where it is served."""
        return f"{self.folder}/snapshot{self.index}.socket"

    def _pidfile(self) -> str:
        return f"{self.folder}/snapshot{self.index}.pid"

    def do(self, save: Save) -> None:
        """Start the server; it listens once this returns."""
        argv = ["qemu-nbd", "--fork", "--read-only", "--persistent", f"--socket={self.socket}"]
        # By id, since a name can hold what a command line cannot.
        argv += ["--load-snapshot=snapshot.id=" + self.id.replace(",", ",,")]
        try:
            run([*argv, f"--pid-file={self._pidfile()}", self.image], limits=_SERVER_LIMITS)
        except ProgramFailed as error:
            told = program_messages.by_qemu(error.stderr)
            raise ImageError(
                f"the snapshot cannot be read: {told.means}", hint=told.step
            ) from error

    def _alive(self) -> list[int]:
        ours = f"--socket={self.socket}"
        return [pid for pid in _servers("qemu-nbd", self.folder) if ours in command_of(pid)]

    def undo(self) -> None:
        """End the server, and wait until it has closed the image."""
        for pid in self._alive():
            kernel.end_process(pid)
        for left in (self.socket, self._pidfile()):
            Path(left).unlink(missing_ok=True)

    def fault(self) -> str | None:
        """Whether the server is gone."""
        return None if self._alive() else "the server of the snapshot is gone"


@dataclass
class Export(Step):
    """Disks as files, through QEMU's storage daemon and FUSE.

    `nodes` are its `--blockdev` arguments, `points` the file of each node that is named `diskN`.
    """

    kind: ClassVar[str] = "export"
    folder: str
    nodes: list[str]
    points: dict[str, str]
    writable: bool

    def do(self, save: Save) -> None:
        """Start the daemon; it answers once this returns."""
        argv = ["qemu-storage-daemon", "--daemonize", "--pidfile", f"{self.folder}/storage.pid"]
        for node in self.nodes:
            argv += ["--blockdev", node]
        for number, (node, point) in enumerate(self.points.items()):
            Path(point).touch()
            options = f"type=fuse,id=export{number},node-name={node},mountpoint={point}"
            argv += ["--export", options + (",writable=on" if self.writable else "")]
        try:
            run(argv, limits=_SERVER_LIMITS)
        except ProgramFailed as error:
            told = program_messages.by_qemu(error.stderr)
            raise ImageError(f"QEMU cannot serve it: {told.means}", hint=told.step) from error

    def _alive(self) -> list[int]:
        return _servers("qemu-storage-daemon", self.folder)

    def undo(self) -> None:
        """End the daemon, which writes what it holds, and what it leaves when it was killed."""
        for pid in self._alive():
            kernel.end_process(pid)
        for point in self.points.values():
            while kernel.mounted_at(point):
                with contextlib.suppress(OSError):
                    kernel.unmount(point, kernel.MNT_DETACH)
            Path(point).unlink(missing_ok=True)
        Path(self.folder, "storage.pid").unlink(missing_ok=True)

    def fault(self) -> str | None:
        """Whether the daemon is gone."""
        return None if self._alive() else "qemu-storage-daemon is gone"


@dataclass
class Nbd(Step):
    """A disk as a kernel nbd device, through qemu-nbd."""

    kind: ClassVar[str] = "nbd"
    folder: str
    image: str
    index: int
    writable: bool
    number: int | None = None

    @property
    def device(self) -> str:
        """The node of the device."""
        return f"/dev/nbd{self.number}"

    def _pidfile(self) -> str:
        return f"{self.folder}/nbd{self.index}.pid"

    @staticmethod
    def _free() -> list[int]:
        numbers = []
        for entry in Path("/sys/block").glob("nbd*"):
            if not (entry / "pid").exists() and (entry / "size").read_text().strip() == "0":
                numbers.append(int(entry.name.removeprefix("nbd")))
        return sorted(numbers)

    def do(self, save: Save) -> None:
        """Connect a device that is free, and wait until its size is known."""
        if not Path("/sys/block/nbd0").exists():
            with contextlib.suppress(HostError):
                run(["modprobe", "nbd", "max_part=64"], limits=_MOMENT)
        tried: list[str] = []
        for number in self._free():
            self.number = number
            save()
            udev.keep_away(Path(self.folder).name, f"nbd{number}")
            argv = ["qemu-nbd", f"--connect={self.device}", f"--pid-file={self._pidfile()}"]
            argv += [] if self.writable else ["--read-only"]
            try:
                run([*argv, self.image], limits=_SERVER_LIMITS)
            except ProgramFailed as error:
                tried.append(_last_line(error))
                udev.leave_alone(Path(self.folder).name, f"nbd{number}")
                if "busy" not in error.stderr.lower():
                    break
                continue
            kernel.wait_until(self._has_size, f"{self.device} does not get a size")
            self._settle()
            return
        raise HostError(
            f"no nbd device could be connected: {tried[-1]}" if tried else "no nbd device is free",
            hint="modprobe nbd, or --via export",
        )

    def _has_size(self) -> bool:
        return Path(f"/sys/block/nbd{self.number}/size").read_text().strip() != "0"

    def _settle(self) -> None:
        """Make the kernel look for partitions, and wait until it did."""
        if find("blockdev"):
            with contextlib.suppress(HostError):
                run(["blockdev", "--rereadpt", self.device], limits=_MOMENT)
        udev.settle()

    def _list_servers(self) -> list[int]:
        """Our servers of this device."""
        return [
            pid
            for pid in _servers("qemu-nbd", self.folder)
            if f"--connect={self.device}" in command_of(pid)
        ]

    def _connected(self) -> bool:
        """Whether the kernel's device is served by our own qemu-nbd."""
        try:
            thread = Path(f"/sys/block/nbd{self.number}/pid").read_text().strip()
            lines = Path(f"/proc/{thread}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return False
        group = next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))
        return self.folder in " ".join(command_of(group))

    def undo(self) -> None:
        """Disconnect it if it is ours, and wait for the kernel and for QEMU."""
        if self.number is None:
            return
        servers = self._list_servers()
        if self._connected():
            run(["qemu-nbd", "--disconnect", self.device], limits=_MOMENT)
            kernel.wait_until(lambda: not self._connected(), f"{self.device} is still connected")
        for pid in servers:
            # It ends by itself once the kernel let go, and writes what it holds before.
            kernel.await_end(pid)
        Path(self._pidfile()).unlink(missing_ok=True)

    def fault(self) -> str | None:
        """Whether the device is no longer connected."""
        return None if self._connected() else f"{self.device} is no longer connected"
