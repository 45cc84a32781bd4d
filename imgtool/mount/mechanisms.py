"""The ways to make the disks of a guest block devices of the host, one class each.

Every mechanism answers two things: the path of a whole disk, to be looked into, and the block
device of a place on it. Where nothing may be written they stand on a throw-away overlay, so that
the kernel can replay a journal without a byte of the image changing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from imgtool.errors import HostError
from imgtool.image.chain import Chain
from imgtool.image.locks import in_use_for_writing
from imgtool.mount import kernel, mapper_steps, qemu_steps, steps
from imgtool.mount.journal import Journal
from imgtool.mount.plan import Disk, Place
from imgtool.process import Limits, find, run


def _node(chain: Chain, name: str, *, writable: bool, overlay: Path | None) -> dict[str, Any]:
    """A disk as QEMU's -blockdev takes it, on an overlay if one is given."""
    shared = not writable and any(in_use_for_writing(path) is not None for path in chain.files)
    below = chain.blockdev(read_only=not writable, force_share=shared)
    if overlay is None:
        return {**below, "node-name": name}
    return {
        "driver": "qcow2",
        "node-name": name,
        "file": {"driver": "file", "filename": str(overlay)},
        "backing": below,
    }


@dataclass
class Mechanism:
    """What the mechanisms share: the chains, the disks in them, and the journal of the mount.

    With `overlays` the disks stand on throw-away overlays and can be written to, though not
    `writable`.
    """

    name: ClassVar[str]
    raw_only: ClassVar[bool] = False

    chains: Sequence[Chain]
    disks: Sequence[Disk]
    journal: Journal
    writable: bool
    overlays: bool

    def __post_init__(self) -> None:
        self._loops: list[steps.Loop] = []

    @classmethod
    def missing(cls) -> str | None:
        """Why this machine cannot do it, in one line; None if it can."""
        raise NotImplementedError

    def start(self) -> None:
        """Do what is done once, before anything is looked at."""

    def disk(self, number: int) -> str:
        """The path of a whole disk, a file or a device."""
        raise NotImplementedError

    def block(self, place: Place) -> str:
        """The block device of a place: here a loop device over the whole disk."""
        whole = place.number is None
        step = steps.Loop(
            self.disk(place.disk),
            offset=place.offset,
            size=0 if whole else place.size,
            writable=self.writable or self.overlays,
            mark=f"imgtool {self.journal.id} {len(self._loops)}",
            id=self.journal.id,
        )
        self.journal.do(step)
        self._loops.append(step)
        return step.device

    def release(self) -> None:
        """Leave the loop devices to what was mounted on them."""
        for step in self._loops:
            step.release()

    # For those that start QEMU

    def _overlays(self) -> list[Path | None]:
        if not self.overlays:
            return [None] * len(self.disks)
        paths: list[Path | None] = []
        for disk in self.disks:
            path = self.journal.folder / f"overlay{disk.number}.qcow2"
            self.journal.do(qemu_steps.Overlay(str(path), disk.size))
            paths.append(path)
        return paths

    def _exported(self) -> list[str]:
        """Every disk as a file, through QEMU's storage daemon."""
        overlays = self._overlays()
        nodes, points = [], {}
        for disk, chain, overlay in zip(self.disks, self.chains, overlays, strict=True):
            name = f"disk{disk.number}"
            node = _node(chain, name, writable=self.writable, overlay=overlay)
            nodes.append(json.dumps(node, ensure_ascii=False))
            points[name] = str(self.journal.folder / name)
        writable = self.writable or self.overlays
        self.journal.do(qemu_steps.Export(str(self.journal.folder), nodes, points, writable))
        return list(points.values())


def _load(module: str) -> None:
    with contextlib.suppress(HostError):
        run(["modprobe", module], limits=Limits(wall=30))


def _misc_device(name: str) -> bool:
    lines = Path("/proc/misc").read_text().splitlines()
    return any(line.split()[-1] == name for line in lines)


def no_device_mapper() -> str | None:
    """Why there is no device-mapper, in one line; None if there is."""
    if not _misc_device("device-mapper"):
        _load("dm-mod")
        if not _misc_device("device-mapper"):
            return "the kernel has no device-mapper (modprobe dm-mod)"
    return _without("dmsetup")


def _without(*programs: str) -> str | None:
    for program in programs:
        if find(program) is None:
            return f"{program} is not installed"
    return None


def _not_root() -> str | None:
    return None if os.geteuid() == 0 else "only root can mount block devices"


