"""What other programs say is told in words of imgtool's own, with their text at hand."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from imgtool.host import program_messages

MIB = 1 << 20
# How QEMU, libnbd and mount(8) speak.
RAW = re.compile(
    r"Could not open|qemu-img:|Invalid argument|Input/output error|block-vpc|nbd_pread|EIO"
    r"|Incorrect header checksum|wrong fs type|exited with status|Bad superblock"
)


def make(path: Path, *options: str) -> Path:
    raw = path.with_name("content")
    raw.write_bytes(b"x" * 2 * MIB)
    subprocess.run(["qemu-img", "convert", "-f", "raw", *options, raw, path], check=True)
    return path


def patch(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


CASES = [
    pytest.param(("-O", "vpc"), lambda p: patch(p, 20, b"\xff"), "damaged", id="vpc-checksum"),
    pytest.param(("-O", "vpc"), lambda p: cut(p, 70000), "truncated", id="vpc-cut"),
    pytest.param(("-O", "vdi"), lambda p: patch(p, 0x44, b"\x09"), "of a kind", id="vdi-version"),
    pytest.param(
        ("-O", "vhdx"), lambda p: patch(p, 64 << 10, bytes(256 << 10)), "damaged", id="vhdx"
    ),
    pytest.param(("-O", "vmdk"), lambda p: cut(p, 40000), "truncated", id="vmdk-cut"),
    pytest.param(("-O", "vmdk"), lambda p: patch(p, 4, b"\x63"), "of a kind", id="vmdk-version"),
    pytest.param(("-O", "qed"), lambda p: patch(p, 4, b"\xff" * 8), "damaged", id="qed"),
    pytest.param(("-O", "qcow2"), lambda p: patch(p, 79, b"\x80"), "of a kind", id="qcow2-feature"),
    pytest.param(("-O", "qcow2"), lambda p: patch(p, 40, b"\0\xff"), "damaged", id="qcow2-l1"),
    pytest.param(
        ("-O", "vmdk", "-o", "subformat=monolithicFlat"),
        lambda p: (p.parent / "image-flat.vmdk").unlink(),
        "no such file",
        id="vmdk-part-missing",
    ),
]


@pytest.mark.parametrize(("options", "damage", "means"), CASES)
@pytest.mark.parametrize("command", ["info", "check", "convert"])
def test_what_qemu_says_of_an_image_is_one_line_of_ours(
    tmp_path, imgtool_cli, options, damage, means, command
):
    image = make(tmp_path / "image.vmdk", *options)
    damage(image)
    more = [tmp_path / "new"] if command == "convert" else []
    done = imgtool_cli(command, image, *more)
    assert done.status == 3, done.err
    lines = done.err.splitlines()
    assert len(lines) <= 2 and not RAW.search(done.err), done.err
    assert means in done.err, done.err


def test_its_own_text_is_there_with_v(tmp_path):
    image = make(tmp_path / "image", "-O", "vpc")
    patch(image, 20, b"\xff")
    argv = (sys.executable, "-m", "imgtool", "info", "-v", image)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "QEMU said: " in done.stderr and "checksum" in done.stderr


def test_a_part_that_cannot_be_read_is_told_so(tmp_path, imgtool_cli):
    image = make(tmp_path / "image", "-O", "qcow2")
    data = image.read_bytes()
    count, offset = struct.unpack_from(">IQ", data, 36)
    table = struct.unpack_from(f">{count}Q", data, offset)[0] & 0x00FFFFFFFFFFFE00
    patch(image, table, b"\xff" * 4096)
    done = imgtool_cli("partitions", image)
    assert done.status == 3 and not RAW.search(done.err)
    assert "a part of it cannot be read" in done.err
    assert f"imgtool check {image}" in done.err
    assert imgtool_cli("check", image).status == 3


def vhdx_with_a_log(path: Path) -> Path:
    """A VHDX whose writer was killed between its log and its tables: its header names a log, which
    QEMU looks at once it is not empty."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "vhdx", path, "512M"], check=True)
    subprocess.run(
        ["qemu-io", "-f", "vhdx", "-c", "write 0 1M", path], check=True, capture_output=True
    )
    # strace counts the writes of each of QEMU's threads apart, and which thread makes which is not
    # always the same: at which of them the log is whole and the tables are not is found by trying.
    torn = path.with_name("torn.vhdx")
    for number in itertools.islice(itertools.cycle(range(1, 10)), 200):
        shutil.copyfile(path, torn)
        kill = ["-e", f"inject=pwrite64,pwritev:signal=KILL:when={number}"]
        argv = ["strace", "-f", "-o", "/dev/null", "-e", "trace=pwrite64,pwritev", *kill]
        argv += ["qemu-io", "-f", "vhdx", "-c", "write -P 5 300M 64k"]
        subprocess.run([*argv, torn], capture_output=True, check=False)
        told = subprocess.run(["qemu-img", "info", torn], capture_output=True, check=False)
        if b"log" in told.stderr:
            return torn
    pytest.fail("no write left a log behind")


@pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace, which cuts a write off, is missing"
)
def test_a_log_that_is_to_be_replayed_is_replayed_in_a_copy(tmp_path, monkeypatch, imgtool_cli):
    monkeypatch.chdir(tmp_path)
    image = vhdx_with_a_log(tmp_path / "image.vhdx")
    before = image.read_bytes()
    for command in (("info",), ("check",), ("check", "--repair", "all"), ("partitions",)):
        done = imgtool_cli(*command, image)
        assert done.status == 3 and "a log in it has to be replayed" in done.err
    step = re.search(r"(cp \S+ COPY), then (qemu-img check -r all COPY)\n", done.err)
    assert step is not None
    for words in step.groups():
        subprocess.run(words, shell=True, check=True, capture_output=True)
    assert image.read_bytes() == before
    assert imgtool_cli("info", "COPY").status == 0


KERNEL = {
    "mount: /sysroot: wrong fs type, bad option, bad superblock on /dev/sda1": "finds it damaged",
    "mount(2) system call failed: Structure needs cleaning.": "finds it damaged",
    "mount: unknown filesystem type 'zfs_member'": "does not know this filesystem",
    "The disk contains an unclean file system (0, 0).": "Windows was not shut down",
    "mount: /sysroot: more filesystems detected on /dev/sda": "marks of two filesystems",
    "no luck today": "imgtool does not know",
}


@pytest.mark.parametrize(("text", "means"), KERNEL.items())
def test_what_the_kernel_says_is_told_in_our_words(text, means):
    told = program_messages.by_mount(text)
    assert means in told.means and not RAW.search(f"{told.means} {told.step}")


def test_what_rpm_says_is_told_in_our_words():
    told = program_messages.by_rpm("inspect_list_applications2: rpmtsInitIterator")
    assert "rpm database cannot be read" in told.means and told.step
