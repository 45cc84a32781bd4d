"""The steps of a host mount that its end is made of, and the list of all kinds."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from imgtool.errors import EngineError, HostError, ImgtoolError, RefusedError, join_names
from imgtool.host import program_messages
from imgtool.host.mountinfo import mounts
from imgtool.host.process import Limits, ProgramFailed, command_of, processes_naming, run
from imgtool.mount import kernel
from imgtool.mount.steps import loop, udev
from imgtool.mount.steps.mapper import Mapping, VolumeGroupActivation
from imgtool.mount.steps.qemu import Export, Nbd, Overlay, Snapshot
from imgtool.mount.steps.step import Save, Step

if TYPE_CHECKING:
    from imgtool.mount.mechanisms.appliance import Request

_SANDBOX_ENDS = 10.0  # seconds for a sandbox that copied the host's mounts, such as imgtool's own


@dataclass
class UdevRule(Step):
    """udev's rule for the devices of the mount with this id."""

    kind: ClassVar[str] = "guard"
    id: str

    def do(self, save: Save) -> None:
        """Write it; the devices are added as they are chosen."""
        udev.keep_away(self.id)

    def undo(self) -> None:
        """Remove it."""
        udev.let_go(self.id)


@dataclass
class Loop(Step):
    """A loop device over a stretch of a file or device; `size` 0 is the rest of it, `noted` the
    device and inode that the file has to have, if given."""

    kind: ClassVar[str] = "loop"
    path: str
    offset: int
    size: int
    writable: bool
    mark: str
    id: str
    number: int | None = None
    noted: Sequence[int] | None = None

    def __post_init__(self) -> None:
        # The device is detached by the kernel when nothing holds it: this does until it is mounted.
        self._descriptor: int | None = None

    @property
    def device(self) -> str:
        """The node of the device."""
        return f"/dev/loop{self.number}"

    def do(self, save: Save) -> None:
        """Attach the first device that is free; somebody else may be faster."""
        for _ in range(64):
            self.number = loop.free_number()
            save()
            name = f"loop{self.number}"
            udev.keep_away(self.id, name)
            self._descriptor = loop.attach(
                self.number,
                self.path,
                offset=self.offset,
                size=self.size,
                writable=self.writable,
                mark=self.mark,
                noted=self.noted,
            )
            if self._descriptor is not None:
                return
            udev.leave_alone(self.id, name)
        raise HostError("no loop device is free", subject=self.path)

    def pass_by_cache(self) -> None:
        """Read without the page cache of the file, now that nothing is written any more."""
        if self._descriptor is not None:
            loop.pass_by_cache(self._descriptor)

    def release(self) -> None:
        """Leave it to what was mounted on it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def undo(self) -> None:
        """Detach it if it is still the one that was attached."""
        self.release()
        if self.number is None:
            return
        try:
            loop.detach(self.number, self.mark, limit=_SANDBOX_ENDS)
        except HostError as error:
            places = kernel.still_mounted(self.device)
            if not places:
                loop.detach(self.number, self.mark)
                return
            raise RefusedError(
                f"{self.device} is still mounted: " + join_names(places),
                subject=self.path,
                hint="unmount it there, or end the process, then try again",
            ) from error

    def fault(self) -> str | None:
        """Whether the device is somebody else's by now, or nobody's."""
        found = loop.mark_of(self.number) if self.number is not None else None
        return None if found == self.mark else f"{self.device} is gone"


@dataclass
class Filesystem(Step):
    """A mounted filesystem."""

    kind: ClassVar[str] = "mount"
    source: str
    target: str
    fstype: str
    flags: int
    data: str

    def do(self, save: Save) -> None:
        """Mount it. Raises `OSError`."""
        kernel.mount(self.source, self.target, self.fstype, self.flags, self.data)

    def _there(self) -> bool:
        found = kernel.mounted_at(self.target)
        return found is not None and found.source == self.source

    def _covered(self) -> bool:
        rows = [row for row in mounts() if row.target == self.target]
        return any(row.source == self.source for row in rows[:-1])

    def undo(self) -> None:
        """Unmount it. Raises `RefusedError`, naming who uses it, if it is in use."""
        for _ in range(50):
            if not self._there():
                if self._covered():
                    raise RefusedError("something else is mounted over it", subject=self.target)
                return
            try:
                kernel.unmount(self.target)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise HostError(
                        f"it cannot be unmounted: {error.strerror}", subject=self.target
                    ) from error
                users = kernel.users_of(self.target)
                if not users:  # a look of udev's, which lasts a moment
                    time.sleep(0.05)
                    continue
                raise RefusedError(
                    "it is in use by " + join_names(users),
                    subject=self.target,
                    hint="leave the directory or end the process, then try again",
                ) from error
        if self._there():
            raise RefusedError("it is in use", subject=self.target)

    def fault(self) -> str | None:
        """Whether it is no longer mounted."""
        return None if self._there() else f"nothing is mounted at {self.target}"


@dataclass
class NtfsProgram(Filesystem):
    """A mounted NTFS, by ntfs-3g where the kernel has no driver of its own."""

    kind: ClassVar[str] = "ntfs-3g"

    def do(self, save: Save) -> None:
        """Start the program, which goes on in the background.

        Raises `EngineError`, and `RefusedError` where it would not write.
        """
        words = [
            ("ro" if self.flags & kernel.MS_RDONLY else "rw"),
            "nosuid",
            "nodev",
            *(["noexec"] if self.flags & kernel.MS_NOEXEC else []),
            self.data,
        ]
        argv = ["ntfs-3g", "-o", ",".join(word for word in words if word), self.source, self.target]
        try:
            run(argv, limits=Limits(wall=60))
        except ProgramFailed as error:
            told = program_messages.by_mount(error.stderr)
            raise EngineError(
                f"it cannot be mounted by ntfs-3g: {told.means}",
                subject=self.source,
                hint=told.step,
            ) from error
        # It falls back to that by itself where it holds writing for dangerous.
        if not self.flags & kernel.MS_RDONLY and os.statvfs(self.target).f_flag & os.ST_RDONLY:
            raise RefusedError(
                "ntfs-3g refuses to write to it: it was not shut down cleanly",
                subject=self.source,
                hint="start and shut down the guest, or mount it without --rw",
            )

    def _list_servers(self) -> list[int]:
        return [
            pid
            for pid in processes_naming(self.target)
            if Path(command_of(pid)[0]).name in ("ntfs-3g", "mount.ntfs")
        ]

    def undo(self) -> None:
        """Unmount it, and wait until the program has closed the device."""
        served = self._list_servers()
        super().undo()
        for pid in served:
            kernel.await_end(pid)


@dataclass
class Appliance(Step):
    """A FUSE mount that libguestfs's appliance serves, by a process of its own.

    `request` is what that process is asked for (`imgtool.mount.mechanisms.appliance`).
    """

    kind: ClassVar[str] = "appliance"
    folder: str
    target: str
    request: Request

    def to_json(self) -> dict[str, object]:
        """Without the keys of encrypted devices, which nothing needs later."""
        return {**super().to_json(), "request": {**self.request, "keys": []}}

    def do(self, save: Save) -> None:
        """Start the process and wait until the mount is there."""
        from imgtool.mount.mechanisms import appliance

        appliance.start(Path(self.folder), self.request)

    def _servers(self) -> list[int]:
        return [
            pid
            for pid in processes_naming(self.folder)
            if "imgtool.mount.mechanisms.appliance" in command_of(pid)
        ]

    def undo(self) -> None:
        """Unmount it and wait until the appliance has closed the image."""
        from imgtool.mount.mechanisms import appliance

        appliance.stop(
            Path(self.folder),
            self.target,
            writable=bool(self.request["writable"]),
            servers=self._servers,
        )

    def fault(self) -> str | None:
        """Whether the process is gone."""
        from imgtool.mount.mechanisms import appliance

        if not (self._servers() and appliance.is_mounted(self.target)):
            return "its appliance is gone"
        return appliance.lost_helper(Path(self.folder))


_KINDS: dict[str, type[Step]] = {
    step.kind: step
    for step in (
        UdevRule,
        Overlay,
        Snapshot,
        Export,
        Nbd,
        Loop,
        Mapping,
        VolumeGroupActivation,
        Filesystem,
        NtfsProgram,
        Appliance,
    )
}


def from_json(known: dict[str, object]) -> Step:
    """A step as the journal holds it. Raises `ImgtoolError` for a kind that is not known."""
    kind = _KINDS.get(str(known["kind"]))
    if kind is None:
        raise ImgtoolError(f"the journal has a step of an unknown kind: {known['kind']}")
    names = {row.name for row in fields(kind)}  # type: ignore[arg-type]
    make: Callable[..., Step] = kind
    return make(**{name: value for name, value in known.items() if name in names})
