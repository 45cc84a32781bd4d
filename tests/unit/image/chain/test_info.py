"""One image file: what it is, and that a hostile header gets nothing opened and nothing eaten."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from pathlib import Path

import pytest

from imgtool.errors import ExitStatus, ImageError, RefusedError
from imgtool.image.chain.info import probe


def qemu_img(*words: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True, cwd=cwd)


def written_qcow2(path: Path, *, size: str = "1G", written: str = "3M") -> Path:
    qemu_img("create", "-f", "qcow2", path, size)
    subprocess.run(
        ["qemu-io", "-c", f"write -P 7 0 {written}", path], check=True, capture_output=True
    )
    return path


def patched(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


@pytest.fixture
def no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no program to be found, whatever is still refused was refused before QEMU saw it."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "character device", "empty"])
def test_what_is_no_image_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "character device":
            path = Path("/dev/zero")
        case "empty":
            path.touch()
    started = time.monotonic()
    with pytest.raises(ImageError) as caught:
        probe(path)
    assert time.monotonic() - started < 5
    assert caught.value.status is ExitStatus.IMAGE_UNREADABLE
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_random_bytes_are_raw(tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(os.urandom(1 << 20))
    info = probe(path)
    assert (info.format, info.virtual_size, info.probed) == ("raw", 1 << 20, True)


@pytest.mark.parametrize("kept", [60, 104, 70_000, 200_000, 262_143, 1_000_000, 3_000_000])
def test_a_truncated_qcow2_is_refused(kept: int, tmp_path: Path) -> None:
    path = written_qcow2(tmp_path / "cut.qcow2")
    os.truncate(path, kept)
    with pytest.raises(ImageError, match=r"truncated|too short") as caught:
        probe(path)
    assert caught.value.status is ExitStatus.IMAGE_UNREADABLE


def test_a_truncated_qcow2_opens_after_what_the_hint_says(tmp_path: Path) -> None:
    path = written_qcow2(tmp_path / "cut.qcow2")
    os.truncate(path, 2_000_000)
    with pytest.raises(ImageError) as caught:
        probe(path)
    words = str(caught.value.hint).partition(": ")[2].replace("COPY", str(path)).split()
    subprocess.run(words, check=True)
    assert probe(path).format == "qcow2"


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "preallocation=metadata",
        "preallocation=falloc",
        "refcount_bits=4,cluster_size=512",
        "refcount_bits=64,cluster_size=2M",
        "extended_l2=on",
        "lazy_refcounts=on",
    ],
)
@pytest.mark.parametrize("snapshot", [False, True])
def test_whole_qcow2_images_are_not_taken_as_truncated(
    options: str, snapshot: bool, tmp_path: Path
) -> None:
    path = tmp_path / "whole.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", options, path, "20M")
    commands = ["-c", "write -P 1 0 64k", "-c", "write -P 2 19M 5000", "-c", "discard 0 64k"]
    subprocess.run(["qemu-io", *commands, path], check=True, capture_output=True)
    if snapshot:
        qemu_img("snapshot", "-c", "one", path)
        qemu_img("snapshot", "-d", "one", path)
    compressed = tmp_path / "compressed.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", path, compressed)
    assert probe(path).virtual_size == probe(compressed).virtual_size == 20 << 20


@pytest.mark.parametrize(
    ("what", "offset", "value"),
    [
        ("L1 table", 36, struct.pack(">I", 0xFFFF_FFFF)),
        ("L1 table at the limit", 36, struct.pack(">I", 4 << 20)),
        ("refcount table", 56, struct.pack(">I", 0xFFFF_FFFF)),
        ("refcount table at the limit", 56, struct.pack(">I", 128)),
        ("snapshot table", 60, struct.pack(">IQ", 0xFFFF_FFFF, 65536)),
        ("snapshot table past the end", 60, struct.pack(">IQ", 8192, 1 << 40)),
        ("snapshot table at the limit", 60, struct.pack(">IQ", 65536, 1 << 30)),
        ("header", 100, struct.pack(">I", 0xFFFF_FFF8)),
        ("cluster size", 20, struct.pack(">I", 63)),
        ("refcount width", 96, struct.pack(">I", 60)),
        ("backing name", 8, struct.pack(">QI", 512, 0xFFFF_FFFF)),
    ],
)
def test_a_huge_table_in_the_header_is_refused_in_time(
    what: str, offset: int, value: bytes, tmp_path: Path
) -> None:
    path = patched(written_qcow2(tmp_path / "huge.qcow2"), offset, value)
    if "at the limit" in what and "snapshot" in what:
        os.truncate(path, 2 << 30)  # zeros, which are entries, where the table is said to be
    started = time.monotonic()
    with pytest.raises(ImageError) as caught:
        probe(path)
    assert time.monotonic() - started < 5, what
    assert "\n" not in str(caught.value)


def test_format_raw_never_looks_at_the_content(tmp_path: Path) -> None:
    path = written_qcow2(tmp_path / "disk.img")
    info = probe(path, format="raw")
    assert (info.format, info.backing, info.probed) == ("raw", None, False)
    assert info.virtual_size == path.stat().st_size


@pytest.mark.parametrize("format", ["qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx", "raw"])
def test_every_supported_format_is_recognised(format: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", format, path, "8M")
    found = probe(path)
    assert found.format == format
    # vpc rounds up to whole cylinders
    assert 8 << 20 <= found.virtual_size <= 9 << 20


def test_a_format_that_opens_unknown_things_is_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", "parallels", path, "8M")
    with pytest.raises(ImageError, match="parallels"):
        probe(path)
    with pytest.raises(ImageError, match="vvfat"):
        probe(tmp_path, format="vvfat")


def test_snapshots_are_listed_with_their_times(tmp_path: Path) -> None:
    path = written_qcow2(tmp_path / "disk.qcow2")
    before = time.time_ns()
    qemu_img("snapshot", "-c", "first, with a comma", path)
    qemu_img("snapshot", "-c", "second", path)
    snapshots = probe(path).snapshots
    assert [snapshot.name for snapshot in snapshots] == ["first, with a comma", "second"]
    assert [snapshot.id for snapshot in snapshots] == ["1", "2"]
    assert all(before - 10**9 < snapshot.time <= time.time_ns() for snapshot in snapshots)
    assert all(snapshot.vm_state_size == 0 for snapshot in snapshots)


def test_a_backing_file_is_named_but_not_opened(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-u", "-b", "/not/there", "-F", "raw", tmp_path / "o", "1M")
    info = probe(tmp_path / "o")
    assert (info.backing, info.backing_format) == ("/not/there", "raw")


def test_data_file_beside_the_image_is_found_from_any_folder(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-o", "data_file=data.raw", "disk", "1M", cwd=tmp_path)
    info = probe(tmp_path / "disk")
    assert (info.format, info.data_file, info.data_path) == (
        "qcow2",
        "data.raw",
        tmp_path / "data.raw",
    )


@pytest.mark.parametrize("name", [b"/etc/passwd", b"../secret.xx", b'json:{"a":', b"nbd:unix:/x"])
@pytest.mark.parametrize("format", [None, "qcow2"])
@pytest.mark.usefixtures("no_qemu")
def test_a_data_file_elsewhere_is_refused_before_qemu_sees_it(
    name: bytes, format: str | None, tmp_path: Path
) -> None:
    header = bytearray(1 << 20)
    struct.pack_into(">4sIQIIQIIQQIIQ", header, 0, b"QFI\xfb", 3, 0, 0, 16, 1 << 20, 0, 1, 196608,
                     65536, 1, 0, 0)  # fmt: skip
    struct.pack_into(">QQQII", header, 72, 1 << 2, 0, 0, 4, 104)
    struct.pack_into(f">II{len(name)}s", header, 104, 0x44415441, len(name), name)
    path = tmp_path / "folder" / "disk.qcow2"
    path.parent.mkdir()
    path.write_bytes(header)
    with pytest.raises(RefusedError) as caught:
        probe(path, format=format)
    assert caught.value.status is ExitStatus.REFUSED
    assert name.decode() in str(caught.value)


def test_vmdk_extents_beside_the_descriptor_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", path, "5M")
    info = probe(path)
    assert (info.format, info.extents) == ("vmdk", (tmp_path / "disk-f001.vmdk",))


DESCRIPTOR = '# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "{}" 0\n'


@pytest.mark.usefixtures("no_qemu")
def test_vmdk_extents_elsewhere_are_refused_before_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_text(DESCRIPTOR.format("/etc/shadow"))
    with pytest.raises(RefusedError, match="/etc/shadow"):
        probe(path)
    with pytest.raises(RefusedError, match="/etc/shadow"):
        probe(path, format="vmdk")
    embedded = bytearray(4096)
    struct.pack_into("<4sIIQQQ", embedded, 0, b"KDMV", 1, 0, 0, 0, 2)
    text = DESCRIPTOR.format("/etc/passwd").encode()
    embedded[1024 : 1024 + len(text)] = text
    path.write_bytes(embedded)
    with pytest.raises(RefusedError, match="/etc/passwd"):
        probe(path)
    (tmp_path / "part.vmdk").write_bytes(embedded)
    path.write_text(DESCRIPTOR.replace("FLAT", "SPARSE").format("part.vmdk"))
    with pytest.raises(RefusedError, match="names further files"):
        probe(path)


def test_looking_changes_neither_a_byte_nor_the_time(tmp_path: Path) -> None:
    path = written_qcow2(tmp_path / "disk.qcow2")
    patched(path, 79, b"\x01")  # dirty: a writer would repair it
    os.utime(path, ns=(10**18, 10**18))
    before = path.read_bytes()
    info = probe(path)
    assert info.dirty and info.problems
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == 10**18
