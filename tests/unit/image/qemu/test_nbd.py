"""Reading a disk through a private qemu-nbd, and reading its partition table that way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from imgtool.errors import ExitStatus, ImageError, NotInGuestError
from imgtool.guest.partitions import partitions_of
from imgtool.host.process import command_of
from imgtool.image.chain.chain import open_chain
from imgtool.image.qemu.disk_reader import open_contents
from imgtool.image.qemu.nbd import serve


def write(path: Path, pattern: int, where: str) -> None:
    command = ("qemu-io", "-c", f"write -P {pattern} {where}", path)
    subprocess.run(command, check=True, capture_output=True)


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def test_temporary_files_may_be_in_a_folder_of_any_name(disk: Path, monkeypatch):
    """The name of a socket may have 107 bytes; QEMU's error was told as damage of the image."""
    folder = disk.parent / ("x" * 120) / "it's here"
    folder.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with serve(open_chain(disk)) as server:
        assert server.read(0, 4096) == b"\2" * 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """64 MiB with a 1 at the start when the snapshot `before` was made, and a 2 since."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "64M")
    write(path, 1, "0 1M")
    qemu_img("snapshot", "-c", "before, all", path)
    write(path, 2, "0 1M")
    return path


def test_reads_are_those_of_the_disk_and_stop_at_its_end(disk: Path) -> None:
    with serve(open_chain(disk)) as server:
        assert server.size == 64 << 20
        assert server.read(0, 3) == b"\2\2\2"
        assert server.read((1 << 20) - 1, 2) == b"\2\0"
        assert len(server.read(0, 64 << 20)) == 64 << 20
        assert server.read((64 << 20) - 5, 100) == bytes(5)
        assert server.read(65 << 20, 5) == b""


def test_a_snapshot_is_read_as_it_was(disk: Path) -> None:
    with serve(open_chain(disk), snapshot="before, all") as server:
        assert server.read(0, 1 << 20) == b"\1" * (1 << 20)


def test_a_snapshot_on_an_overlay_is_read_with_what_is_below(disk: Path) -> None:
    active = disk.with_name("active.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "qcow2", active)
    write(active, 3, "512k 64k")
    qemu_img("snapshot", "-c", "mine", active)
    write(active, 4, "0 1M")
    with serve(open_chain(active), snapshot="mine") as server:
        assert (server.read(0, 1), server.read(512 << 10, 1)) == (b"\2", b"\3")


def test_a_wrong_snapshot_is_told_the_right_ones(disk: Path) -> None:
    with pytest.raises(NotInGuestError) as caught, serve(open_chain(disk), snapshot="after"):
        pass
    assert caught.value.status is ExitStatus.NOT_IN_GUEST
    assert "before, all" in str(caught.value.hint)


def test_nothing_is_left_when_the_block_ends(disk: Path) -> None:
    with pytest.raises(KeyboardInterrupt), serve(open_chain(disk)) as server:
        folder = server.socket.parent
        server.read(0, 1)  # by now QEMU has written who it is
        process = int((folder / "pid").read_text())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        raise KeyboardInterrupt
    assert not folder.exists()
    assert not any(str(folder) in word for word in command_of(process))


def test_reading_changes_neither_a_byte_nor_the_time(disk: Path) -> None:
    os.utime(disk, ns=(10**18, 10**18))
    before = hashlib.sha256(disk.read_bytes()).digest()
    with serve(open_chain(disk)) as server:
        server.read(0, 2 << 20)
        refused = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", server.uri], capture_output=True
        )
        assert refused.returncode != 0
    assert hashlib.sha256(disk.read_bytes()).digest() == before
    assert disk.stat().st_mtime_ns == 10**18


def test_an_image_encrypted_by_qemu_says_so(tmp_path: Path) -> None:
    path = tmp_path / "secret.qcow2"
    secret = "secret,id=key,data=abc"
    # Not LUKS: on a busy machine qemu-img gives up measuring how fast it derives keys.
    options = "encrypt.format=aes,encrypt.key-secret=key"
    qemu_img("create", "-f", "qcow2", "--object", secret, "-o", options, path, "1M")
    chain = open_chain(path)
    assert chain.active.encrypted
    with pytest.raises(ImageError, match="encrypted"), serve(chain):
        pass


def test_a_damaged_image_gives_an_error_and_not_zeros(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(40)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write(((1 << 63) | 0x1234_5600).to_bytes(8, "big"))  # not on a cluster boundary
    with serve(open_chain(disk)) as server, pytest.raises(ImageError, match="cannot be read"):
        server.read(0, 1)


def test_one_unreadable_cluster_is_all_that_cannot_be_read(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    chance = random.Random(5)
    content = b"".join(chance.randbytes(4) * 16 for _ in range((16 << 20) // 64))
    raw.write_bytes(content)
    qemu_img("convert", "-c", "-O", "qcow2", raw, path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 3000)
    good = 0
    with serve(open_chain(path)) as server:
        for at in range(0, 16 << 20, 1 << 20):
            with contextlib.suppress(ImageError):
                good += server.read(at, 1 << 20) == content[at : at + (1 << 20)]
    assert 14 <= good < 16


def test_contents_are_the_same_by_either_way(disk: Path) -> None:
    raw = disk.with_name("disk.img")
    qemu_img("convert", "-O", "raw", disk, raw)
    for path in disk, raw:
        with open_contents(open_chain(path)) as (read, size):
            assert size == 64 << 20
            assert read((1 << 20) - 1, 2) == b"\2\0"
            assert read(size - 1, 10) == b"\0"


def test_partitions_are_those_of_the_snapshot(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    for script, name in ("label: dos\n,8M\n,,\n", "before"), ("label: gpt\n,8M\n", None):
        with raw.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["sfdisk", "-q", raw], input=script.encode(), check=True)
        if name:
            qemu_img("convert", "-O", "qcow2", raw, path)
            qemu_img("snapshot", "-c", name, path)
        else:
            data = raw.read_bytes()[: 1 << 20]
            (tmp_path / "start").write_bytes(data)
            command = f"write -s {tmp_path / 'start'} 0 1M"
            subprocess.run(["qemu-io", "-c", command, path], check=True, capture_output=True)
    chain = open_chain(path)
    now = partitions_of(chain, device="/dev/sdb").partitions
    assert [(row.device, row.table) for row in now] == [("/dev/sdb1", "gpt")]
    before = partitions_of(chain, device="/dev/sdb", snapshot="before").partitions
    assert [row.device for row in before] == ["/dev/sdb1", "/dev/sdb2"]
    assert {row.table for row in before} == {"msdos"}
