"""A hostile qcow2 takes no more of imgtool's own memory than an honest one: QEMU's limits hold."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import ImageError
from imgtool.formats import qcow2
from imgtool.formats.qcow2_bitmaps import count_bitmaps, read_bitmaps
from imgtool.formats.qcow2_refcounts import used_ranges
from imgtool.formats.qcow2_snapshots import SnapshotRow, read_snapshots, same_as_active
from imgtool.image import headers
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.info import Snapshot, probe

MIB = 1 << 20
ENTRY = struct.Struct(">QIHHIIQII")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1G"], check=True)
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def memory(work: Callable[[], object]) -> int:
    """The most bytes that Python had for some work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def long_names(image: Path, count: int, length: int = 65535) -> None:
    """A table of snapshots whose ids and names are as long as their fields allow."""
    table = bytearray()
    for number in range(count):
        name = b"\xff" * (length - 4) + b"%04d" % number
        table += ENTRY.pack(0x50000, 1, len(name), len(name), 0, 0, 0, 0, 16)
        table += struct.pack(">QQ", 0, 1 << 30) + name + name
        table += bytes(-len(table) % 8)
    patch(image, MIB, bytes(table))
    patch(image, 60, struct.pack(">IQ", count, MIB))


def test_snapshot_names_take_no_more_memory_than_qemu_shows(image: Path) -> None:
    long_names(image, 400)  # 52 MB
    found: list[Snapshot] = []
    most = memory(lambda: found.extend(probe(image, by_header=True).snapshots))
    assert len(found) == 400
    assert {(len(snapshot.id), len(snapshot.name)) for snapshot in found} == {(127, 255)}
    assert most < 8 * MIB


def test_snapshot_table_larger_than_qemu_takes_is_not_read(image: Path) -> None:
    long_names(image, 600)  # 79 MB
    with image.open("rb") as file:
        header = qcow2.read_header(file)
        assert header is not None
        assert read_snapshots(file, header) is None
    started = time.monotonic()
    with pytest.raises(ImageError) as caught:
        open_chain(image)
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)


def test_names_as_long_as_they_can_be_made_are_shown_whole(image: Path) -> None:
    name = "n" * 255
    subprocess.run(["qemu-img", "snapshot", "-c", name, image], check=True)
    assert [snapshot.name for snapshot in open_chain(image).active.snapshots] == [name]


def test_header_extensions_take_memory_only_if_known(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    words = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "1G")
    subprocess.run(words, check=True)
    kinds = range(0x10000, 0x10000 + 100_000)
    patch(path, 112, b"".join(struct.pack(">II", kind, 0) for kind in kinds))
    with path.open("rb") as file:
        assert memory(lambda: qcow2.read_header(file)) < 5 * MIB


def test_a_format_of_a_base_longer_than_QEMU_takes_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    words = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "1G")
    subprocess.run(words, check=True)
    patch(path, 112, struct.pack(">II", 0xE2792ACA, MIB) + b"r" * MIB + bytes(8))
    patch(path, 8, struct.pack(">QI", 2 * MIB - 16, 4))
    patch(path, 2 * MIB - 16, b"base")
    header = headers.read(path)
    assert header is not None
    assert header.backing == "base" and len(header.backing_format or "") <= 16
    with path.open("rb") as file:
        read = qcow2.read_header(file)
        assert read is not None and not read.sound


@pytest.mark.parametrize("clusters", [129, 0xFFFF_FFFF])
def test_refcount_table_larger_than_qemu_takes_is_unsound(image: Path, clusters: int) -> None:
    patch(image, 56, struct.pack(">I", clusters))
    with image.open("rb") as file:
        header = qcow2.read_header(file)
        assert header is not None
        assert not header.sound
        assert memory(lambda: qcow2.size_needed(file, header)) < 20 * MIB


EXTENSION = struct.Struct(">IIQQ")


