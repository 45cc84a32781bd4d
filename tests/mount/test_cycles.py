"""Again and again: nothing grows, and the last takes as long as the first."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from imgtool.mount.journal import journals
from imgtool.mount.mounter import MountRequest
from imgtool.mount.mounting import mount, unmount
from tests.mount.host import loops, mounts, processes, state_of
from tests.mount.images import Image


def _counts() -> dict[str, int]:
    """What could leak, counted."""
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "attached devices": len(loops()),
        "devices": len(list(Path("/sys/block").glob("loop*"))),
        "mounts": len(mounts()),
        "servers": sum("qemu-storage-daemon" in command for command in processes().values()),
        "journals": len(journals()),
    }


def _repeat(image: Image, place: Path, via: str, times: int) -> None:
    before = state_of(image.files)
    wanted = MountRequest(image.path, place, via=via, partition=image.partition)
    took, counts = [], []
    for _ in range(times):
        started = time.perf_counter()
        mount(wanted)
        assert (place / "noise").stat().st_size
        unmount(place)
        took.append(time.perf_counter() - started)
        counts.append(_counts())
    print(
        f"{times} x {via}: first {took[0]:.3f} s, last {took[-1]:.3f} s, "
        f"least {min(took):.3f} s, most {max(took):.3f} s"
    )
    assert counts[-1] == counts[0]
    tenth = max(times // 10, 2)
    assert min(took[-tenth:]) < 4 * min(took[:tenth]) + 0.3, took
    assert state_of(image.files) == before
    assert os.listdir(place) == []


@pytest.mark.parametrize(("via", "times"), [("loop", 20), ("export", 8)])
def test_nothing_grows(images, place, via, times):
    _repeat(images.get("ext4"), place, via, times)


@pytest.mark.long
@pytest.mark.parametrize(("via", "times"), [("loop", 100), ("export", 30)])
def test_nothing_grows_in_the_long_run(images, place, via, times):
    for filesystem in ("ext4", "xfs", "btrfs"):
        _repeat(images.get(filesystem), place, via, times)
