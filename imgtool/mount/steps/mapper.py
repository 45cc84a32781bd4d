"""The steps that device-mapper does: partition mappings and volume groups."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from imgtool.errors import HostError, RefusedError, join_names
from imgtool.host.process import Limits, ProgramFailed, run
from imgtool.mount.steps import udev
from imgtool.mount.steps.step import Save, Step

_MOMENT = Limits(wall=60)


def _list_mapped(pattern: str) -> list[str]:
    """The device-mapper devices whose `NAME UUID` matches."""
    try:
        listed = run(
            ["dmsetup", "info", "-c", "--noheadings", "--separator", " ", "-o", "name,uuid"],
            limits=_MOMENT,
        )
    except HostError:
        return []  # no device-mapper, so nothing is mapped
    lines = listed.stdout.decode().splitlines()
    return [line.split(" ")[0] for line in lines if re.search(pattern, line)]


def device_mapper_environment() -> dict[str, str]:
    """For the programs of device-mapper: without udev nobody else makes the nodes."""
    return {} if udev.running() else {"DM_DISABLE_UDEV": "1"}


def _unmap(names: Callable[[], list[str]]) -> None:
    # What stands on another one of them has to go first.
    for _ in range(3):
        for name in names():
            with contextlib.suppress(ProgramFailed):
                run(
                    ["dmsetup", "remove", "--retry", name],
                    limits=_MOMENT,
                    env=device_mapper_environment(),
                )
        if not names():
            return
    raise RefusedError("the mappings are in use", subject=join_names(names()))


@dataclass
class Mapping(Step):
    """The partitions of a device as device-mapper devices, through kpartx."""

    kind: ClassVar[str] = "mapping"
    device: str
    delimiter: str
    writable: bool

    def partition(self, number: int) -> str:
        """The node of a partition."""
        return f"/dev/mapper/{Path(self.device).name}{self.delimiter}{number}"

    def do(self, save: Save) -> None:
        """Map them all, and wait for the nodes."""
        argv = ["kpartx", "-a", "-s", "-p", self.delimiter]
        argv += [] if self.writable else ["-r"]
        run([*argv, self.device], limits=_MOMENT, env=device_mapper_environment())

    def _names(self) -> list[str]:
        return _list_mapped("^" + re.escape(f"{Path(self.device).name}{self.delimiter}"))

    def undo(self) -> None:
        """Remove those that carry the mount's own name."""
        _unmap(self._names)

    def fault(self) -> str | None:
        """Whether they are gone."""
        return None if self._names() else f"the mappings of {self.device} are gone"


def lvm(devices: list[str], *words: str) -> str:
    """Run an LVM command that sees these devices and no other; what it wrote.

    The host's own volumes, its device file and its locks on them are not touched.
    """
    command, *rest = words
    options = ["--devicesfile", "", "--devices", ",".join(devices)]
    udev = 0 if device_mapper_environment() else 1
    settings = (
        f"activation{{monitoring=0 udev_sync={udev} udev_rules={udev}}} "
        "global{event_activation=0} backup{backup=0 archive=0}"
    )
    done = run(
        ["lvm", command, *options, "--config", settings, *rest],
        limits=_MOMENT,
        env={**device_mapper_environment(), "LVM_SUPPRESS_FD_WARNINGS": "1"},
    )
    return done.stdout.decode("utf-8", "replace")


def mapper_name(name: str) -> str:
    """A name as it is part of a device-mapper name."""
    return name.replace("-", "--")


@dataclass
class VolumeGroupActivation(Step):
    """A volume group of the guest, active on the host.

    With `clone` its metadata, on the throw-away overlay, are given new UUIDs and the name `name`:
    then it cannot be mixed up with a group of the host, or with another copy of itself.
    """

    kind: ClassVar[str] = "volumes"
    devices: list[str]
    original: str
    name: str
    clone: bool
    uuid: str = ""

    def volume(self, name: str) -> str:
        """The node of a logical volume."""
        return f"/dev/mapper/{mapper_name(self.name)}-{mapper_name(name)}"

    def do(self, save: Save) -> None:
        """Rename it if it is to be, and activate its volumes."""
        if self.clone:
            lvm(self.devices, "vgimportclone", "-n", self.name, *self.devices)
        self.uuid = lvm(self.devices, "vgs", "--noheadings", "-o", "vg_uuid", self.name).strip()
        self.uuid = self.uuid.replace("-", "")
        save()
        lvm(self.devices, "vgchange", "-ay", self.name)

    def _names(self) -> list[str]:
        if self.uuid:
            return _list_mapped(f" LVM-{re.escape(self.uuid)}")
        return _list_mapped("^" + re.escape(mapper_name(self.name)) + "-[^-]") if self.clone else []

    def undo(self) -> None:
        """Remove the volumes of this very group from the kernel; nothing is written to it."""
        _unmap(self._names)

    def fault(self) -> str | None:
        """Whether no volume is active any more."""
        return None if self._names() else f"no volume of {self.original} is active"