def long_bitmaps(path: Path, made: int, length: int = 1000, **says: int) -> None:
    """A directory of bitmaps whose names are so long; `says` is what its extension has instead."""
    subprocess.run(["qemu-img", "bitmap", "--add", path, "one"], check=True)
    data = path.read_bytes()
    at = data.index(struct.pack(">II", 0x23852875, EXTENSION.size)) + 8
    first = data[EXTENSION.unpack_from(data, at)[3] :][:24]
    table = bytearray()
    for number in range(made):
        name = b"%05d" % number + b"n" * (length - 5)
        table += first[:18] + struct.pack(">HI", length, 0) + name + bytes(-length % 8)
    end = -(-len(data) // 65536) * 65536
    patch(path, end, bytes(table))
    os.truncate(path, end - -len(table) // 65536 * 65536)
    fields = {"count": made, "reserved": 0, "size": len(table), "offset": end, **says}
    patch(path, at, EXTENSION.pack(*fields.values()))


BITMAPS = {
    "more than there can be": (3, {"count": 0xFFFF_FFFF}),
    "one more than QEMU takes": (3, {"count": 65536}),
    "as many as QEMU takes": (65535, {}),
    "one byte more than QEMU takes": (3, {"size": 65535 * 1024 + 1}),
    "as large as it can be": (3, {"size": (1 << 64) - 8}),
    "none": (3, {"count": 0}),
    "fewer than there are": (3, {"count": 2}),
    "more than there are": (3, {"count": 4}),
    "past the end": (3, {"offset": 1 << 40}),
    "not at a cluster": (3, {"offset": (1 << 16) + 8}),
    "of a later kind": (3, {"reserved": 1}),
}


@pytest.mark.parametrize(("made", "says"), BITMAPS.values(), ids=BITMAPS.keys())
def test_bitmap_directory_beyond_the_limits_is_refused(
    image: Path, imgtool_cli: Any, made: int, says: dict[str, int]
) -> None:
    long_bitmaps(image, made, **says)
    before = image.stat()
    for words in (("info", image), ("ls", image, "/"), ("snapshot", "create", image, "new")):
        said: list[Any] = []
        assert memory(lambda: said.append(imgtool_cli(*words))) < 20 * MIB  # noqa: B023
        (done,) = said
        assert done.status == 3, done.err
        assert "dirty bitmaps" in done.err
    assert image.stat().st_mtime_ns == before.st_mtime_ns
    steps = re.findall(r"(cp \S+ COPY), then (dd .*)", done.err)[0]
    for step in steps:
        subprocess.run(step, shell=True, check=True, capture_output=True, cwd=image.parent)
    assert probe(image.with_name("COPY")).virtual_size == 1 << 30


def test_bitmaps_take_little_more_than_their_names(image: Path) -> None:
    count = 16384
    long_bitmaps(image, count)
    with image.open("rb") as file:
        header = qcow2.read_header(file)
        assert header is not None and count_bitmaps(header) == count
        found: list[object] = []
        most = memory(lambda: found.extend(read_bitmaps(file, header) or ()))
    assert len(found) == count and most < 25 * MIB


@pytest.mark.parametrize("says", [fields for made, fields in BITMAPS.values() if fields])
def test_bitmap_directory_that_qemu_rejects_is_not_read(image: Path, says: dict[str, int]) -> None:
    sound = Path(shutil.copy(image, image.with_name("sound.qcow2")))
    long_bitmaps(sound, 3)
    with sound.open("rb") as file:
        header = qcow2.read_header(file)
        assert header is not None
        assert [len(bitmap.name) for bitmap in read_bitmaps(file, header) or ()] == [1000] * 3
    long_bitmaps(image, 3, **says)
    with image.open("rb") as file:
        header = qcow2.read_header(file)
        assert header is not None
        assert memory(lambda: read_bitmaps(file, header)) < MIB
        assert read_bitmaps(file, header) is None


def test_two_large_tables_are_compared_a_part_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    words = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "64G")
    subprocess.run(words, check=True)
    with path.open("rb") as file:
        header = qcow2.read_header(file)
        assert header is not None and header.l1_size == 16 * MIB
        row = SnapshotRow(b"1", b"one", 0, 0, 0, header.l1_offset, header.l1_size)
        same = []
        assert memory(lambda: same.append(same_as_active(file, header, row))) < 4 * MIB
        shorter = SnapshotRow(b"1", b"one", 0, 0, 0, header.l1_offset, header.l1_size - 8)
        assert same == [True] and not same_as_active(file, header, shorter)


def test_refcounts_past_the_end_of_the_file_are_not_read(image: Path) -> None:
    """Each entry of the largest table names the same block: 2 TB to be read, as it seems."""
    table = image.stat().st_size
    patch(image, table, struct.pack(">Q", 0x20000) * MIB)
    patch(image, 48, struct.pack(">QI", table, 128))
    started = time.monotonic()
    with image.open("rb") as file:
        header = qcow2.read_header(file)
        assert header is not None
        assert sum(length for _, length in used_ranges(file, header)) <= image.stat().st_size
    assert time.monotonic() - started < 1
