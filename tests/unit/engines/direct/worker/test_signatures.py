"""What is on a volume or disk is named, wherever its marks lie, and whatever system made it."""

from __future__ import annotations

import json
import random
import struct
import subprocess

import pytest

from imgtool import cli
from imgtool.engines.direct.worker import signatures
from imgtool.engines.direct.worker.far_places import far_places
from imgtool.engines.direct.worker.signatures import identify
from imgtool.formats.foreign_tables import foreign_table
from imgtool.formats.partition_table import examine
from tests.support.marked_volumes import (
    STRICT,
    Volume,
    bitlocker,
    erofs_beside_minix,
    udf,
    udf_tag,
)

MIB = 1 << 20


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        status = int(cli._run([str(word) for word in words]))
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capfd.readouterr()
    return status, out, err


@pytest.mark.parametrize("block", [512, 2048, 4096])
def test_udf_is_known_wherever_its_anchor_lies(block, tmp_path):
    volume = udf(block, 8 * MIB)
    found = identify(volume)
    raw = tmp_path / "raw"
    raw.write_bytes(volume.data)
    words = ["blkid", "-p", "-o", "value", "-s", "TYPE", raw]
    told = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    assert (found.type or "") == told
    assert STRICT or (found.type, found.label) == ("udf", "Label")


@pytest.mark.parametrize(
    ("offset", "mark", "type"),
    [
        (1 * MIB, b"\x0d\xd0\x01\xc0", "VMFS_volume_member"),
        (2 * MIB, b"\x5e\xf1\xab\x2f", "VMFS"),
    ],
)
def test_what_begins_far_from_the_start_is_known(offset, mark, type):
    assert identify(Volume(8 * MIB).write(offset, mark.ljust(512, b"\1"))).type == type


