"""The steps of a host mount that its end is made of, and the list of all kinds."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from imgtool.errors import HostError, ImgtoolError, RefusedError
from imgtool.mount import kernel, loop
from imgtool.mount.mapper_steps import Group, Mapping
from imgtool.mount.qemu_steps import Export, Nbd, Overlay
from imgtool.mount.step import Save, Step


@dataclass
class Loop(Step):
    """A loop device over a stretch of a file or device; `size` 0 is the rest of it."""

    kind: ClassVar[str] = "loop"
    path: str
    offset: int
    size: int
    writable: bool
    mark: str
    sector_size: int = 0
    number: int | None = None

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
            self._descriptor = loop.attach(
                self.number,
                self.path,
                offset=self.offset,
                size=self.size,
                writable=self.writable,
                mark=self.mark,
                sector_size=self.sector_size,
            )
            if self._descriptor is not None:
                return
        raise HostError("no loop device is free", subject=self.path)

    def release(self) -> None:
        """Leave it to what was mounted on it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def undo(self) -> None:
        """Detach it if it is still the one that was attached."""
        self.release()
        if self.number is not None:
            loop.detach(self.number, self.mark)

    def broken(self) -> str | None:
        """Whether the device is somebody else's by now, or nobody's."""
        found = loop.status(self.number) if self.number is not None else None
        return None if found and found.mark == self.mark else f"{self.device} is gone"


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

    def undo(self) -> None:
        """Unmount it. Raises `RefusedError`, naming who uses it, if it is in use."""
        for _ in range(50):
            if not self._there():
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
                    "it is in use by " + ", ".join(users[:10]),
                    subject=self.target,
                    hint="leave the directory or end the process, then try again",
                ) from error
        if self._there():
            raise RefusedError("it is in use", subject=self.target)

    def broken(self) -> str | None:
        """Whether it is no longer mounted."""
        return None if self._there() else f"nothing is mounted at {self.target}"


@dataclass
class Appliance(Step):
    """A FUSE mount that libguestfs's appliance serves, by a process of its own.

    `request` is what that process is asked for (`imgtool.mount.appliance`).
    """

    kind: ClassVar[str] = "appliance"
    folder: str
    target: str
    request: dict[str, Any]

    def do(self, save: Save) -> None:
        """Start the process and wait until the mount is there."""
        from imgtool.mount import appliance

        appliance.start(Path(self.folder), self.request)

    def _servers(self) -> list[int]:
        return [
            pid
            for pid in kernel.processes_naming(self.folder)
            if "imgtool.mount.appliance" in kernel.command_of(pid)
        ]

    def _there(self) -> bool:
        found = kernel.mounted_at(self.target)
        return found is not None and found.fstype.startswith("fuse")

    def undo(self) -> None:
        """Unmount it and wait until the appliance has closed the image."""
        from imgtool.mount import appliance

        servers = self._servers()
        if self._there():
            appliance.unmount(self.target)
        for pid in servers:
            kernel.await_end(pid)
        for name in ("request.json", "ready"):
            Path(self.folder, name).unlink(missing_ok=True)

    def broken(self) -> str | None:
        """Whether the process is gone."""
        return None if self._servers() and self._there() else "its appliance is gone"


_KINDS: dict[str, type[Step]] = {
    step.kind: step for step in (Overlay, Export, Nbd, Loop, Mapping, Group, Filesystem, Appliance)
}


def from_json(known: dict[str, Any]) -> Step:
    """A step as the journal holds it. Raises `ImgtoolError` for a kind that is not known."""
    kind = _KINDS.get(known["kind"])
    if kind is None:
        raise ImgtoolError(f"the journal has a step of an unknown kind: {known['kind']}")
    names = {row.name for row in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in known.items() if name in names})
