"""The mechanisms of `mount`, one class each; `registry` has their names.

Those that make block devices of the host answer two things: the path of a whole disk, to be looked
into, and the block device of a place on it. Where nothing may be written they stand on a throw-away
overlay, so that the kernel can replay a journal without a byte of the image changing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from imgtool.errors import HostError
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.reading import passes_locks
from imgtool.mount import kernel
from imgtool.mount.journal import Journal
from imgtool.mount.mechanisms import available
from imgtool.mount.mechanisms.available import Need
from imgtool.mount.plan import Disk, DiskRange
from imgtool.mount.steps import mapper, qemu, steps


def _on_overlay(below: dict[str, object], name: str, overlay: Path | None) -> dict[str, object]:
    """A disk as QEMU's -blockdev takes it, on an overlay if one is given."""
    if overlay is None:
        return {**below, "node-name": name}
    return {
        "driver": "qcow2",
        "node-name": name,
        "file": {"driver": "file", "filename": str(overlay)},
        "backing": below,
    }


class Mechanism:
    """A way to mount a guest: what it takes, and what it needs of this machine."""

    raw_only: ClassVar[bool] = False
    # In this order they are asked for; the first that is missing is told.
    needs: ClassVar[Sequence[Need]]

    @classmethod
    def missing(cls, *, load: bool = True) -> str | None:
        """Why this machine cannot do it, in one line; None if it can.

        With `load` a module that the kernel lacks is loaded.
        """
        return next((why for need in cls.needs if (why := need(load=load))), None)


class ApplianceMechanism(Mechanism):
    """Any format, through the appliance and FUSE: `appliance` beside this."""

    needs = (available.no_appliance,)


@dataclass
class DeviceMechanism(Mechanism):
    """What those share that make block devices of the host: the chains, the disks in them, and the
    journal of the mount.

    With `overlays` the disks stand on throw-away overlays and can be written to, though not
    `writable`. With `snapshot` they are as they were at that internal snapshot.
    """

    # On an overlay even where no journal has to be replayed: to begin again would take long.
    always_overlaid: ClassVar[bool] = False
    # Whether our own arithmetic alone says where on the file a partition is.
    by_offset: ClassVar[bool] = False

    chains: Sequence[Chain]
    disks: Sequence[Disk]
    journal: Journal
    writable: bool
    overlays: bool
    snapshot: str | None = None

    def __post_init__(self) -> None:
        self._loops: list[steps.Loop] = []
        self._blocks: dict[DiskRange, str] = {}
        self._read_only: dict[str, str] = {}

    def start(self) -> None:
        """Do what is done once, before anything is looked at."""

    def disk(self, number: int) -> str:
        """The path of a whole disk, a file or a device."""
        raise NotImplementedError

    def block(self, place: DiskRange) -> str:
        """The block device of a place, one however often it is asked for: the kernel takes a second
        one with the same btrfs for another of its devices, and mounts neither."""
        if place not in self._blocks:
            self._blocks[place] = self._make_block(place)
        return self._blocks[place]

    def _make_block(self, place: DiskRange) -> str:
        """Here a loop device over the disk's file."""
        path = self.disk(place.disk)
        return self._loop(
            path,
            offset=place.offset,
            size=0 if place.number is None else place.size,
            writable=self.writable or self.overlays,
            noted=dict(self.chains[place.disk].active.inodes).get(Path(path)),
        )

    def read_only(self, device: str) -> str:
        """A device through which the kernel cannot write to this one, not even what is in a
        journal."""
        if device not in self._read_only:
            self._read_only[device] = self._loop(device, offset=0, size=0, writable=False)
        return self._read_only[device]

    def _loop(
        self,
        path: str,
        *,
        offset: int,
        size: int,
        writable: bool,
        noted: Sequence[int] | None = None,
    ) -> str:
        mark = f"imgtool {self.journal.id} {len(self._loops)}"
        step = steps.Loop(path, offset, size, writable, mark, self.journal.id, noted=noted)
        self.journal.do(step)
        self._loops.append(step)
        return step.device

    def release(self) -> None:
        """Leave the loop devices to what was mounted on them.

        What QEMU exports need not be in the page cache twice, and is read faster if it is not. But
        QEMU before 10.1 mixes up writes that come at the same time, of which there are none through
        the cache: so only once the journals are replayed, and not with `--rw`.
        """
        for step in self._loops:
            if not self.writable and Path(step.path).parent == self.journal.folder:
                step.pass_by_cache()
            step.release()

    # For those that start QEMU

    def _overlays(self) -> list[Path | None]:
        if not self.overlays:
            return [None] * len(self.disks)
        paths: list[Path | None] = []
        for disk in self.disks:
            path = self.journal.folder / f"overlay{disk.number}.qcow2"
            self.journal.do(qemu.Overlay(str(path), disk.size))
            paths.append(path)
        return paths

    def _below(self, number: int, chain: Chain) -> dict[str, object]:
        """What a disk's overlay stands on, or the disk itself where there is none."""
        shared = not self.writable and passes_locks(chain)
        if self.snapshot is None or chain.header is not None:
            return chain.blockdev(read_only=not self.writable, force_share=shared)
        image = chain.filename(force_share=shared)
        found = chain.snapshot(self.snapshot)
        step = qemu.Snapshot(str(self.journal.folder), image, number, found.id)
        self.journal.do(step)
        server = {"type": "unix", "path": step.socket}
        return {"driver": "nbd", "server": server, "read-only": True}

    def _nodes(self) -> dict[str, str]:
        """Every disk as QEMU's -blockdev takes it, by the name of its node."""
        found = {}
        for disk, chain, overlay in zip(self.disks, self.chains, self._overlays(), strict=True):
            name = f"disk{disk.number}"
            node = _on_overlay(self._below(disk.number, chain), name, overlay)
            found[name] = json.dumps(node, ensure_ascii=False)
        return found

    def _export(self) -> list[str]:
        """Every disk as a file, through QEMU's storage daemon."""
        nodes = self._nodes()
        points = {name: str(self.journal.folder / name) for name in nodes}
        writable = self.writable or self.overlays
        folder = str(self.journal.folder)
        self.journal.do(qemu.Export(folder, list(nodes.values()), points, writable))
        return list(points.values())


