"""What is said of damaged filesystems is followed to the letter: it helps, and harms nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.appliance.test_writing import content, image, imgtool

__all__ = ["image"]  # the fixture
pytestmark = pytest.mark.appliance


def test_a_filesystem_with_errors_is_mended_in_a_copy(image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["debugfs", "-w", "-R", "ssv state 2", image], check=True, capture_output=True)
    before = content(image)
    edit = ("edit", "/etc/real.conf", "-e", "s/22/23/")
    done = imgtool(edit[0], image, *edit[1:])
    assert done.status == 4 and "--force damaged" in done.err
    step = re.search(r"(cp IMAGE COPY), then (guestfish .*forceall:true);", done.err)
    assert step is not None
    environment = {**os.environ, "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    for command in (step[1].replace("IMAGE", str(image)), step[2]):
        subprocess.run(command, shell=True, check=True, env=environment, capture_output=True)
    assert content(image) == before
    assert imgtool(edit[0], "COPY", *edit[1:]).status == 0
    assert b"Port 23" in imgtool("cat", "COPY", "/etc/real.conf").out
    forced = imgtool(edit[0], image, *edit[1:], "--force", "damaged")
    assert forced.status == 0, forced.err
    assert b"Port 23" in imgtool("cat", image, "/etc/real.conf", "-m", "/dev/sda:/:noload").out


def test_unmountable_filesystem_is_read_as_far_as_it_can_be(image: Path):
    with image.open("r+b") as file:  # the descriptors of its groups, behind the superblock
        file.seek(2048)
        file.write(b"\xff" * 2048)
    before = content(image)
    done = imgtool("cat", image, "/etc/real.conf")
    assert done.status == 5
    assert "no filesystem can be mounted" in done.err and "finds it damaged" in done.err
    assert "wrong fs type" not in done.err and "exited with status" not in done.err
    choices = re.findall(r"-m (\S+?)(?:,? or|\n|$)", done.err)
    assert "/dev/sda:/:noload" in choices
    answers = [imgtool("cat", image, "/etc/real.conf", "-m", choice) for choice in choices]
    assert b"Port 22\n\xff\n" in [answer.out for answer in answers if answer.status == 0]
    assert content(image) == before


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A guest whose fstab has a filesystem for /home that is on none of its disks."""
    tree = tmp_path / "guest"
    for folder in ("etc", "home", "srv"):
        (tree / folder).mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=debian\n")
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    lines = "/dev/sda / ext4 defaults 0 1\nUUID=0000-dead /home ext4 defaults 0 2\n"
    (tree / "etc/fstab").write_text(lines)
    path = tmp_path / "half.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, path, "16M"], check=True)
    return path


def test_mount_point_hides_no_write(half: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("text")
    before = content(half)
    done = imgtool("copy-in", half, file, "/home")
    assert done.status == 4 and "would lie hidden" in done.err
    assert re.findall(r"--force ([a-z-]+)", done.err) == ["hidden-mount"]
    assert content(half) == before
    assert imgtool("copy-in", half, file, "/srv").status == 0
    assert imgtool("copy-in", half, file, "/home", "--force", "hidden-mount").status == 0
    assert imgtool("cat", half, "/home/file", "-m", "/dev/sda").out == b"text"


MISSING = "0000-dead"
HOME = "11111111-2222-3333-4444-555555555555"


def test_fstab_edit_that_shows_more_adds_nothing_in_a_dry_run(half, tmp_path):
    tree, home = tmp_path / "home", tmp_path / "home.raw"
    (tree / "alice").mkdir(parents=True)
    (tree / "alice/letter").write_text("dear\n")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-U", HOME, "-d", tree, home, "16M"], check=True)
    before = content(half), content(home)
    words = ("edit", half, "-A", home, "/etc/fstab", "-e", f"s/{MISSING}/{HOME}/")
    done = imgtool(*words, "--dry-run")
    assert done.status == 1, done.err
    assert done.err.count("/home is not shown") == 1
    (shown,) = done.text.splitlines()
    assert shown.startswith("changed") and "/etc/fstab" in shown
    assert re.findall("not compared: .*", done.err) == [
        f"not compared: UUID={MISSING} is on none of the disks given (/home)"
    ]
    assert (content(half), content(home)) == before
    done = imgtool(*words)
    assert done.status == 0, done.err
    assert (
        done.err.count("/home is not shown") == 1
    )  # by the one that reads and the one that writes
    assert imgtool("cat", half, "-A", home, "/home/alice/letter").out == b"dear\n"
