"""Raw disks that were cut off: it is said where they end, and what is there is read."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from imgtool import cli
from imgtool.errors import ExitStatus
from imgtool.image.chain.ends import disk_size
from imgtool.image.chain.info import probe
from tests.support.checks import check_chain

SIZE, START, CUT = 32 << 20, 1 << 20, 20_000_300
SMALL, LARGE = b"a letter\n", 24 << 20


def run(*words: object) -> int:
    try:
        return int(cli._run([str(word) for word in words]))
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture(scope="module", params=["gpt", "dos"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole disk with one partition, and in it what fits and what reaches beyond the cut."""
    folder = tmp_path_factory.mktemp("cut")
    tree = folder / "tree"
    tree.mkdir()
    (tree / "small").write_bytes(SMALL)
    large = folder / "large"
    large.write_bytes(random.Random(1).randbytes(LARGE))
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    table = f"label: {request.param}\nstart=2048,size={30 << 11},type=L\n"
    subprocess.run(["sfdisk", "-q", image], input=table.encode(), check=True, capture_output=True)
    options = f"offset={START}"
    argv: list[str | Path] = [
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-E",
        options,
        "-d",
        tree,
        image,
        f"{30 << 10}k",
    ]
    subprocess.run(argv, check=True, capture_output=True)
    argv = ["debugfs", "-w", "-R", f"write {large} large", f"{image}?{options}"]
    subprocess.run(argv, check=True, capture_output=True)
    return image


@pytest.fixture
def cut(disk: Path, tmp_path: Path) -> Path:
    image = tmp_path / "cut.img"
    image.write_bytes(disk.read_bytes()[:CUT])
    return image


def test_a_whole_disk_is_not_cut_off(disk: Path, capfd):
    assert probe(disk).unseen is None
    assert not check_chain(disk)
    assert run("ls", disk, "/small") == 0
    assert capfd.readouterr().err == ""


def test_where_it_ends_is_said_in_one_line(cut: Path, capfd):
    for words in (["info", cut], ["partitions", cut], ["ls", cut, "/small"], ["df", cut]):
        assert run(*words) == 0
        said = [line for line in capfd.readouterr().err.splitlines() if "it ends at" in line]
        assert len(said) == 1, words
        assert f"{CUT} bytes" in said[0] and " bytes: what lies beyond cannot be read" in said[0]


def test_it_is_not_sound(cut: Path, capfd):
    assert run("check", "-o", "json", cut) == ExitStatus.IMAGE_UNREADABLE
    assert json.loads(capfd.readouterr().out)[0]["sound"] is False
    assert run("chain", "check", cut) == ExitStatus.IMAGE_UNREADABLE
    assert "risk: cut-off" in capfd.readouterr().out


def test_what_is_there_is_read_and_what_is_not_is_an_error(cut: Path, disk: Path, tmp_path, capfd):
    assert run("cat", cut, "/small") == 0
    assert capfd.readouterr().out.encode() == SMALL
    whole = disk.parent / "large"
    assert run("copy-out", "--keep-partial", cut, "/small", "/large", tmp_path) == 1
    assert "/large" in capfd.readouterr().err
    assert (tmp_path / "small").read_bytes() == SMALL
    kept = [path for path in tmp_path.iterdir() if path.name.startswith("large")]
    assert len(kept) == 1
    content = kept[0].read_bytes()
    assert CUT // 2 < len(content) < CUT
    assert whole.read_bytes().startswith(content)


def test_the_partition_keeps_the_size_that_its_table_says(cut: Path, capfd):
    assert run("partitions", "-o", "json", cut) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert (row["start"], row["size"]) == (START, 30 << 20)


def test_what_the_line_says_to_do_works(cut: Path):
    (finding,) = check_chain(cut)
    words = finding.do.rpartition(": ")[2].replace("COPY", str(cut)).split()
    subprocess.run(words, check=True)
    assert probe(cut).unseen is None


@pytest.mark.parametrize("kind", ["ext4", "vfat", "none"])
def test_a_disk_without_a_table_says_nothing_of_its_size(kind: str, tmp_path: Path):
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    if kind != "none":
        program = ["mke2fs", "-q", "-F", "-t", "ext4"] if kind == "ext4" else ["mkfs.vfat"]
        subprocess.run([*program, image], check=True, capture_output=True)
    content = image.read_bytes()[:2048]
    assert disk_size(content, 1 << 20) == 1 << 20


