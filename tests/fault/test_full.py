"""No room left, on the host or in the guest, in the middle of a write: nothing has happened."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.runs import RUNS, imgtool, make, manifest, prepare, sound
from tests.support.chain_work import left_over
from tests.support.room import fill, small_disk

pytestmark = pytest.mark.appliance


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared") / "disk")


def facts(path: Path) -> tuple[str, int]:
    """What an image file holds, and when it was changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small tmpfs")
_MIB = 1 << 20


@needs_root
@pytest.mark.parametrize(("name", "kind"), [("copy-in", "raw"), ("edit", "qcow2")])
def test_a_host_without_room_is_said_and_the_image_is_as_it_was(name, kind, disk, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(20 * _MIB))
    with small_disk(tmp_path / "small", 100) as small:
        image = make(disk, kind, small / "images")
        words: tuple[str | Path, ...] = ("copy-in", image, large, "/srv")
        if name == "edit":
            words = ("edit", image, "/srv/large", "-e", "s/line/" + "a longer line " * 6 + "/")
        taken = fill(small, 6 * _MIB)
        before = facts(image)
        done = imgtool(*words)
        assert done.stderr.startswith(
            "imgtool: error: the host has no room left for what is written\n  hint: make room; "
        )
        assert done.returncode == 6
        assert facts(image) == before
        assert left_over(image.parent) == []
        taken.unlink()
        done = imgtool(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert left_over(image.parent) == []


@needs_root
def test_an_image_that_cannot_grow_is_not_begun_to_be_written(disk, tmp_path):
    with small_disk(tmp_path / "small", 100) as small:
        image = make(disk, "raw", small / "images")
        taken = fill(small, 4 * _MIB)
        before = facts(image)
        words = (*RUNS["copy-in"].words(image, disk.parent), "--tmp-dir", tmp_path)
        done = imgtool(*words)
        assert (done.returncode, "no room for what is written" in done.stderr) == (6, True)
        assert facts(image) == before
        assert left_over(image.parent) + left_over(tmp_path) == []
        taken.unlink()
        assert imgtool(*words).returncode == 0


# As if somebody else took the room once it had been looked for.
_TAKEN = """
import imgtool.image.change.transaction as transaction
from imgtool.cli import main
transaction.need_space = lambda folder, needed: None
main()
"""


@needs_root
def test_image_that_cannot_grow_is_read_through_the_overlay(disk, tmp_path):
    with small_disk(tmp_path / "small", 100) as small:
        image = make(disk, "raw", small / "images")
        taken = fill(small, 4 * _MIB)
        words = (*RUNS["copy-in"].words(image, disk.parent), "--tmp-dir", tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", _TAKEN, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 6
        assert "make room on the file system of the image" in done.stderr
        new = manifest(image)
        assert imgtool("ls", image, "/srv/tree/d1").stdout.split()[0] == "1"
        assert imgtool("recover", image).returncode == 6  # there is still no room
        assert manifest(image) == new
        taken.unlink()
        done = imgtool("recover", image)
        assert (done.returncode, "finished" in done.stderr) == (0, True)
        assert left_over(image.parent) + left_over(tmp_path) == []
        assert manifest(image) == new
        sound(image, "raw", tmp_path)


def test_guest_without_room_is_said_and_the_image_stays(disk, tmp_path):
    image = make(disk, "qcow2", tmp_path / "images")
    old, before = manifest(image), facts(image)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(60 << 20))
    spec = tmp_path / "spec.yaml"
    spec.write_text("steps:\n  - hostname: new\n  - copy: {source: large, path: /srv/more}\n")
    for words in (
        ("copy-in", image, large, "/srv"),
        ("edit", image, "/srv/large", "-e", "s/line/" + "a much longer line " * 12 + "/"),
        ("inject", image, spec),
    ):
        done = imgtool(*words)
        assert done.returncode not in (0, 2), words
        assert "no space left" in done.stderr.lower()
        assert "internal error" not in done.stderr
        assert manifest(image) == old
        assert facts(image) == before
        assert left_over(image.parent) == []