def _no_loop() -> str | None:
    if not Path("/dev/loop-control").exists():
        _load("loop")
    found = Path("/dev/loop-control").exists()
    return None if found else "the kernel has no loop devices (modprobe loop)"


def _no_fuse() -> str | None:
    if not Path("/dev/fuse").exists():
        _load("fuse")
    return None if Path("/dev/fuse").exists() else "the kernel has no FUSE (modprobe fuse)"


class LoopMechanism(Mechanism):
    """A raw image through loop devices, with the offset and size of each partition."""

    name = "loop"
    raw_only = True

    @classmethod
    def missing(cls) -> str | None:
        """Root and loop devices."""
        return _not_root() or _no_loop()

    def start(self) -> None:
        """The files themselves, or on overlays what QEMU makes of them."""
        self._paths = (
            self._exported() if self.overlays else [str(c.active.path) for c in self.chains]
        )

    def disk(self, number: int) -> str:
        """The image file, or its overlay."""
        return self._paths[number]


class Kpartx(LoopMechanism):
    """A raw image through one loop device and device-mapper mappings of its partitions."""

    name = "kpartx"

    @classmethod
    def missing(cls) -> str | None:
        """Root, loop devices, device-mapper and kpartx."""
        return super().missing() or _without("kpartx") or no_device_mapper()

    def start(self) -> None:
        """One loop device a disk."""
        super().start()
        self._whole = [
            super(Kpartx, self).block(Place(disk.number, None, 0, disk.size)) for disk in self.disks
        ]
        self._mappings: dict[int, mapper_steps.Mapping] = {}

    def block(self, place: Place) -> str:
        """The mapping of the partition; the loop device for the whole disk."""
        if place.number is None:
            return self._whole[place.disk]
        if place.disk not in self._mappings:
            step = mapper_steps.Mapping(
                self._whole[place.disk],
                f"-imgtool-{self.journal.id}-",
                self.writable or self.overlays,
            )
            self.journal.do(step)
            self._mappings[place.disk] = step
        node = self._mappings[place.disk].partition(place.number)
        if not Path(node).exists():
            raise HostError(f"kpartx made no mapping of partition {place.number}", subject=node)
        return node


class NbdMechanism(Mechanism):
    """Any format, through the kernel's nbd and qemu-nbd."""

    name = "nbd"

    @classmethod
    def missing(cls) -> str | None:
        """Root, qemu-nbd and the module, loaded or to be loaded."""
        release = os.uname().release
        there = Path("/sys/block/nbd0").exists() or any(
            Path("/lib/modules", release).glob("kernel/drivers/block/nbd.ko*")
        )
        absent = None if there else "the kernel has no nbd (modprobe nbd)"
        return _not_root() or _without("qemu-nbd") or absent

    def start(self) -> None:
        """Connect every disk."""
        self._steps = []
        for disk, chain, overlay in zip(self.disks, self.chains, self._overlays(), strict=True):
            node = _node(chain, f"disk{disk.number}", writable=self.writable, overlay=overlay)
            image = "json:" + json.dumps(node, ensure_ascii=False)
            step = qemu_steps.Nbd(
                str(self.journal.folder), image, disk.number, self.writable or self.overlays
            )
            self.journal.do(step)
            self._steps.append(step)

    def disk(self, number: int) -> str:
        """The nbd device."""
        return self._steps[number].device

    def block(self, place: Place) -> str:
        """The kernel's device of the partition; where it made none, a loop device over the disk."""
        if place.number is None:
            return self.disk(place.disk)
        node = Path(f"{self.disk(place.disk)}p{place.number}")
        size = Path(f"/sys/class/block/{node.name}/size")

        def there() -> bool:
            return node.exists() and size.exists() and int(size.read_text()) * 512 == place.size

        try:
            kernel.wait_until(there, f"{node} does not appear", limit=2)
        except HostError:
            return super().block(place)
        return str(node)


class ExportMechanism(Mechanism):
    """Any format, through a FUSE export of QEMU's storage daemon and loop devices."""

    name = "export"

    @classmethod
    def missing(cls) -> str | None:
        """Root, loop devices, FUSE and the daemon."""
        return _not_root() or _no_loop() or _no_fuse() or _without("qemu-storage-daemon")

    def start(self) -> None:
        """One daemon for every disk."""
        self._paths = self._exported()

    def disk(self, number: int) -> str:
        """The exported file."""
        return self._paths[number]


MECHANISMS: tuple[type[Mechanism], ...] = (LoopMechanism, ExportMechanism, NbdMechanism, Kpartx)