def test_a_table_that_is_not_sound_says_nothing(disk: Path):
    start = disk.read_bytes()[:2048]
    assert disk_size(start, CUT) > CUT
    assert disk_size(start[:600], CUT) == CUT
    assert disk_size(bytes(2048), CUT) == CUT
    if start[512:520] == b"EFI PART":
        assert disk_size(start[:560] + os.urandom(16) + start[576:], CUT) == CUT  # its checksum
    else:
        assert disk_size(start[:446] + b"\x01" + start[447:], CUT) == CUT


# Images of other formats, for whose missing parts QEMU gives zeros


@pytest.fixture(params=["qcow2", "vdi", "vmdk"])
def torn(request: pytest.FixtureRequest, disk: Path, tmp_path: Path) -> Path:
    image = tmp_path / f"torn.{request.param}"
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", request.param, disk, image], check=True
    )
    os.truncate(image, image.stat().st_size * 6 // 10)
    return image


def test_zeros_are_never_taken_for_what_is_lost(torn: Path, disk: Path, tmp_path, capfd):
    assert run("cat", torn, "/small") == 0
    said = capfd.readouterr()
    assert said.out.encode() == SMALL
    assert said.err.count("truncated: the file is") == 1
    assert run("copy-out", "--keep-partial", torn, "/small", "/large", tmp_path) == 1
    assert "its file was cut off" in capfd.readouterr().err
    assert (tmp_path / "small").read_bytes() == SMALL
    (kept,) = [path for path in tmp_path.iterdir() if path.name.startswith("large")]
    content = kept.read_bytes()
    assert LARGE // 3 < len(content) < LARGE
    assert (disk.parent / "large").read_bytes().startswith(content)


@pytest.mark.parametrize(
    "words",
    [
        ["info", "IMAGE"],
        ["check", "IMAGE"],
        ["chain", "check", "IMAGE"],
        ["partitions", "IMAGE"],
        ["convert", "IMAGE", "NEW"],
        ["ls", "--engine", "libguestfs", "IMAGE", "/"],
        ["cat", "IMAGE", "/small", "--snapshot", "x"],
        ["copy-in", "IMAGE", "FOLDER", "/"],
        ["mount", "IMAGE", "FOLDER"],
        ["resize", "IMAGE", "+1G"],
        ["overlay", "create", "IMAGE", "NEW"],
    ],
    ids=" ".join,
)
def test_who_would_take_zeros_for_it_is_refused(words: list[str], torn: Path, tmp_path, capfd):
    (tmp_path / "folder").mkdir()
    names = {"IMAGE": torn, "NEW": tmp_path / "new", "FOLDER": tmp_path / "folder"}
    assert run(*(names.get(word, word) for word in words)) == ExitStatus.IMAGE_UNREADABLE
    said = capfd.readouterr()
    assert "truncated: the file is" in said.out + said.err
    assert not (tmp_path / "new").exists()


def test_a_copy_that_is_lengthened_as_the_line_says_is_read(
    torn: Path, disk: Path, tmp_path: Path, capfd
):
    assert run("info", torn) == ExitStatus.IMAGE_UNREADABLE
    said = capfd.readouterr()
    step = re.search(r"lengthen a copy: truncate -s (\d+) COPY", said.out + said.err)
    assert step is not None, said
    copy = torn.with_name(f"copy{torn.suffix}")
    copy.write_bytes(torn.read_bytes())
    subprocess.run(["truncate", "-s", step[1], copy], check=True)
    assert run("info", copy) == 0
    assert run("convert", copy, tmp_path / "new.raw", "--to", "raw") == 0
    left = 8 << 20  # some sixty percent of the file are there
    assert (tmp_path / "new.raw").read_bytes()[:left] == disk.read_bytes()[:left]


def test_where_the_tables_are_lost_nothing_is_read(disk: Path, tmp_path: Path, capfd):
    image = tmp_path / "torn.qcow2"
    options = ["-o", "cluster_size=4k"]
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, disk, image], check=True
    )
    os.truncate(image, image.stat().st_size * 6 // 10)
    assert run("ls", image, "/") == ExitStatus.IMAGE_UNREADABLE
    assert "truncated: the file is" in capfd.readouterr().err


def test_an_overlay_that_was_cut_off_is_not_read_in_part(disk: Path, tmp_path: Path, capfd):
    image = tmp_path / "over.qcow2"
    words = ("create", "-f", "qcow2", "-F", "raw", "-b", disk, image)
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)
    subprocess.run(["qemu-io", "-c", "write 8M 4M", image], check=True, capture_output=True)
    os.truncate(image, image.stat().st_size * 6 // 10)
    assert run("ls", "--backing-dir", disk.parent, image, "/") == ExitStatus.IMAGE_UNREADABLE
    assert "truncated: the file is" in capfd.readouterr().err