def test_firmware_raid_is_known_by_a_header_far_from_the_end():
    primary = 40 * MIB
    header = b"\xde\x11\xde\x11" + bytes(4) + b"Linux-MD".ljust(24, b"\1") + b"01.02.00"
    header = header.ljust(96, b"\0") + struct.pack(">Q", primary // 512)
    volume = Volume(64 * MIB).write(64 * MIB - 512, header.ljust(512, b"\0"))
    volume.write(primary, header.ljust(512, b"\0"))
    assert identify(volume).type == "ddf_raid_member"


def test_bitlocker_is_known_by_its_metadata():
    assert identify(bitlocker()).type == "BitLocker"


@pytest.mark.skipif(STRICT, reason="this libblkid does not take the two for filesystems")
def test_a_mark_of_two_bytes_does_not_hide_another(tmp_path):
    volume = erofs_beside_minix()
    raw = tmp_path / "raw"
    raw.write_bytes(volume.data)
    told = subprocess.run(["blkid", "-p", raw], capture_output=True, check=False)
    assert told.returncode == 8, "the situation is not what it should be"
    assert identify(volume).type == "erofs"


@pytest.mark.parametrize("at", [1 * MIB, 2 * MIB, 4 * MIB])
def test_second_luks_header_far_from_the_start_is_known(at, tmp_path):
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(12 * MIB)
    words = ["cryptsetup", "-q", "luksFormat", "--type", "luks2", "--pbkdf", "pbkdf2"]
    words += ["--pbkdf-force-iterations", "1000", "--luks2-metadata-size", f"{at // 1024}k"]
    words += ["--luks2-keyslots-size", "1m", "--offset", str(11 * MIB // 512), "--key-file", "-"]
    subprocess.run([*words, raw], input=b"key", check=True, capture_output=True)
    volume = Volume(12 * MIB)
    volume.data[:] = raw.read_bytes()
    volume.write(0, bytes(4096))
    assert identify(volume).type == "crypto_LUKS"


@pytest.mark.parametrize("sectors", [63, 951, 2000, 3087])
def test_a_raid_of_promise_is_known_wherever_its_header_lies(sectors, tmp_path):
    size = 8 * MIB
    volume = Volume(size).write(size - sectors * 512, b"Promise Technology, Inc.".ljust(512, b"\1"))
    raw = tmp_path / "raw"
    raw.write_bytes(volume.data)
    words = ["blkid", "-p", "-o", "value", "-s", "TYPE", raw]
    told = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    assert (identify(volume).type or "") == told
    assert (told == "promise_fasttrack_raid_member") == (sectors != 2000)


def test_what_is_unknown_is_looked_at_once_and_in_few_places(monkeypatch):
    """Disks may have hundreds of partitions without a known type."""
    looked: list[int] = []
    probed = signatures._probe

    def counted(size, parts):
        parts = list(parts)
        looked.append(sum(len(data) for _, data in parts))
        return probed(size, parts)

    class Counted(Volume):
        taken = 0

        def read(self, offset: int, length: int) -> bytes:
            self.taken += length
            return super().read(offset, length)

    monkeypatch.setattr(signatures, "_probe", counted)
    volume = Counted(8 * MIB)
    volume.data[:] = random.Random(1).randbytes(8 * MIB)
    assert identify(volume).type is None
    assert len(looked) == 1
    assert volume.taken < 2 * MIB


def test_noise_is_nothing():
    assert identify(Volume(8 * MIB).write(3 * MIB, b"\x5a" * 4096)).type is None


def test_places_that_lead_nowhere_are_not_followed():
    anchor = udf_tag(2, 256, struct.pack("<IIII", 0xFFFFFFFF, 0xFFFFFFFF, 1 << 31, 1))
    head = bytes(256 * 512) + anchor
    ddf = b"\xde\x11\xde\x11".ljust(96, b"\xff") + b"\xff" * 416
    found = far_places(head, ddf, 64 * MIB)
    assert all(0 <= offset < 64 * MIB and length <= MIB for offset, length in found)


# Partition tables of other systems


def bsd() -> Volume:
    label = bytearray(148)
    struct.pack_into("<I", label, 0, 0x82564557)
    struct.pack_into("<I", label, 132, 0x82564557)
    return Volume(8 * MIB).write(512, bytes(label))


def apple() -> Volume:
    return Volume(8 * MIB).write(0, b"ER\2\0").write(512, b"PM\0\0\0\0\0\1")


def amiga() -> Volume:
    block = bytearray(struct.pack(">4sI", b"RDSK", 64).ljust(256, b"\0"))
    struct.pack_into(">I", block, 8, -sum(struct.unpack(">64I", block)) & 0xFFFFFFFF)
    return Volume(8 * MIB).write(1024, bytes(block))


def atari() -> Volume:
    return Volume(8 * MIB).write(0x1C6, struct.pack(">B3sII", 1, b"GEM", 2, 4096))


@pytest.mark.parametrize(
    ("make", "name"), [(bsd, "bsd"), (apple, "mac"), (amiga, "amiga"), (atari, "atari")]
)
def test_tables_of_other_systems_are_not_none(make, name):
    disk = make()
    assert foreign_table(disk.read, disk.size) == name
    (row,) = examine(disk.read, disk.size, "/dev/sda").partitions
    assert (row.table, row.number) == (name, None)


def test_marks_without_what_belongs_to_them_are_no_tables():
    for disk in (
        Volume(MIB).write(508, b"\xda\xbe\0\1"),
        Volume(MIB).write(0, b"\x0b\xe5\xa9\x41"),
        Volume(MIB).write(512, struct.pack("<I", 0x82564557)),
        Volume(MIB).write(0, b"ER\2\0"),
        Volume(MIB).write(0, b"RDSK\0\0\0\x40"),
        Volume(MIB).write(0x1C6, struct.pack(">B3sII", 1, b"GEM", 2, 1 << 20)),
    ):
        assert foreign_table(disk.read, disk.size) is None


@pytest.mark.parametrize(("label", "table"), [("sun", "sun"), ("sgi", "dvh")])
def test_every_command_names_a_table_that_it_does_not_read(tmp_path, capfd, label, table):
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(20 * MIB)
    subprocess.run(["sfdisk", "-q", disk], input=f"label: {label}\n,10M\n".encode(), check=True)
    status, out, err = run(capfd, "partitions", disk, "-o", "json")
    assert (status, json.loads(out)[0]["table"], err) == (0, table, "")
    status, out, _ = run(capfd, "filesystems", disk, "-o", "json", "--engine", "direct")
    assert [row["type"] for row in json.loads(out)] == [f"{table}_table"]
    status, out, err = run(capfd, "ls", disk, "/", "--engine", "direct")
    assert (status, out) == (5, "")
    assert "partition table is not read" in err
    status, out, _ = run(capfd, "df", disk, "-o", "json", "--engine", "direct")
    assert status == 1
    assert "not read" in json.loads(out)[0]["error"]


def test_a_disk_label_within_a_partition_is_named(tmp_path, capfd):
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(20 * MIB)
    subprocess.run(["sfdisk", "-q", disk], input=b"start=2048, type=a5\n", check=True)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(bsd().data[:4096])
    _, out, _ = run(capfd, "filesystems", disk, "-o", "json", "--engine", "direct")
    assert [row["type"] for row in json.loads(out)] == ["bsd_table"]


def test_what_is_not_known_is_a_word(tmp_path, capfd):
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(20 * MIB)
    subprocess.run(["sfdisk", "-q", disk], input=b"start=2048\n", check=True)
    _, out, _ = run(capfd, "filesystems", disk, "-o", "json", "--engine", "direct")
    assert [row["type"] for row in json.loads(out)] == ["unknown"]
    _, out, _ = run(capfd, "df", disk, "-o", "json", "--engine", "direct")
    assert [row["type"] for row in json.loads(out)] == ["unknown"]
