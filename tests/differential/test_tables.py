"""Disks divided in every way that is read directly, through both engines."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.appliance,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/loop-control").exists(),
        reason="needs root and loop devices, for sectors of 4096 bytes and for LVM",
    ),
]
MIB = 1 << 20


def filesystem(path: Path, kind: str, size: int, word: str) -> bytes:
    """A small filesystem with one file in it."""
    contents = path / f"{word}-contents"
    contents.mkdir()
    (contents / "word.txt").write_text(word)
    image = path / f"{word}.img"
    with image.open("wb") as file:
        file.truncate(size)
    command = ("mke2fs", "-q", "-t", kind, "-L", word, "-b", "4096", "-d", contents, image)
    subprocess.run(command, check=True)
    return image.read_bytes()


def disk(path: Path, name: str, size: int, table: str, *, sector: int = 512) -> Path:
    image = path / name
    with image.open("wb") as file:
        file.truncate(size)
    device = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", str(sector), image],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    try:
        subprocess.run(["sfdisk", "-q", device], input=table.encode(), check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    return image


def write(image: Path, offset: int, content: bytes) -> None:
    with image.open("rb+") as file:
        file.seek(offset)
        file.write(content)


def in_lvm(path: Path, images: list[Path], content: bytes) -> None:
    """One logical volume over all the images, in pieces, and the filesystem in it."""
    devices = []
    try:
        for image in images:
            found = subprocess.run(
                ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
            )
            devices.append(found.stdout.strip())
        lvm = ["--config", 'devices{scan="/dev" use_devicesfile=0} global{use_lvmlockd=0}']
        lvm += ["--driverloaded", "n"]
        quiet = partial(
            subprocess.run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for device in devices:
            quiet(["pvcreate", *lvm, "-ff", "-y", device])
        quiet(["vgcreate", *lvm, "two-disks", *devices])
        quiet(["lvcreate", *lvm, "-an", "-Zn", "-Wn", "-l", "100%FREE", "-n", "a-b", "two-disks"])
        mapped = subprocess.run(
            [
                *("lvs", *lvm, "--noheadings", "--units", "b", "--nosuffix", "--separator", " "),
                *("--segments", "-o", "seg_start,seg_size,seg_pe_ranges", "two-disks"),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for line in mapped.splitlines():
            start, size, ranges = line.split()
            device, _, extents = ranges.rpartition(":")
            first = int(extents.partition("-")[0])
            at = MIB + first * 4 * MIB  # 1 MiB is where LVM puts the first extent
            piece = content[int(start) : int(start) + int(size)]
            write(images[devices.index(device)], at, piece)
    finally:
        for device in devices:
            subprocess.run(["losetup", "--detach", device], check=True)


def compared(imgtool_cli, *words: object) -> list[dict[str, object]]:
    answers: list[list[dict[str, object]]] = []
    for engine in ("direct", "libguestfs"):
        result = imgtool_cli(*words, "-o", "json", "--engine", engine)
        assert result.status == 0, (engine, result.err)
        answers.append(json.loads(result.text))
    assert answers[0] == answers[1]
    return answers[0]


def test_logical_partitions(imgtool_cli, tmp_path):
    table = "label: dos\nsize=16384, type=83\ntype=5\nsize=16384, type=83\nsize=32768, type=83\n"
    image = disk(tmp_path, "msdos.raw", 64 * MIB, table)
    rows = json.loads(imgtool_cli("partitions", image, "-o", "json").text)
    starts = {row["number"]: row["start"] for row in rows}
    for number, word in ((1, "one"), (5, "five"), (6, "six")):
        write(image, starts[number], filesystem(tmp_path, "ext4", 8 * MIB, word))
    found = compared(imgtool_cli, "filesystems", image, "--all")
    labels = {row["device"]: row["label"] for row in found if row["kind"] == "filesystem"}
    assert labels == {"/dev/sda1": "one", "/dev/sda5": "five", "/dev/sda6": "six"}
    (row,) = compared(imgtool_cli, "ls", image, "-m", "/dev/sda6", "/word.txt")
    assert row["size"] == 3


def test_gpt_with_sectors_of_4096_bytes(imgtool_cli, tmp_path):
    image = disk(tmp_path, "gpt.raw", 64 * MIB, "label: gpt\nsize=4096\nsize=8192\n", sector=4096)
    rows = json.loads(imgtool_cli("partitions", image, "-o", "json").text)
    assert {row["sector_size"] for row in rows} == {4096}
    for row, word in zip(rows, ("first", "second"), strict=True):
        write(image, row["start"], filesystem(tmp_path, "ext4", row["size"], word))
    found = compared(imgtool_cli, "filesystems", image, "--all")
    assert [row["label"] for row in found[:2]] == ["first", "second"]
    (row,) = compared(imgtool_cli, "ls", image, "-m", "/dev/sda2", "/word.txt")
    assert row["size"] == len("second")


def test_a_linear_volume_over_two_disks(imgtool_cli, tmp_path):
    images = [tmp_path / "one.raw", tmp_path / "two.raw"]
    for image in images:
        with image.open("wb") as file:
            file.truncate(32 * MIB)
    in_lvm(tmp_path, images, filesystem(tmp_path, "ext4", 48 * MIB, "spread"))
    words = [images[0], "-A", images[1]]
    found = compared(imgtool_cli, "filesystems", *words, "--all")
    assert found[0]["device"] == "/dev/two-disks/a-b"
    assert {row["kind"] for row in found} == {"filesystem", "lv", "vg", "pv", "device"}
    (row,) = compared(imgtool_cli, "ls", *words, "/word.txt", "--checksum", "sha256")
    assert row["size"] == len("spread")
    alone = imgtool_cli("ls", images[0], "/", "--engine", "direct")
    assert alone.status == 3
    assert "missing" in alone.err