class LoopMechanism(DeviceMechanism):
    """A raw image through loop devices, with the offset and size of each partition."""

    needs: ClassVar[Sequence[Need]] = (available.not_root, available.no_loop)
    raw_only = True
    by_offset = True

    def start(self) -> None:
        """The files themselves, or on overlays what QEMU makes of them."""
        self._paths = self._export() if self.overlays else [str(c.active.path) for c in self.chains]

    def disk(self, number: int) -> str:
        """The image file, or its overlay."""
        return self._paths[number]


class KpartxMechanism(LoopMechanism):
    """A raw image through one loop device and device-mapper mappings of its partitions."""

    needs = (
        available.not_root,
        available.no_loop,
        partial(available.no_program, "kpartx"),
        available.no_device_mapper,
    )
    by_offset = False

    def start(self) -> None:
        """One loop device a disk."""
        super().start()
        self._whole = [
            super(KpartxMechanism, self)._make_block(DiskRange(disk.number, None, 0, disk.size))
            for disk in self.disks
        ]
        self._mappings: dict[int, mapper.Mapping] = {}

    def _make_block(self, place: DiskRange) -> str:
        """The mapping of the partition; the loop device for the whole disk."""
        if place.number is None:
            return self._whole[place.disk]
        if place.disk not in self._mappings:
            step = mapper.Mapping(
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


class NbdMechanism(DeviceMechanism):
    """Any format, through the kernel's nbd and qemu-nbd."""

    needs = (available.not_root, partial(available.no_program, "qemu-nbd"), available.no_nbd)
    always_overlaid = True

    def start(self) -> None:
        """Connect every disk."""
        self._steps = []
        for disk, node in zip(self.disks, self._nodes().values(), strict=True):
            step = qemu.Nbd(
                str(self.journal.folder),
                f"json:{node}",
                disk.number,
                self.writable or self.overlays,
            )
            self.journal.do(step)
            self._steps.append(step)

    def disk(self, number: int) -> str:
        """The nbd device."""
        return self._steps[number].device

    def _make_block(self, place: DiskRange) -> str:
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
            return super()._make_block(place)
        return str(node)


class ExportMechanism(DeviceMechanism):
    """Any format, through a FUSE export of QEMU's storage daemon and loop devices."""

    needs = (
        available.not_root,
        available.no_loop,
        available.no_fuse,
        partial(available.no_program, "qemu-storage-daemon"),
    )

    def start(self) -> None:
        """One daemon for every disk."""
        self._paths = self._export()

    def disk(self, number: int) -> str:
        """The exported file."""
        return self._paths[number]
