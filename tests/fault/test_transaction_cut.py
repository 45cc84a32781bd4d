"""A write that is cut off before or after each of its steps: the guest is all old or all new."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.change.recovery import recover
from imgtool.image.intent.intent_log import read_facts
from tests.support.writes import (
    NEW,
    OLD,
    cut_off,
    format_of,
    held,
    left_over,
    made,
    pattern,
    qemu_img,
    reads_as,
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "kinds", [("raw",), ("qcow2",), ("holding",), ("chain",), ("qcow2", "raw")], ids="+".join
)
def test_cut_off_anywhere_it_is_all_old_or_all_new(tmp_path, kinds, after):
    seen = set()
    for number in range(1, 60):
        folder = tmp_path / str(number)
        folder.mkdir()
        images = [made(folder, kind) for kind in kinds]
        if not cut_off(images, kinds, number, after):
            break
        states = set()
        for image, kind in zip(images, kinds, strict=True):  # a reader, before anything is settled
            name = open_chain(image, format=format_of(kind)).filename()
            value = next(v for v in (OLD, NEW) if reads_as(name, v))
            states.add(value)
        assert len(states) == 1, f"cut at {number}: one disk is old and one is new"
        for image in images:
            recover(image)
        assert left_over(folder) == []
        for image, kind in zip(images, kinds, strict=True):
            assert pattern(image, format_of(kind), *states), f"cut at {number}"
            if kind != "raw":
                qemu_img("check", image)
            if kind == "holding":
                assert held(image) == ["before", "since"], f"cut at {number}"
        seen |= states
    else:
        pytest.fail("it never ends")
    assert seen == {OLD, NEW}


def leak(image: Path) -> None:
    """Count one cluster more than is used, as QEMU does when it is killed at the wrong time."""
    status = image.stat()
    with image.open("r+b") as file:
        header = file.read(72)
        cluster = 1 << int.from_bytes(header[20:24])
        file.seek(int.from_bytes(header[48:56]))  # the refcount table, and its first block
        block = int.from_bytes(file.read(8))
        end = -(-image.stat().st_size // cluster)
        file.truncate((end + 1) * cluster)
        file.seek(block + 2 * end)
        file.write((1).to_bytes(2))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))  # that QEMU was imgtool's


def test_what_a_killed_commit_left_unused_is_freed(tmp_path):
    for number in range(1, 60):
        folder = tmp_path / str(number)
        folder.mkdir()
        image = made(folder, "qcow2")
        assert cut_off([image], ["qcow2"], number, False)
        if read_facts(image).get("step") == "commit":
            break
    leak(image)
    with pytest.raises(subprocess.CalledProcessError):
        qemu_img("check", image)
    recover(image)
    qemu_img("check", image)
    assert pattern(image, "qcow2", NEW)
    assert left_over(folder) == []
