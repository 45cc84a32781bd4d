"""Encrypted disks without a key: said, never passed over."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imgtool.cli.command_table import app_with
from imgtool.errors import NotInGuestError
from imgtool.guest.blocks import Block, locked_devices


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with one partition, which is encrypted."""
    folder = tmp_path_factory.mktemp("locked")
    path, disk = folder / "piece", folder / "disk.raw"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    words = ["/usr/sbin/cryptsetup", "luksFormat", "--batch-mode", "--type=luks1"]
    words += ["--pbkdf-force-iterations=1000", "--key-file=-", str(path)]
    subprocess.run(words, input=b"secret", check=True)
    disk.write_bytes(bytes(1 << 20) + path.read_bytes() + bytes(1 << 20))
    words = ["/usr/sbin/sfdisk", "--quiet", "--no-reread", str(disk)]
    subprocess.run(words, input=b"start=2048, size=16384\n", check=True)
    return disk


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        app_with(str(words[0]))([str(word) for word in words], standalone_mode=False)
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_df_has_a_row_for_what_no_key_opened(disk, capfd):
    status, out, err = run(capfd, "df", disk, "--engine", "direct", "-o", "csv")
    assert status == 1
    assert "crypto_LUKS" in out and "no key was given that fits" in out
    assert "/dev/sda1" in err


def test_inspect_says_that_it_is_encrypted(disk, capfd):
    with pytest.raises(NotInGuestError, match="in /dev/sda1 is encrypted") as caught:
        app_with("inspect")(["inspect", str(disk), "--engine", "direct"], standalone_mode=False)
    assert "--key /dev/sda1:file:FILE" in str(caught.value.hint)


def test_what_a_key_opened_is_not_locked():
    closed = Block(device="/dev/sda1", kind="partition", size=1, type="crypto_LUKS")
    inside = Block(device="/dev/mapper/x", kind="mapped", size=1, parents=("/dev/sda1",))
    assert locked_devices([closed]) == ("/dev/sda1",)
    assert locked_devices([closed, inside]) == ()
