"""NTFS on a host whose kernel cannot read it, and Windows that sleeps in it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.host import good, imgtool, run

MIB = 1 << 20


def ntfs(path: Path, hibernated: bool) -> Path:
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    run("mkfs.ntfs", "--quick", "--force", path)
    at = path.with_suffix(".mounted")
    at.mkdir()
    run("ntfs-3g", path, at)
    try:
        (at / "file").write_bytes(b"content")
        if hibernated:
            (at / "hiberfil.sys").write_bytes(b"hibr" + bytes(8192))
    finally:
        run("umount", at)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    return place


def test_it_is_read_and_written(tmp_path: Path, place: Path) -> None:
    image = ntfs(tmp_path / "disk.raw", hibernated=False)
    good("mount", image, place, "--via", "loop", "--rw", "-m", "/dev/sda")
    (place / "new").write_bytes(b"new")
    good("umount", place)
    before = digest(image)
    good("mount", image, place, "--via", "export", "-m", "/dev/sda")
    assert (place / "file").read_bytes() == b"content"
    assert (place / "new").read_bytes() == b"new"
    assert os.statvfs(place).f_flag & os.ST_RDONLY
    good("umount", place)
    assert digest(image) == before


def test_a_hibernated_windows_is_not_written_to(tmp_path: Path, place: Path) -> None:
    image = ntfs(tmp_path / "disk.raw", hibernated=True)
    before = digest(image)
    done = imgtool("mount", image, place, "--via", "loop", "--rw", "-m", "/dev/sda")
    assert done.status == 4
    assert "Windows is hibernated" in done.err and "--force hibernated" in done.err
    assert not os.path.ismount(place)
    good("mount", image, place, "--via", "loop", "-m", "/dev/sda")
    assert (place / "file").read_bytes() == b"content"
    good("umount", place)
    assert digest(image) == before


def test_force_gives_up_what_windows_had_in_memory(tmp_path: Path, place: Path) -> None:
    image = ntfs(tmp_path / "disk.raw", hibernated=True)
    good("mount", image, place, "--via", "loop", "--rw", "--force", "hibernated", "-m", "/dev/sda")
    (row,) = [r for r in good("mounts", "-o", "jsonl").rows if r["mountpoint"] == str(place)]
    assert (row["mode"], len(row["devices"])) == ("rw", 1)
    (place / "new").write_bytes(b"new")
    good("umount", place)
    good("mount", image, place, "--via", "loop", "-m", "/dev/sda")
    assert (place / "new").read_bytes() == b"new"
    good("umount", place)


@pytest.mark.parametrize("where", ["partition", "file"])
def test_a_hibernated_linux_is_not_written_to(tmp_path: Path, place: Path, where: str) -> None:
    asleep = bytes(4086) + b"S1SUSPEND\0" + bytes(MIB)
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/fstab").write_text("/dev/sda1 / ext4 defaults 0 1\n")
    (tree / "etc/os-release").write_text("ID=debian\n")
    if where == "file":
        (tree / "swapfile").write_bytes(asleep)
    root, disk = tmp_path / "root", tmp_path / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, root, "16M")
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    table = "start=2048, size=32768\nstart=34816, size=8192, type=82\n"
    subprocess.run(["sfdisk", "-q", disk], input=table.encode(), check=True)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(root.read_bytes())
        if where == "partition":
            file.seek(17 * MIB)
            file.write(asleep)
    before = digest(disk)
    done = imgtool("mount", disk, place, "--via", "loop", "--rw", "-p", "1")
    assert done.status == 4
    assert "hibernated" in done.err
    assert digest(disk) == before
    good("mount", disk, place, "--via", "loop", "--rw", "-p", "1", "--force", "hibernated")
    good("umount", place)
