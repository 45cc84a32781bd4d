"""Where the clusters of a chain lie: what is read from the files is what QEMU reads."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.qemu.clusters import Clusters, plain
from tests.support.luks import luks_qcow2

MIB = 1 << 20
SIZE = 8 * MIB


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def _write(image: Path, seed: int, *, zeros: bool = True) -> None:
    """Bytes at odd places, zeros, and discarded clusters."""
    chance = random.Random(seed)
    lines = []
    for number in range(12):
        at = chance.randrange(SIZE - 300_000) // 512 * 512
        length = chance.choice((512, 4096, 65536, 200_192))
        what = "write" if not zeros else chance.choice(("write", "write", "write -z", "discard"))
        pattern = f"-P {number + 1} " if what == "write" else ""
        lines += ["-c", f"{what} {pattern}{at} {length}"]
    _run("qemu-io", "-f", "qcow2", *lines, image)


def _make(path: Path, *options: str, seed: int = 1, backing: Path | None = None) -> Path:
    words: list[object] = ["qemu-img", "create", "-f", "qcow2"]
    for option in options:
        words += ["-o", option]
    if backing is not None:
        words += ["-b", backing, "-F", "raw" if backing.suffix == ".raw" else "qcow2"]
    _run(*words, path, SIZE)
    _write(path, seed, zeros="compat=0.10" not in options)
    return path


@contextlib.contextmanager
def _clusters(image: Path) -> Iterator[Clusters | None]:
    chain = open_chain(image)
    opened = {path: os.open(path, os.O_RDONLY) for path in chain.files}
    try:
        yield plain(chain, opened)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _expected(image: Path, folder: Path) -> bytes:
    raw = folder / "expected"
    _run("qemu-img", "convert", "-O", "raw", image, raw)
    return raw.read_bytes()


def _read(found: Clusters, offset: int, length: int) -> bytes:
    parts = []
    while length:
        stretch = found.at(offset, length)
        assert stretch is not None and 0 < stretch.length <= length
        if stretch.descriptor is None:
            parts.append(bytes(stretch.length))
        else:
            parts.append(os.pread(stretch.descriptor, stretch.length, stretch.offset))
        offset, length = offset + stretch.length, length - stretch.length
    return b"".join(parts)


def _same(image: Path, folder: Path) -> None:
    expected = _expected(image, folder)
    chance = random.Random(5)
    with _clusters(image) as found:
        assert found is not None
        assert _read(found, 0, len(expected)) == expected
        for _ in range(50):
            at, length = chance.randrange(len(expected)), chance.randrange(1, 300_000)
            length = min(length, len(expected) - at)
            assert _read(found, at, length) == expected[at : at + length]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("compat=0.10",),
        ("cluster_size=512",),
        ("cluster_size=2M",),
        ("preallocation=metadata",),
        ("preallocation=falloc", "cluster_size=4k"),
        ("refcount_bits=1",),
    ],
    ids=" ".join,
)
def test_qcow2_is_read_as_qemu_reads_it(options: tuple[str, ...], tmp_path: Path) -> None:
    _same(_make(tmp_path / "disk.qcow2", *options), tmp_path)


def test_a_raw_image_is_read_as_it_is(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(random.Random(1).randbytes(3 * MIB))
    _same(raw, tmp_path)


def test_chains_are_read_as_qemu_reads_them(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(3 * MIB + 512))  # shorter than what stands on it
    image = base
    for number, options in enumerate(((), ("cluster_size=4k",), ("cluster_size=256k",))):
        image = _make(tmp_path / f"{number}.qcow2", *options, seed=number + 10, backing=image)
        _same(image, tmp_path)
    _run("qemu-img", "snapshot", "-c", "before", image)
    _write(image, 99)
    _same(image, tmp_path)


def test_overlay_made_larger_does_not_show_what_is_below(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    _run("qemu-img", "create", "-f", "qcow2", base, SIZE)
    _run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {SIZE}", base)
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    _run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, SIZE // 2)
    _run("qemu-img", "create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, SIZE)
    _same(top, tmp_path)


def test_compressed_clusters_are_left_to_qemu(tmp_path: Path) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"abc" * (MIB // 3) + random.Random(1).randbytes(MIB))
    _run("qemu-img", "convert", "-c", "-O", "qcow2", raw, image)
    with _clusters(image) as found:
        assert found is not None
        assert found.at(0, 100) is None
        # What does not become smaller is stored as it is.
        stretch = found.at(MIB + 65536, 100)
        assert stretch is not None and stretch.descriptor is not None


@pytest.mark.parametrize("option", ["extended_l2=on", "data_file=other", "encrypt.format=luks"])
def test_what_is_not_plain_is_left_to_qemu(option: str, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    if option.startswith("data_file"):
        option = f"data_file={tmp_path / 'other'}"
    if option == "encrypt.format=luks":
        luks_qcow2(image, SIZE)
    else:
        _run("qemu-img", "create", "-f", "qcow2", "-o", option, image, SIZE)
    with _clusters(image) as found:
        assert found is None


def test_a_chain_of_very_many_links_is_left_to_qemu(tmp_path: Path) -> None:
    image = tmp_path / "0.qcow2"
    _run("qemu-img", "create", "-f", "qcow2", image, SIZE)
    for number in range(1, 17):
        with _clusters(image) as found:
            assert found is not None
        above = tmp_path / f"{number}.qcow2"
        _run("qemu-img", "create", "-f", "qcow2", "-b", image, "-F", "qcow2", above)
        image = above
    with _clusters(image) as found:
        assert found is None


def _tables(image: Path) -> tuple[int, int]:
    """Where the first entry of each table is that is in use, in bytes."""
    content = image.read_bytes()
    (first,) = struct.unpack_from(">Q", content, 40)
    (second,) = struct.unpack_from(">Q", content, first)
    return first, second & 0x00FF_FFFF_FFFF_FE00


@pytest.mark.parametrize(
    ("table", "entry"),
    [
        (0, 1 << 63 | 512),  # not at the beginning of a cluster
        (0, 1 << 63 | 1 << 40),  # past the end of the file
        (0, 1 << 63 | 65536 | 1),  # with bits that have no meaning
        (1, 1 << 63 | 1 << 40),
        (1, 1 << 63 | 512),
        (1, 1 << 63 | 1 << 56),
        (1, 1 << 63 | 2),
        (1, 1 << 62 | 65536),  # compressed
    ],
)
def test_odd_tables_are_left_to_qemu(table: int, entry: int, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    _run("qemu-img", "create", "-f", "qcow2", image, SIZE)
    _run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 256k", image)
    with _clusters(image) as found:
        assert found is not None and found.at(0, 100) is not None
    with image.open("r+b") as file:
        file.seek(_tables(image)[table])
        file.write(struct.pack(">Q", entry))
    with _clusters(image) as found:
        assert found is not None
        assert found.at(0, 100) is None
        if table == 1:
            assert found.at(65536, 100) is not None


def test_a_cluster_that_the_file_holds_in_part_is_read_that_far(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    _run("qemu-img", "create", "-f", "qcow2", image, SIZE)
    _run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", image)
    os.truncate(image, image.stat().st_size - 4096)
    with _clusters(image) as found:
        assert found is not None
        assert _read(found, 0, 61440) == b"\7" * 61440
        assert found.at(0, 65536) is None


def test_a_dirty_image_is_left_to_qemu(tmp_path: Path) -> None:
    image = _make(tmp_path / "disk.qcow2", "lazy_refcounts=on")
    with image.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")
    with _clusters(image) as found:
        assert found is None
