"""A guest whose /boot is open and whose root is locked: /boot is not taken for the guest."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.appliance.test_writing import content, imgtool

pytestmark = pytest.mark.appliance
MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two partitions: /boot, and a root that is encrypted."""
    folder = tmp_path_factory.mktemp("locked")
    boot, root, disk = folder / "boot", folder / "root", folder / "guest.raw"
    (folder / "tree/grub").mkdir(parents=True)
    (folder / "tree/vmlinuz-6.1.0").write_bytes(b"kernel")
    (folder / "tree/grub/grub.cfg").write_text("set default=0\n")
    words: list[str | Path] = ["mke2fs", "-q", "-t", "ext4", "-d", folder / "tree", boot, "16M"]
    subprocess.run(words, check=True, capture_output=True)
    root.write_bytes(bytes(32 * MIB))
    words = ["cryptsetup", "luksFormat", "-q", "--type=luks2", "--pbkdf=pbkdf2"]
    words += ["--pbkdf-force-iterations=1000", root]
    subprocess.run(words, input=b"secret", check=True)
    disk.write_bytes(bytes(MIB) + boot.read_bytes() + root.read_bytes() + bytes(MIB))
    table = b"start=2048, size=32768\nstart=34816, size=65536\n"
    subprocess.run(["sfdisk", "--quiet", "--no-reread", disk], input=table, check=True)
    for piece in (boot, root):
        piece.unlink()
    return disk


def test_boot_of_a_guest_with_locked_root_is_not_written_to(disk, tmp_path):
    file, empty = tmp_path / "motd", tmp_path / "empty"
    file.write_text("hello\n")
    empty.mkdir()
    before = content(disk), sorted(disk.parent.rglob("*"))
    for words in (
        ("copy-in", disk, file, "/etc/motd"),
        ("edit", disk, "/grub/grub.cfg", "-e", "s/0/1/"),
        ("inject", disk, "--hostname", "new"),
        ("mount", "--rw", disk, empty),
    ):
        done = imgtool(*words)
        assert done.status == 5, (words, done)
        assert "encrypted" in done.err and "/dev/sda2" in done.err, words
        assert "--key /dev/sda2:file:FILE" in done.err, words
        assert (content(disk), sorted(disk.parent.rglob("*"))) == before, words


def test_what_the_refusal_says_to_type_writes_there_alone(disk, tmp_path):
    file = tmp_path / "motd"
    file.write_text("hello\n")
    refused = imgtool("copy-in", disk, file, "/motd")
    chosen = re.findall(r"-m (/dev/\S+?)(?=[,;\s]|$)", refused.err)
    assert chosen == ["/dev/sda1"], refused.err
    done = imgtool("copy-in", disk, file, "/motd", "-m", chosen[0])
    assert done.status == 0, done.err
    assert imgtool("cat", disk, "/motd", "-m", "/dev/sda1").out == b"hello\n"
