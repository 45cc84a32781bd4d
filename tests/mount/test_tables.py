"""Partition tables as they are made, and as they break: the right bytes, or a line that helps."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from imgtool.mount.mounter import MountRequest
from imgtool.mount.mounting import mount, unmount
from tests.mount.host import good, here, imgtool, loops, mount_at, run, state_of
from tests.mount.images import FORMATS, blank, divide, make_filesystem, put

MIB = 1 << 20
SECTOR = 512


def word(path: Path, name: str, size: int = 2 * MIB) -> Path:
    """A small ext4 that says which one it is."""
    return make_filesystem(path, "ext4", lambda folder: put_word(folder, name), size=size)


def put_word(folder: Path, name: str) -> None:
    (folder / "word").write_text(name)


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def master_boot_record(entries: Sequence[tuple[int, int, int]]) -> bytes:
    """A boot record with these entries: type, first sector, number of sectors."""
    rows = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries)
    return (bytes(446) + rows).ljust(510, b"\0") + b"\x55\xaa"


def read_word(image: Path, place: Path, number: int, via: str = "loop") -> str:
    """What the filesystem in a partition says of itself."""
    mount(MountRequest(image, place, via=via, partition=number))
    try:
        return (place / "word").read_text()
    finally:
        unmount(place)


def refused(image: Path, place: Path, number: int) -> str:
    """Both mechanisms refuse the partition, and say the same; what they say."""
    answers = [
        imgtool("mount", image, place, "--via", via, "-p", number) for via in ("loop", "export")
    ]
    assert {answer.status for answer in answers} == {5}, answers
    assert len({answer.err for answer in answers}) == 1
    return answers[0].err


# The tables. Each function makes a disk, and says which partitions are there and what is in them.


def gpt(folder: Path) -> tuple[Path, dict[int, str]]:
    """With a hole in the numbers, and not in the order of the disk."""
    disk = blank(folder / "gpt.raw", 16 * MIB)
    lines = ["label: gpt", "3 : start=2048,size=4096", "1 : start=16384,size=4096"]
    lines.append("128 : start=8192,size=4096")
    divide(disk, lines)
    for name, start in (("three", 2048), ("one", 16384), ("last", 8192)):
        put(word(folder / name, name), disk, start * SECTOR)
    return disk, {3: "three", 1: "one", 128: "last"}


def gpt_4096(folder: Path) -> tuple[Path, dict[int, str]]:
    disk = blank(folder / "gpt-4096.raw", 16 * MIB)
    divide(disk, ["label: gpt", "start=256,size=512", "start=1024,size=1024"], sector=4096)
    for name, start in (("one", 256), ("two", 1024)):
        put(word(folder / name, name), disk, start * 4096)
    return disk, {1: "one", 2: "two"}


def gpt_without_its_start(folder: Path) -> tuple[Path, dict[int, str]]:
    disk, words = gpt(folder)
    write(disk, SECTOR, bytes(33 * SECTOR))
    return disk, words


def gpt_with_a_broken_sum(folder: Path) -> tuple[Path, dict[int, str]]:
    disk, words = gpt(folder)
    write(disk, 2 * SECTOR + 56, "changed".encode("utf-16-le"))
    return disk, words


def msdos(folder: Path) -> tuple[Path, dict[int, str]]:
    disk = blank(folder / "msdos.raw", 32 * MIB)
    lines = ["1 : start=2048,size=4096,type=83", "2 : start=8192,size=4096,type=7"]
    lines += ["3 : start=16384,type=5", "5 : start=20480,size=8192,type=83"]
    divide(disk, ["label: dos", *lines])
    for name, start in (("one", 2048), ("two", 8192), ("five", 20480)):
        put(word(folder / name, name), disk, start * SECTOR)
    return disk, {1: "one", 2: "two", 5: "five"}


def sixty_logical(folder: Path) -> tuple[Path, dict[int, str]]:
    """Sixty logical partitions, the last of which has the number 64; sfdisk makes fewer."""
    disk = blank(folder / "sixty.raw", 128 * MIB)
    outer, step = 2048, 4096  # a boot record, and 2048 sectors behind it its partition
    size = disk.stat().st_size // SECTOR - outer
    write(disk, 0, master_boot_record([(5, outer, size)]))
    for number in range(60):
        entries = [(0x83, 2048, 2048 if number < 59 else 4096)]
        if number < 59:
            entries.append((5, (number + 1) * step, 6144))
        write(disk, (outer + number * step) * SECTOR, master_boot_record(entries))
    for number, name in ((59, "sixtieth"), (6, "seventh")):
        filesystem = word(folder / name, name, MIB)
        put(filesystem, disk, (outer + number * step + 2048) * SECTOR)
    return disk, {64: "sixtieth", 11: "seventh"}


def overlapping(folder: Path) -> tuple[Path, dict[int, str]]:
    """The second begins inside the first, behind the end of its filesystem."""
    disk = blank(folder / "overlapping.raw", 16 * MIB)
    put(word(folder / "one", "one"), disk, MIB)
    put(word(folder / "two", "two"), disk, 8 * MIB)
    entries = [(0x83, 2048, 10 * MIB // SECTOR), (0x83, 8 * MIB // SECTOR, 4 * MIB // SECTOR)]
    write(disk, 0, master_boot_record(entries))
    return disk, {1: "one", 2: "two"}


TABLES = (
    *(gpt, gpt_4096, gpt_without_its_start, gpt_with_a_broken_sum),
    *(msdos, sixty_logical, overlapping),
)
# libparted repairs nothing without being asked, and reads nothing that overlaps.
NOT_FOR_LIBPARTED = (gpt_without_its_start, gpt_with_a_broken_sum, overlapping)


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """The disk that each function makes, made once."""
    made: dict[str, tuple[Path, dict[int, str]]] = {}

    def disk(make):
        if make.__name__ not in made:
            made[make.__name__] = make(tmp_path_factory.mktemp(make.__name__))
        return made[make.__name__]

    return disk


@pytest.mark.parametrize("via", ["loop", "export"])
@pytest.mark.parametrize("make", TABLES)
def test_each_partition_is_found(disks, place, make, via):
    disk, words = disks(make)
    before = state_of([disk])
    assert {number: read_word(disk, place, number, via) for number in words} == words
    assert state_of([disk]) == before


_PARTED = """
import json, sys, parted
disk = parted.newDisk(parted.getDevice(sys.argv[1]))
size = disk.device.sectorSize
rows = [(p.number, p.geometry.start * size, p.geometry.length * size) for p in disk.partitions]
print(json.dumps(sorted(rows)))
"""


def as_libparted_says(disk: Path, sector: int) -> list[list[int]]:
    """Number, offset and size of each partition."""
    env = {"PARTED_SECTOR_SIZE": str(sector)} if sector != SECTOR else {}
    rows: list[list[int]] = json.loads(run(sys.executable, "-c", _PARTED, disk, env=env))
    return rows


def _compared(disk: Path, sector: int = SECTOR) -> list[list[int]]:
    rows = [row for row in here("partitions", disk, "-o", "jsonl").rows if row["number"]]
    ours = sorted([row["number"], row["start"], row["size"]] for row in rows)
    theirs = as_libparted_says(disk, sector)
    assert ours == theirs
    return ours


@pytest.mark.parametrize("make", [make for make in TABLES if make not in NOT_FOR_LIBPARTED])
def test_offsets_are_libparteds(disks, place, make):
    disk, words = disks(make)
    known = {n: (o, s) for n, o, s in _compared(disk, 4096 if make is gpt_4096 else SECTOR)}
    number = max(words)
    done = good("mount", disk, place, "--via", "loop", "-p", number, "-v")
    source = mount_at(place).source
    (device,) = [row for row in loops() if f"/dev/{row.name}" == source]
    here("umount", place)
    offset, size = known[number]
    assert (device.offset, device.size, device.read_only) == (offset, size, True)
    assert f"offset {offset} ({offset // 512} * 512), size {size}" in done.err


@pytest.mark.parametrize("table", ["gpt", "logical"])
def test_offsets_of_the_matrix_are_libparteds(images, table):
    image = images.get("ext4", table)
    assert [image.partition, image.offset, image.size] in _compared(image.path)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "raw"])
def test_no_sector_is_off_behind_qemu(images, place, format):
    image = images.get("ext4", "logical", format)
    here("mount", image.path, place, "--via", "export", "-p", "5")
    source = mount_at(place).source
    (device,) = [row for row in loops() if f"/dev/{row.name}" == source]
    here("umount", place)
    assert (device.offset, device.size) == (image.offset, image.size)


# Refused


def test_a_partition_past_the_end(tmp_path, place):
    disk = blank(tmp_path / "short.raw", 8 * MIB)
    put(word(tmp_path / "one", "one"), disk, MIB)
    entries = [(0x83, 2048, 4096), (0x83, 8192, 40960), (0x83, 1 << 31, 4096)]
    write(disk, 0, master_boot_record(entries))
    assert read_word(disk, place, 1) == "one"
    assert "past the end of the disk" in refused(disk, place, 2)
    assert "past the end of the disk" in refused(disk, place, 3)


def test_a_gpt_whose_both_copies_are_broken(tmp_path, place):
    disk, _ = gpt(tmp_path)
    write(disk, SECTOR, bytes(SECTOR))
    write(disk, disk.stat().st_size - SECTOR, bytes(SECTOR))
    said = refused(disk, place, 1)
    assert "no partition 1" in said
    assert "hint:" in said


def test_a_number_that_is_not_there(disks, place):
    disk, _ = disks(gpt)
    said = refused(disk, place, 2)
    assert "no partition 2" in said
    assert "1 (" in said and "3 (" in said and "128 (" in said


def test_the_extended_partition_itself(disks, place):
    disk, _ = disks(msdos)
    done = imgtool("mount", disk, place, "--via", "loop", "-p", "3")
    assert done.status == 1
    assert "/dev/sda3" in done.err


def test_logical_partitions_in_a_loop(tmp_path, place):
    """A chain of boot records that leads back into itself ends all the same."""
    disk = blank(tmp_path / "loop.raw", 16 * MIB)
    put(word(tmp_path / "one", "one"), disk, 4 * MIB)
    write(disk, 0, master_boot_record([(5, 2048, 30720)]))
    first = master_boot_record([(0x83, 4 * MIB // SECTOR - 2048, 4096), (5, 0, 4096)])
    write(disk, 2048 * SECTOR, first)
    assert read_word(disk, place, 5) == "one"
