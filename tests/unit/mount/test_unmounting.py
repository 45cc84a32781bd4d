"""Mounts of the tests themselves: waited for, never left behind, and no failure is hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgtool.host.mountinfo import mounts
from tests.unmounting import unmount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
_IN_IT = "import sys, time; print(flush=True); time.sleep(float(sys.argv[1]))"


@contextmanager
def _in_use(place: Path, seconds: float) -> Iterator[None]:
    argv = [sys.executable, "-c", _IN_IT, str(seconds)]
    with subprocess.Popen(argv, cwd=place, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    return tmp_path


def _is_mounted(place: Path) -> bool:
    return any(row.target == str(place) for row in mounts())


def test_a_mount_that_is_in_use_for_a_moment_is_waited_for(place: Path) -> None:
    with _in_use(place, 0.5):
        unmount(place)
    assert not _is_mounted(place)


def test_a_mount_that_stays_in_use_fails_the_test_and_is_gone(place: Path) -> None:
    with _in_use(place, 60), pytest.raises(AssertionError, match=r"in use by .*python"):
        unmount(place, limit=0.2)
    assert not _is_mounted(place)


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs FUSE and ntfs-3g")
def test_program_behind_a_mount_has_ended_once_unmounted(tmp_path: Path) -> None:
    image, place = tmp_path / "ntfs.img", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkntfs", "-q", "-Q", "-F", image], check=True, capture_output=True)
    subprocess.run(["ntfs-3g", image, place], check=True)
    (place / "file").write_bytes(os.urandom(4 << 20))
    unmount(place)
    found = subprocess.run(["pgrep", "-f", str(place)], capture_output=True)
    assert found.stdout == b"" and not _is_mounted(place)
