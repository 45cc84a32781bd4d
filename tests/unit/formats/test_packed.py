"""Files that hold a disk and are no image of one: named, with a step that gets at the disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from imgtool.formats.packed import KINDS
from tests.support.luks import luks

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk with one partition."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4 * MIB))
    table = b"label: dos\nstart=2048, size=4096, type=83\n"
    subprocess.run(["/sbin/sfdisk", "-q", path], input=table, check=True)
    return path


def refused(imgtool_cli, *words: str | Path) -> str:
    """The hint of a command that refuses to take a file for a disk."""
    done = imgtool_cli(*words)
    assert done.status == 3, done.err
    assert "it is no disk image but" in done.err and "--format raw" not in done.err
    found = re.search(r"hint: (.*?)(?:, then look at .*)?\n", done.err)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("program", ["gzip", "xz", "bzip2", "zstd", "lz4", "lzip", "lzop"])
def test_a_compressed_disk_is_named_and_the_step_unpacks_it(
    disk, monkeypatch, imgtool_cli, program
):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    monkeypatch.chdir(disk.parent)
    packed = disk.with_name("it's a disk")  # without an ending, and with what a shell reads
    with packed.open("wb") as out:
        subprocess.run([program, "-c", disk], stdout=out, check=True)
    for command in (("info", packed), ("convert", packed, "x.qcow2"), ("partitions", packed)):
        step = refused(imgtool_cli, *command)
    assert not Path("x.qcow2").exists()
    subprocess.run(step, shell=True, check=True)
    assert Path("NEW").read_bytes() == disk.read_bytes()
    assert "0x83" in (text := imgtool_cli("partitions", "NEW").text) or "Linux" in text


# What makes one of a disk with ext4, and the file that the step then leaves.
TOOLS = {
    "7z": ("7z a -bd packed disk.raw && mv packed.7z packed && rm disk.raw", "disk.raw"),
    "ewfexport": (
        "ewfacquirestream -t e -f encase6 -c none < disk.raw && mv e.E01 packed.E01",
        "NEW.raw",
    ),
    "affconvert": ("affconvert disk.raw && rm disk.raw && mv disk.aff packed", "packed.raw"),
    "simg2img": ("img2simg disk.raw packed", "NEW"),
    "partclone.restore": ("partclone.extfs -c -s disk.raw -o packed", "NEW"),
}


@pytest.mark.parametrize("program", TOOLS)
def test_image_of_another_program_is_named_and_unpacked(
    tmp_path, monkeypatch, imgtool_cli, program
):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/name").write_text("text")
    words = ["mke2fs", "-q", "-t", "ext4", "-d", "tree", "disk.raw", "8M"]
    subprocess.run(words, check=True, capture_output=True)
    pack, unpacked = TOOLS[program]
    subprocess.run(pack, shell=True, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    packed = next(tmp_path.glob("packed*"))
    step = refused(imgtool_cli, "info", packed).partition(" of afflib-tools")[0]
    subprocess.run(step, shell=True, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert Path(unpacked).stat().st_size == 8 * MIB
    assert imgtool_cli("cat", tmp_path / unpacked, "/name", "--engine", "direct").text == "text"


def test_a_windows_image_holds_files(tmp_path, monkeypatch, imgtool_cli):
    if shutil.which("wimapply") is None:
        pytest.skip("wimapply is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/name").write_text("text")
    subprocess.run(["wimcapture", "tree", "files.wim"], check=True, capture_output=True)
    step = refused(imgtool_cli, "info", "files.wim").partition(";")[0]
    subprocess.run(step, shell=True, check=True, capture_output=True)
    assert Path("FOLDER/name").read_text() == "text"


def test_ntfsclone_image_is_named_and_restored(tmp_path, monkeypatch, imgtool_cli):
    monkeypatch.chdir(tmp_path)
    with open("it's NTFS", "wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkntfs", "-Q", "-q", "-F", "it's NTFS"], check=True, capture_output=True)
    words = ["ntfsclone", "-q", "-s", "-o", "saved it's", "it's NTFS"]
    subprocess.run(words, check=True, capture_output=True)
    step = refused(imgtool_cli, "info", "saved it's")
    subprocess.run(step, shell=True, check=True, capture_output=True)
    assert "ntfs" in imgtool_cli("filesystems", tmp_path / "NEW", "--engine", "direct").text


def test_an_archive_is_named_and_the_step_unpacks_it(disk, monkeypatch, imgtool_cli):
    monkeypatch.chdir(disk.parent)
    content = disk.read_bytes()
    (disk.parent / "vm.ovf").write_text("<?xml version='1.0'?>\n")
    for name in ("vm.ova", "vm.tar"):
        with tarfile.open(name, "w") as archive:
            archive.add("vm.ovf")
            archive.add("disk.raw")
    with zipfile.ZipFile("vm.zip", "w") as archive:
        archive.write("disk.raw")
    assert "OVA" in imgtool_cli("ls", "vm.ova", "/").err
    disk.unlink()
    for name in ("vm.ova", "vm.tar", "vm.zip"):
        step = refused(imgtool_cli, "ls", name, "/")
        subprocess.run(step, shell=True, check=True, capture_output=True)
        assert disk.read_bytes() == content
        disk.unlink()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "command", [("info",), ("check",), ("chain", "show"), ("resize", "{}", "+1M")]
)
def test_each_kind_is_refused_by_name(tmp_path, imgtool_cli, kind, command):
    path = tmp_path / "image"
    path.write_bytes(bytes(kind.offset) + kind.magic + bytes(MIB))
    words = [word.format(path) for word in command]
    if "{}" not in command:
        words.append(str(path))
    before = path.read_bytes()
    assert refused(imgtool_cli, *words)
    assert path.read_bytes() == before


def test_raw_disk_that_looks_packed_is_read_where_called_raw(tmp_path, imgtool_cli):
    path = tmp_path / "data.raw"
    path.write_bytes(b"\x1f\x8b" + bytes(MIB))
    assert imgtool_cli("convert", "--format", "raw", path, tmp_path / "new.qcow2").status == 0


def test_a_format_that_only_qemu_knows_is_converted_by_it(disk, monkeypatch, imgtool_cli):
    monkeypatch.chdir(disk.parent)
    subprocess.run(["qemu-img", "convert", "-O", "parallels", disk, "p.hdd"], check=True)
    done = imgtool_cli("info", "p.hdd")
    assert done.status == 3
    found = re.search(r"hint: (qemu-img .*?), then look at NEW\n", done.err)
    assert found is not None
    subprocess.run(found[1], shell=True, check=True)
    assert imgtool_cli("partitions", "NEW").status == 0


def test_an_encrypted_disk_of_the_old_kind_is_a_raw_disk(tmp_path, imgtool_cli):
    path = luks(tmp_path / "luks", 1 << 20)
    assert imgtool_cli("info", path).status == 0
