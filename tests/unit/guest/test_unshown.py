"""Filesystems that fstab names and nobody finds: said, asked for, and never taken for removed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imgtool import cli
from imgtool.errors import RefusedError
from imgtool.mount.mounter import MountRequest

SUMMED = ("--engine", "direct", "--checksum", "sha256")
MIB = 1 << 20
HOME = "11111111-2222-3333-4444-555555555555"
WRONG = "99999999-2222-3333-4444-555555555555"


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        status = int(cli._run([str(word) for word in words]))
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capfd.readouterr()
    return status, out, err


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def disk(folder: Path, fstab: str) -> Path:
    """A guest of two partitions, /home being the second."""
    root = tree(
        folder / "root",
        {
            "etc/os-release": "ID=debian\nPRETTY_NAME=Debian\nVERSION_ID=12.5\n",
            "etc/fstab": fstab,
            "bin/README": "no programs\n",
            "home/README": "not mounted\n",
        },
    )
    home = tree(folder / "home", {"alice/letter": "dear\n"})
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(20 * MIB)
    table = b"start=2048, size=16384\nstart=18432, size=16384\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, check=True)
    for number, (source, words) in enumerate(((root, []), (home, ["-U", HOME]))):
        piece = folder / f"piece{number}"
        with piece.open("wb") as file:
            file.truncate(8 * MIB)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", *words, "-d", source, piece], check=True)
        with disk.open("r+b") as file:
            file.seek((1 + 8 * number) * MIB)
            file.write(piece.read_bytes())
    return disk


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest whose fstab names a filesystem for /home that is not there."""
    return disk(tmp_path_factory.mktemp("bad"), f"UUID={WRONG} /home ext4 defaults 0 2\n")


@pytest.fixture(scope="module")
def good(bad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same guest with its fstab mended."""
    folder = tmp_path_factory.mktemp("good")
    path = folder / "disk.raw"
    content = bad.read_bytes()
    assert content.count(WRONG.encode()) == 1
    path.write_bytes(content.replace(WRONG.encode(), HOME.encode()))
    return path


@pytest.fixture(scope="module")
def optional(bad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest that starts without /home."""
    folder = tmp_path_factory.mktemp("optional")
    return disk(folder, f"UUID={WRONG} /home ext4 defaults,nofail 0 2\n")


@pytest.mark.parametrize("at", ["/home", "/home/alice"])
def test_a_path_in_what_is_not_shown_is_no_empty_folder(bad, capfd, at):
    status, out, err = run(capfd, "ls", bad, at, "--engine", "direct")
    assert (status, out) == (5, "")
    assert f"its filesystem is not shown: UUID={WRONG} is on none of the disks given" in err


def test_what_a_guest_starts_without_is_said_to_who_asks_for_it(optional, capfd):
    status, out, err = run(capfd, "ls", optional, "/home", "--engine", "direct")
    assert (status, out) == (5, "")
    assert f"its filesystem is not shown: UUID={WRONG}" in err
    status, out, err = run(capfd, "ls", optional, "/", "--engine", "direct")
    assert (status, err) == (0, "")
    words = ["--engine", "direct", "-m", "/dev/sda1"]
    assert run(capfd, "ls", optional, "/home", *words)[:2] == (0, "README\n")


def test_guest_to_write_is_said_to_lack_what_it_starts_without(tmp_path):
    said: list[str] = []
    wanted = MountRequest(tmp_path, tmp_path, writable=True, notice=said.append)
    wanted.refuse_hidden({"/mnt": "WHY"}, {"/mnt"})
    assert said == ["/mnt is not shown: WHY; what is written there would lie hidden below it"]
    with pytest.raises(RefusedError, match="WHY"):
        wanted.refuse_hidden({"/mnt": "WHY"}, {"/srv"})


def test_what_the_warning_says_to_type_shows_it(bad, capfd):
    _, _, err = run(capfd, "ls", bad, "/", "--engine", "direct")
    (line,) = [line for line in err.splitlines() if "say what is where: " in line]
    words = line.partition("say what is where: ")[2].split()
    assert words == ["-m", "/dev/sda1", "-m", "/dev/sda2:/home"]
    assert run(capfd, "ls", bad, "/home", "--engine", "direct", *words)[:2] == (
        0,
        "alice\nlost+found\n",
    )
    words = ["-m", "/dev/sda1"]
    assert run(capfd, "ls", bad, "/home", "--engine", "direct", *words)[:2] == (0, "README\n")


@pytest.mark.parametrize("command", ["df", "filesystems", "inspect", "cat", "copy-out"])
def test_every_command_says_what_is_not_shown_once(bad, tmp_path, capfd, command):
    more = {"cat": ["/etc/fstab"], "copy-out": ["/etc", tmp_path]}.get(command, [])
    status, _, err = run(capfd, command, bad, *more, "--engine", "direct")
    assert status == 0
    assert err.count("/home is not shown") == 1


@pytest.mark.parametrize("mended", [True, False])
def test_part_that_one_side_hides_was_not_added_nor_removed(bad, good, capfd, mended):
    sides = (bad, good) if mended else (good, bad)
    status, out, err = run(capfd, "diff", *sides, "--engine", "direct", "--checksum", "sha256")
    assert status == 1
    assert "alice" not in out and "README" not in out
    assert "/etc/fstab" in out
    assert err.count("not compared: ") == 1


def test_a_part_that_one_side_does_not_show_is_not_compared(bad, good, capfd):
    status, out, err = run(capfd, "diff", good, bad, "--path", "/home/alice", "--engine", "direct")
    assert (status, out) == (1, "")
    assert err.count("not compared: ") == 1


def test_what_neither_side_shows_is_said_and_the_rest_compared(bad, capfd):
    status, out, err = run(capfd, "diff", bad, bad, "--engine", "direct")
    assert (status, out) == (0, "")
    assert "/home is not shown" in err


def test_unrelated_part_is_compared_in_silence(bad, good, capfd):
    status, out, err = run(capfd, "diff", good, bad, "--path", "/etc", *SUMMED)
    assert status == 0
    assert "/etc/fstab" in out
    assert "not compared" not in err
