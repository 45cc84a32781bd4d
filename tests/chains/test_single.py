"""Single images: made, converted, resized, checked, and made smaller with all that they have."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import ImgtoolError, UsageError
from imgtool.image.chain.chain import open_chain
from imgtool.image.change.copies import convert
from imgtool.image.change.single import parse_size
from imgtool.image.intent.intent_log import is_ours
from imgtool.image.qemu.qemu_img import same_content

MIB = 1 << 20


def qemu_img(*words: str | Path) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True).stdout


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    argv: list[str | Path] = ["qemu-io", "-t", "writeback", "-f", "qcow2", *words, image]
    subprocess.run(argv, check=True, capture_output=True)


def same(first: Path, second: Path) -> bool:
    return same_content(open_chain(first).filename(), open_chain(second).filename())


def details(image: Path) -> dict[str, object]:
    said = json.loads(qemu_img("info", "--output=json", image))
    return {**said["format-specific"]["data"], "cluster-size": said["cluster-size"]}


def space(image: Path) -> int:
    return image.stat().st_blocks * 512


def nothing_left(folder: Path) -> bool:
    return not any(is_ours(path.name) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5G", 3 << 29),
        ("1048576", MIB),
        ("1048577", MIB + 512),
        ("0.1K", 512),
        ("20g", 20 << 30),
        ("1KiB", 1024),
        ("+1M", 11 * MIB),
        ("-5M", 5 * MIB),
        ("9007199254740993", 9007199254741504),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, 10 * MIB) == size


@pytest.mark.parametrize("text", ["50", "+1", "-2", "1048575"])
def test_small_size_without_unit_is_refused_with_a_suggestion(text):
    with pytest.raises(UsageError, match="without a unit") as refused:
        parse_size(text, 10 * MIB)
    meant = str(refused.value.hint).partition(" ")[0]
    assert meant == f"{text}M"


def test_nothing_is_made_of_a_small_size_and_the_hint_makes_it(tmp_path, imgtool_cli):
    new = tmp_path / "new.qcow2"
    refused = imgtool_cli("create", new, "50")
    assert refused.status == 2 and "without a unit" in refused.err
    assert list(tmp_path.iterdir()) == []
    meant = refused.err.partition("hint: ")[2].partition(" ")[0]
    assert imgtool_cli("create", new, meant).status == 0
    assert json.loads(qemu_img("info", "--output=json", new))["virtual-size"] == 50 * MIB


@pytest.mark.parametrize(
    "text",
    ["0", "-5G", "1e3", "", "G", "1.G", "1 G", "9E9", "9" * 5000, "4E1", "١G", "nan", "1G\n2"],
)
def test_what_is_no_size_of_an_image(text):
    with pytest.raises(UsageError):
        parse_size(text, 10 * MIB)


MADE_WITH = (
    *("refcount_bits=1", "refcount_bits=16", "refcount_bits=64", "cluster_size=512"),
    *("cluster_size=2M", "compat=0.10", "lazy_refcounts=on", "compression_type=zstd"),
    "extended_l2=on,cluster_size=128k",
)
WITH_SNAPSHOT = ("refcount_bits=64", "cluster_size=512", "compat=0.10")


@pytest.mark.parametrize(
    ("options", "with_snapshot"),
    [
        *((options, False) for options in MADE_WITH),
        *((options, True) for options in WITH_SNAPSHOT),
    ],
)
def test_compact_keeps_what_an_image_is_made_of(tmp_path, imgtool_cli, options, with_snapshot):
    image, copy = tmp_path / "disk.qcow2", tmp_path / "copy.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "16M")
    write(image, "write -P 1 0 4M", "write -P 2 8M 1M", "write -P 0 4M 2M")
    if with_snapshot:
        qemu_img("snapshot", "-c", "s", image)
        write(image, "write -P 3 0 2M")
        qemu_img("snapshot", "-c", "t", image)
        write(image, "write -P 4 0 2M")
        qemu_img("snapshot", "-d", "t", image)
    copy.write_bytes(image.read_bytes())
    before, taken = details(image), space(image)
    done = imgtool_cli("compact", image)
    assert done.status == 0, done.err
    assert same(image, copy) and details(image) == before
    assert space(image) <= taken - (1 * MIB if not with_snapshot else 0)
    assert qemu_img("check", image).startswith(b"No errors")
    if with_snapshot:
        for each in (image, copy):
            qemu_img("snapshot", "-a", "s", each)
        assert same(image, copy)
    assert nothing_left(tmp_path)


def test_compact_keeps_compressed_clusters_bitmaps_and_the_base(tmp_path, imgtool_cli):
    raw, packed, top = tmp_path / "raw", tmp_path / "packed.qcow2", tmp_path / "top.qcow2"
    raw.write_bytes(b"text " * MIB)
    qemu_img("convert", "-c", "-O", "qcow2", raw, packed)
    taken = space(packed)
    assert imgtool_cli("compact", packed).status == 0
    assert space(packed) <= taken and same(packed, raw)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "./packed.qcow2", top)
    write(top, "write -P 1 0 1M", "write -z 1M 1M", "write -P 0 2M 1M", "discard 0 64k")
    qemu_img("convert", "-O", "raw", top, tmp_path / "expected")
    assert imgtool_cli("compact", top).status == 0
    assert same(top, tmp_path / "expected")
    said = json.loads(qemu_img("info", "--output=json", top))
    assert said["backing-filename"] == "./packed.qcow2"
    qemu_img("bitmap", "--add", top, "changes")
    assert imgtool_cli("compact", top).status == 0
    assert "changes" in str(details(top)["bitmaps"])


def test_compact_of_a_raw_image_makes_holes(tmp_path, imgtool_cli):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"x" * MIB + bytes(8 * MIB) + b"y" * MIB)
    content = raw.read_bytes()
    assert imgtool_cli("compact", "--format", "raw", raw).status == 0
    assert raw.read_bytes() == content and space(raw) < 3 * MIB
    qemu_img("convert", "-O", "vmdk", raw, tmp_path / "disk.vmdk")
    done = imgtool_cli("compact", tmp_path / "disk.vmdk")
    assert done.status == 3 and "imgtool convert" in done.err


def test_what_is_no_image_keeps_its_bytes_and_its_length(tmp_path, imgtool_cli):
    text = tmp_path / "notes.txt"
    text.write_bytes(b"notes\n" * 500)
    for words in (("compact", text), ("resize", text, "+1M")):
        found = imgtool_cli(*words)
        assert found.status == 3
        assert "not a disk image" in found.err and "--format raw" in found.err
    assert imgtool_cli("compact", "--format", "raw", text).status == 0
    assert text.read_bytes() == b"notes\n" * 500
    blank = tmp_path / "blank.raw"
    blank.write_bytes(bytes(MIB))
    assert imgtool_cli("compact", blank).status == 0
    assert imgtool_cli("resize", blank, "+1M").status == 0
    assert blank.stat().st_size == 2 * MIB


def test_what_is_being_made_is_for_its_owners_eyes_alone(tmp_path, imgtool_cli, monkeypatch):
    from imgtool.image.change import compacting

    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    image.chmod(0o600)
    seen: list[int] = []

    def look(*arguments: Any) -> None:
        seen.extend(path.stat().st_mode & 0o777 for path in tmp_path.glob(".*imgtool-*[0-9a-f]"))
        convert(*arguments)

    monkeypatch.setattr(compacting, "convert", look)
    assert imgtool_cli("compact", image).status == 0
    assert 0o600 in seen and image.stat().st_mode & 0o777 == 0o600
    assert imgtool_cli("convert", image, tmp_path / "copy").status == 0
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("to", ["raw", "vmdk", "vpc", "vhdx"])
def test_convert_and_create_in_every_format(tmp_path, imgtool_cli, to):
    image, new = tmp_path / "disk.qcow2", tmp_path / f"new.{to}"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    write(image, "write -P 1 1M 1M")
    done = imgtool_cli("convert", image, new, "--to", to)
    assert done.status == 0, done.err
    made = json.loads(qemu_img("info", "-f", to, "--output=json", new))
    assert made["virtual-size"] >= 8 * MIB
    done = imgtool_cli("create", tmp_path / "empty", "8M", "--to", to)
    assert done.status == 0, done.err
    assert nothing_left(tmp_path)


def test_convert_takes_an_image_as_it_was_at_a_snapshot(tmp_path, imgtool_cli):
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    write(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "ones", image)
    write(image, "write -P 2 0 1M")
    done = imgtool_cli("convert", image, tmp_path / "new", "--to", "raw", "--snapshot", "ones")
    assert done.status == 0, done.err
    assert (tmp_path / "new").read_bytes() == b"\1" * MIB
    assert imgtool_cli("convert", image, tmp_path / "x", "--snapshot", "no").status == 5
    assert imgtool_cli("convert", image, image).status == 4


def partitioned(path: Path) -> Path:
    """A raw disk of 16 MiB with a partition from 1 MiB to 5 MiB."""
    path.write_bytes(b"")
    os.truncate(path, 16 * MIB)
    table = "label: dos\nstart=2048, size=8192, type=83\n"
    subprocess.run(["/sbin/sfdisk", "-q", path], input=table.encode(), check=True)
    return path


def test_a_disk_shrinks_only_where_nothing_lies_beyond(tmp_path, imgtool_cli):
    disk = partitioned(tmp_path / "disk.raw")
    for size, said in (("4M", "partition 1 would be cut"), ("1M", "partition 1 would be cut")):
        done = imgtool_cli("resize", disk, size)
        assert done.status == 4 and said in done.err
    with disk.open("r+b") as file:
        file.seek(12 * MIB)
        file.write(b"x")
    done = imgtool_cli("resize", disk, "8M")
    assert done.status == 4 and "not zeros" in done.err and "--force shrink" in done.err
    assert imgtool_cli("resize", disk, "14M").status == 0
    assert imgtool_cli("resize", disk, "8M", "--force", "shrink").status == 0
    assert disk.stat().st_size == 8 * MIB
    assert imgtool_cli("resize", disk, "--", "-3M").status == 0
    assert imgtool_cli("resize", disk, "+4G").status == 0
    assert disk.stat().st_size == 5 * MIB + (4 << 30)
    bare = tmp_path / "bare.raw"
    bare.write_bytes(b"x" * MIB)
    done = imgtool_cli("resize", "--format", "raw", bare, "512K")
    assert done.status == 4 and "no partition table" in done.err


def test_an_overlay_that_grows_over_a_larger_base_shows_zeros(tmp_path, imgtool_cli):
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"x" * 2 * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", top, "1M")
    assert imgtool_cli("resize", top, "2M").status == 0
    qemu_img("convert", "-O", "raw", top, tmp_path / "seen")
    assert (tmp_path / "seen").read_bytes() == b"x" * MIB + bytes(MIB)


def test_check_and_repair(tmp_path, imgtool_cli):
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    write(image, "write -P 1 0 1M")
    with image.open("r+b") as file:  # a cluster more is counted than is used
        file.truncate(30 * 65536)
        file.seek(2 * 65536 + 2 * 25)
        file.write(b"\0\1")
    row = json.loads(imgtool_cli("check", image, "-o", "json").text)[0]
    assert row["sound"] is True and row["leaks"] == 1
    done = imgtool_cli("check", image, "--repair", "leaks", "-o", "json")
    assert done.status == 0 and json.loads(done.text)[0]["leaks"] == 0
    with image.open("r+b") as file:  # what is used is counted as free
        file.seek(2 * 65536)
        file.write(bytes(16))
    assert imgtool_cli("check", image).status == 3
    assert imgtool_cli("check", image, "--repair", "leaks").status == 3
    assert imgtool_cli("check", image, "--repair", "all").status == 0
    assert imgtool_cli("check", image).status == 0
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"x" * MIB)
    done = imgtool_cli("check", raw)
    assert done.status == 0 and "not looked at: its tables" in done.err


def test_recover_of_nothing_is_said(tmp_path, imgtool_cli):
    assert imgtool_cli("recover", tmp_path / "no.qcow2").status == 3
    (tmp_path / "disk.raw").write_bytes(b"x" * MIB)
    done = imgtool_cli("recover", tmp_path / "disk.raw")
    assert done.status == 0 and "nothing was interrupted" in done.err
    done = imgtool_cli("recover", tmp_path)
    assert done.status == 3 and "a directory, not an image" in done.err


def test_an_image_that_a_guest_writes_to_is_not_converted(tmp_path, imgtool_cli):
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    with subprocess.Popen(["qemu-io", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as io:
        assert io.stdin is not None and io.stdout is not None
        io.stdin.write(b"write 0 64k\n")
        io.stdin.flush()
        io.stdout.readline()
        refused = imgtool_cli("convert", image, tmp_path / "new.qcow2")
        io.stdin.close()
    assert refused.status == 4
    assert f"the image is in use by qemu-io, process {io.pid}" in refused.err
    assert "interrupted" not in refused.err and nothing_left(tmp_path)


def test_what_fails_was_not_interrupted(tmp_path, imgtool_cli, monkeypatch):
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")

    def fail(self, *words):
        raise ImgtoolError("no luck")

    monkeypatch.setattr("imgtool.image.change.plan.Work.prove_same", fail)
    failed = imgtool_cli("convert", image, tmp_path / "new.qcow2")
    assert failed.status == 1 and "no luck" in failed.err
    assert "warning: the convert of " in failed.err and "interrupted" not in failed.err
