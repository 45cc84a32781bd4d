"""An ext filesystem whose superblock is lost is mounted by a copy of it, if one says so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.host import good, imgtool

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


def test_a_lost_superblock_is_read_from_its_copy(tmp_path: Path) -> None:
    tree, image, place = tmp_path / "tree", tmp_path / "disk.raw", tmp_path / "place"
    tree.mkdir()
    place.mkdir()
    (tree / "file").write_text("content")
    words = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", tree, image, "160M"]
    subprocess.run(words, check=True)
    with image.open("r+b") as file:
        file.write(bytes(4096))
    options = ("--format", "raw", "--via", "loop")
    done = imgtool("mount", image, place, *options, "-m", "/dev/sda:/:sb=131072")
    assert done.status == 1
    assert "-m /dev/sda:/:OPTIONS:TYPE" in done.err
    good("mount", image, place, *options, "-m", "/dev/sda:/:sb=131072:ext4")
    assert (place / "file").read_text() == "content"
    good("umount", place)
