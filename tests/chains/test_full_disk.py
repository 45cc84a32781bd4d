"""A file system that is full in the middle of the work: the old state stays, and room helps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgtool.image.intent.intent_log import record_path
from tests.support.chain_work import SCENES, Scene, checked, imgtool, left_over
from tests.support.room import fill, small_disk

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small tmpfs")

_KIB = 1 << 10
# How much room is left; with the least not even a record can be written.
_ROOM = (0, 64 * _KIB, 1024 * _KIB)


def _scene(name: str) -> Scene:
    like = {"overlay-create": "commit", "convert": "commit", "snapshot-create": "revert"}
    scene = SCENES[like.get(name, name)]
    words = {
        "overlay-create": ("overlay", "create", "base.qcow2", "new.qcow2"),
        "convert": ("convert", "top.qcow2", "new.qcow2"),
        "snapshot-create": ("snapshot", "create", "disk.qcow2", "more"),
    }
    return Scene(scene.make, words.get(name, scene.words), scene.image, scene.images)


NAMES = ("commit", "rebase", "flatten", "compact", "compact-snapshots", "revert")


@pytest.mark.parametrize("name", [*NAMES, "overlay-create", "convert", "snapshot-create"])
def test_full_disk_leaves_the_old_state_until_there_is_room(name: str, tmp_path: Path) -> None:
    scene = _scene(name)
    force = [] if name in ("overlay-create", "snapshot-create", "revert") else ["--force", "space"]
    template = tmp_path / "template"
    template.mkdir()
    scene.make(template)
    old = scene.contents(template)
    failed = 0
    with small_disk(tmp_path / "disk", 64) as disk:
        folder = disk / "images"
        for room in _ROOM:
            scene.copy(template, folder)
            if force:
                ballast = fill(disk, 0)
                status, said = imgtool(*scene.command(folder))
                assert status == 4 and "too little space" in said, said
                ballast.unlink()
            ballast = fill(disk, room)
            status, said = imgtool(*scene.command(folder), *force)
            if status == 0:  # it needed no more than that
                ballast.unlink()
                continue
            failed += 1
            assert status == 6 and "make room" in said, said
            assert scene.contents(folder) == old or record_path(folder / scene.image).exists()
            if name == "commit" and record_path(folder / scene.image).exists():
                now = scene.contents(folder)
                assert set(now.values()) == {old["top.qcow2"]}
            else:
                assert left_over(folder) == [], said
            ballast.unlink()
            status, said = imgtool(*scene.command(folder))
            assert status == 0, said
            assert left_over(folder) == []
            for image in scene.images:
                assert checked(folder / image) == {}
    assert failed, "the disk was never full"
