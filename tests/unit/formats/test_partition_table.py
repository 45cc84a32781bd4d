"""Partition tables: as real tools write them, and as an adversary does."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from imgtool.formats.partition_table import (
    Partition,
    disk_name,
    examine,
    partition_device,
)
from imgtool.formats.partition_types import EXTENDED, GPT_TYPES, MSDOS_TYPES

SIZE = 64 << 20
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


class Disk:
    """A disk image file, read and patched by sector."""

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.path, self.size = path, size
        with path.open("wb") as file:
            file.truncate(size)

    def sfdisk(self, script: str) -> Disk:
        subprocess.run(["sfdisk", "-q", self.path], input=script.encode(), check=True)
        return self

    def read(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def entry(self, sector: int, slot: int, kind: int, start: int, count: int) -> None:
        """Write an msdos entry and the signature of its sector."""
        self.write(sector * 512 + 446 + 16 * slot, struct.pack("<B3xB3xII", 0, kind, start, count))
        self.write(sector * 512 + 510, b"\x55\xaa")

    def rows(self) -> tuple[Partition, ...]:
        return examine(self.read, self.size, "/dev/sda").partitions

    def problems(self) -> tuple[str, ...]:
        return examine(self.read, self.size, "/dev/sda").problems


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "disk")


def by_sfdisk(disk: Disk) -> list[tuple[int, int, int]]:
    done = subprocess.run(["sfdisk", "--json", disk.path], check=True, capture_output=True)
    rows = json.loads(done.stdout)["partitiontable"]["partitions"]
    path = str(disk.path)
    return [(int(row["node"].removeprefix(path)), row["start"], row["size"]) for row in rows]


def numbers(rows: tuple[Partition, ...]) -> list[tuple[int | None, int, int]]:
    return [(row.number, row.start_sector, row.size // row.sector_size) for row in rows]


@pytest.mark.parametrize(
    "script",
    [
        "label: dos\n,8M,83,*\n,8M,82\n",
        "label: dos\n,8M\n,20M,5\n,8M\n,8M\n,4M\n",
        "label: dos\n,8M\n,,f\n" + ",1M,83\n" * 20,
        "label: dos\n4 : size=8M\n",
        "label: gpt\n,8M,U\n,8M,L\n,,V\n",
        "label: gpt\n3 : size=8M\n7 : size=8M\n",
        "label: gpt\n" + ",100K\n" * 60,
    ],
)
def test_rows_are_those_that_sfdisk_reads(script: str, disk: Disk) -> None:
    disk.sfdisk(script)
    rows = disk.rows()
    assert numbers(rows) == by_sfdisk(disk)
    assert disk.problems() == ()
    for row in rows:
        assert row.device == f"/dev/sda{row.number}"
        assert row.start == row.start_sector * 512
        assert row.end == row.start + row.size - 1


@pytest.mark.parametrize("label", ["msdos", "gpt"])
def test_rows_are_those_that_parted_reads(label: str, disk: Disk) -> None:
    words = f"mklabel {label} mkpart primary 1MiB 9MiB mkpart primary 9MiB 20MiB set 1 boot on"
    subprocess.run(["parted", "-s", disk.path, *words.split()], check=True)
    done = subprocess.run(
        ["parted", "-s", "--json", disk.path, "unit", "B", "print"], capture_output=True
    )
    if done.returncode == 0 and done.stdout.startswith(b"{"):
        found = json.loads(done.stdout)["disk"]["partitions"]
        expected = [(row["number"], int(row["start"][:-1]), int(row["end"][:-1])) for row in found]
    else:  # parted before 3.6 has no JSON
        expected = [(1, 1 << 20, (9 << 20) - 1), (2, 9 << 20, (20 << 20) - 1)]
    assert [(row.number, row.start, row.end) for row in disk.rows()] == expected
    assert [row.bootable for row in disk.rows()] == [True, False]
    assert {row.table for row in disk.rows()} == {label}


def test_types_and_names_are_given(disk: Disk) -> None:
    disk.sfdisk(f'label: gpt\n,8M,U\nsize=8M,type={LINUX},attrs="LegacyBIOSBootable"\n')
    subprocess.run(["sfdisk", "-q", "--part-label", disk.path, "2", "dáta 盘"], check=True)
    first, second = disk.rows()
    assert (first.type_name, first.bootable, first.name) == ("EFI System", True, "")
    assert (second.type, second.type_name) == (LINUX, "Linux filesystem")
    assert (second.bootable, second.name) == (True, "dáta 盘")
    (row,) = Disk(disk.path).sfdisk("label: dos\n,8M,8e\n").rows()
    assert (row.type, row.type_name, row.name) == ("0x8e", "Linux LVM", None)


def test_type_names_are_those_of_the_field() -> None:
    """Where util-linux knows a type too, the code means the same to it."""
    listed = {
        label: subprocess.run(
            ["sfdisk", "--label", label, "-T"], check=True, capture_output=True, text=True
        ).stdout
        for label in ("dos", "gpt")
    }
    guids = dict(re.findall(r"^\s*([0-9A-F-]{36})\s+(.+)$", listed["gpt"], re.M))
    codes = dict(re.findall(r"^\s*([0-9a-f]{1,2})\s+(.+)$", listed["dos"], re.M))
    assert len(guids) > 50 and len(codes) > 50
    for guid, name in GPT_TYPES.items():
        assert guids.get(guid, name).lower() == name.lower()
    for code, name in MSDOS_TYPES.items():
        assert codes.get(f"{code:x}", name).strip() == name
    assert all(code in MSDOS_TYPES for code in EXTENDED)


def test_partitions_of_a_disk_that_ends_in_a_digit_have_a_p() -> None:
    assert partition_device("/dev/vda", 5) == "/dev/vda5"
    assert partition_device("/dev/nbd0", 5) == "/dev/nbd0p5"


@pytest.mark.parametrize("what", ["zeros", "short", "ext4", "xfs", "fat16", "fat32", "ntfs"])
def test_a_disk_without_a_table_is_one_row(what: str, disk: Disk) -> None:
    commands = {
        "ext4": ["mke2fs", "-q", "-F", "-t", "ext4"],
        "xfs": ["mkfs.xfs", "-q", "-f"],
        "fat16": ["mkfs.vfat", "-F", "16"],
        "fat32": ["mkfs.vfat", "-F", "32", "-s", "1"],
        "ntfs": ["mkntfs", "-q", "-F", "-f"],
    }
    if what == "xfs":
        disk = Disk(disk.path, 512 << 20)
    if what == "short":
        disk = Disk(disk.path, 100)
    if what in commands:
        subprocess.run([*commands[what], disk.path], check=True, capture_output=True)
    (row,) = disk.rows()
    assert (row.device, row.number, row.table, row.start) == ("/dev/sda", None, "none", 0)
    assert row.size == disk.size


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_an_empty_table_is_one_row_that_names_it(label: str, disk: Disk) -> None:
    (row,) = disk.sfdisk(f"label: {label}\n").rows()
    assert (row.number, row.table) == (None, {"dos": "msdos", "gpt": "gpt"}[label])


def test_garbage_with_a_signature_is_no_table(disk: Disk) -> None:
    disk.write(0, b"\x7e" * 510 + b"\x55\xaa")
    assert disk.rows()[0].table == "none"
    disk.write(0, bytes(512))
    disk.entry(0, 0, 0x83, SIZE // 512 + 1, 100)
    assert disk.rows()[0].table == "none"


def test_a_loop_of_logical_partitions_ends(disk: Disk) -> None:
    disk.entry(0, 1, 5, 2048, 100_000)
    for sector, link in (2048, 1000), (3048, 0):
        disk.entry(sector, 0, 0x83, 10, 100)
        disk.entry(sector, 1, 5, link, 500)
    assert [row.number for row in disk.rows()] == [2, 5, 6]


def test_endless_logical_partitions_are_cut_off(disk: Disk) -> None:
    disk.entry(0, 0, 5, 1, SIZE // 512 - 1)
    for sector in range(1, 1001):
        disk.entry(sector, 0, 0x83, 1, 1)
        disk.entry(sector, 1, 5, sector, 2)
    assert len(disk.rows()) == 1 + 128
    for sector in range(1, 1001):  # a chain of nothing but links
        disk.entry(sector, 0, 0, 0, 0)
    assert len(disk.rows()) == 1


def test_a_logical_chain_that_leaves_the_disk_ends(disk: Disk) -> None:
    disk.entry(0, 0, 5, 2048, 0xFFFF_FFFF)
    disk.entry(2048, 0, 0x83, 10, 100)
    disk.entry(2048, 1, 5, 0xFFFF_FFF0, 500)
    assert [row.number for row in disk.rows()] == [1, 5]
    assert disk.problems() == ("/dev/sda1 reaches past the end of the disk",)


def test_partitions_that_overlap_or_leave_the_disk_are_told(disk: Disk) -> None:
    disk.entry(0, 0, 0x83, 2048, 10_000)
    disk.entry(0, 1, 0x83, 4096, 10_000)
    disk.entry(0, 2, 0x83, 100_000, 0xFFFF_0000)
    assert len(disk.rows()) == 3
    assert disk.problems() == (
        "/dev/sda2 overlaps /dev/sda1",
        "/dev/sda3 reaches past the end of the disk",
    )


def test_the_copy_of_a_gpt_serves_when_the_first_is_broken(disk: Disk) -> None:
    disk.sfdisk("label: gpt\n,8M\n,8M\n")
    intact = disk.rows()
    disk.write(512 + 40, b"\xff")
    assert disk.rows() == intact
    assert "damaged" in disk.problems()[0]
    disk.write(SIZE - 512 + 40, b"\xff")
    assert disk.rows()[0].table == "none"
    assert "neither copy" in disk.problems()[0]


def test_a_gpt_whose_entries_were_changed_is_not_believed(disk: Disk) -> None:
    disk.sfdisk("label: gpt\n,8M\n")
    intact = disk.rows()
    disk.write(1024 + 32, struct.pack("<Q", 1))
    assert disk.rows() == intact
    assert disk.problems()


def test_a_gpt_without_its_copy_is_read_and_told(disk: Disk) -> None:
    disk.sfdisk("label: gpt\n,8M\n")
    disk.write(SIZE - 512, bytes(512))
    assert [row.number for row in disk.rows()] == [1]
    assert "copy" in disk.problems()[0]


def test_a_hybrid_table_is_read_as_gpt(disk: Disk) -> None:
    disk.sfdisk("label: gpt\n,8M\n,8M\n")
    disk.entry(0, 1, 0x83, 2048, 16384)
    assert [(row.table, row.number) for row in disk.rows()] == [("gpt", 1), ("gpt", 2)]


def gpt(disk: Disk, entries: bytes, *, sector: int, entry_size: int = 128, count: int = 0) -> None:
    """Write a GPT with these entries, correct in every checksum."""
    last = disk.size // sector - 1
    disk.entry(0, 0, 0xEE, 1, 0xFFFF_FFFF)
    for here, twin, table in (1, last, 2), (last, 1, last - 8):
        fields = [b"EFI PART", 0x10000, 92, 0, 0, here, twin, 16, last - 16, bytes(16)]
        fields += [table, count or len(entries) // entry_size, entry_size, zlib.crc32(entries)]
        header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", *fields))
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        disk.write(here * sector, bytes(header))
        disk.write(table * sector, entries)


def gpt_entry(first: int, last: int) -> bytes:
    return struct.pack(
        "<16s16sQQQ72s", b"t" * 16, b"u" * 16, first, last, 0, "n".encode("utf-16le")
    )


def test_a_gpt_with_4096_byte_sectors_is_read(disk: Disk) -> None:
    gpt(disk, gpt_entry(256, 511), sector=4096)
    (row,) = disk.rows()
    assert (row.sector_size, row.start_sector, row.start, row.size) == (4096, 256, 1 << 20, 1 << 20)
    assert (row.table, row.name, row.type_name) == ("gpt", "n", None)
    assert disk.problems() == ()


def test_hostile_gpt_entries_do_no_harm(disk: Disk) -> None:
    entries = gpt_entry(100, 50) + gpt_entry(0, 2**64 - 1) + gpt_entry(2**64 - 1, 0)
    gpt(disk, entries, sector=512)
    assert [row.number for row in disk.rows()] == [2]
    assert any("ends before it starts" in problem for problem in disk.problems())
    gpt(disk, entries, sector=512, count=0xFFFF_FFFF)
    assert disk.rows()[0].table == "none"
    gpt(disk, entries, sector=512, entry_size=64)
    assert disk.rows()[0].table == "none"


def test_many_problems_are_summed_up(disk: Disk) -> None:
    gpt(disk, gpt_entry(100, 200) * 30, sector=512)
    assert len(disk.rows()) == 30
    assert len(disk.problems()) == 21 and disk.problems()[-1].startswith("and 9 more")


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "/dev/sda"), (25, "/dev/sdz"), (26, "/dev/sdaa"), (701, "/dev/sdzz"), (702, "/dev/sdaaa")],
)
def test_disks_past_the_twenty_sixth_have_names(number, name):
    assert disk_name(number) == name
