"""Filesystems that are damaged, or not there: what is mounted all the same, and what is refused."""

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
    words = ("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", tree, image, "160M")
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


@pytest.mark.parametrize("via", ["loop", "export"])
def test_guest_shown_in_part_is_not_mounted_to_be_written(tmp_path: Path, via: str) -> None:
    tree, image, place = tmp_path / "tree", tmp_path / "disk.raw", tmp_path / "place"
    place.mkdir()
    for folder in ("etc", "home"):
        (tree / folder).mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=debian\n")
    lines = "/dev/sda / ext4 defaults 0 1\nUUID=0000-dead /home ext4 defaults 0 2\n"
    (tree / "etc/fstab").write_text(lines)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "16M"], check=True)
    good("mount", image, place, "--via", via)
    good("umount", place)
    before = image.read_bytes()
    done = imgtool("mount", image, place, "--via", via, "--rw")
    assert done.status == 4 and "--force hidden-mount" in done.err
    assert not os.path.ismount(place) and image.read_bytes() == before
    good("mount", image, place, "--via", via, "--rw", "--force", "hidden-mount")
    good("umount", place)


@pytest.mark.parametrize("via", ["loop", "export"])
def test_guest_that_starts_without_one_is_written_but_warned_of(tmp_path: Path, via: str) -> None:
    tree, image, place = tmp_path / "tree", tmp_path / "disk.raw", tmp_path / "place"
    place.mkdir()
    for folder in ("etc", "mnt"):
        (tree / folder).mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=debian\n")
    (tree / "etc/fstab").write_text("UUID=0000-dead /mnt ext4 defaults,nofail 0 2\n")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "16M"], check=True)
    done = good("mount", image, place, "--via", via)
    assert "/mnt" not in done.err
    good("umount", place)
    done = good("mount", image, place, "--via", via, "--rw")
    good("umount", place)
    assert "/mnt is not shown: UUID=0000-dead is on none" in done.err
    assert "would lie hidden below it" in done.err


def divided(folder: Path, *pieces: Path) -> Path:
    """A disk with a partition of 16 MiB of each."""
    disk, mib = folder / "disk.raw", 1 << 20
    with disk.open("wb") as file:
        file.truncate((1 + 16 * len(pieces)) * mib + mib)
        for number, piece in enumerate(pieces):
            file.seek((1 + 16 * number) * mib)
            file.write(piece.read_bytes())
    lines = ["label: gpt"]
    lines += [f"start={2048 + 32768 * n}, size=32768, name=p{n}" for n in range(len(pieces))]
    subprocess.run(["sfdisk", "-q", disk], input="\n".join(lines).encode(), check=True)
    return disk


@pytest.mark.parametrize("via", ["loop", "export"])
def test_read_only_part_does_not_keep_the_rest_from_writes(tmp_path: Path, via: str) -> None:
    tree, packed, place = tmp_path / "tree", tmp_path / "packed", tmp_path / "place"
    for folder in (tree / "etc", tree / "rec", packed, place):
        folder.mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=debian\n")
    (tree / "etc/fstab").write_text("PARTLABEL=p1 /rec squashfs ro 0 0\n")
    (packed / "word").write_text("packed")
    root, recovery = tmp_path / "root", tmp_path / "recovery"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, root, "16M"], check=True)
    subprocess.run(["mksquashfs", packed, recovery, "-quiet", "-no-progress"], check=True)
    disk = divided(tmp_path, root, recovery)
    good("mount", disk, place, "--via", via, "--rw")
    try:
        assert (place / "rec/word").read_text() == "packed"
        (place / "new").write_text("new")
    finally:
        good("umount", place)
    good("mount", disk, place, "--via", via, "--rw", "-m", "/dev/sda1:/:ro", "-m", "/dev/sda2:/rec")
    try:
        assert (place / "new").read_text() == "new"
        with pytest.raises(OSError, match="Read-only"):
            (place / "newer").write_text("newer")
    finally:
        good("umount", place)
    done = imgtool("mount", disk, place, "--via", via, "--rw", "--partition", "2")
    assert done.status == 4 and "of a kind that can only be read (squashfs)" in done.err
