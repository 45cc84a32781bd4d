"""Commands that continue a saved appliance answer as those do that start one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.guests import disks, guest

pytestmark = pytest.mark.appliance


def imgtool(*words: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imgtool", *words],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def continued(*words: str | Path, cache: Path) -> str:
    """What a command says that goes on with the saved appliance."""
    done = imgtool(*words, "-v", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "appliance: launched (saved)" in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache with appliances saved for one disk and for two."""
    folder = tmp_path_factory.mktemp("cache")
    imgtool("doctor", "--launch", cache=folder)  # finds out whether KVM works
    for number in ("1", "2"):
        done = imgtool("appliance", "save", "--disks", number, cache=folder)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    listed = json.loads(imgtool("appliance", "list", "-o", "json", cache=folder).stdout)
    assert [(row["disks"], row["state"]) for row in listed] == [(1, "fresh"), (2, "fresh")]
    return folder


@pytest.fixture(autouse=True)
def _emulated(cache) -> None:
    note = cache / "imgtool/acceleration.json"
    if Path("/dev/kvm").exists() and json.loads(note.read_text())["outcome"] == "kvm":
        pytest.skip("KVM works here: an appliance starts in a moment and none is saved")


def test_saved_appliance_lists_what_the_guest_has(cache):
    image = guest("lvm")
    said = continued("df", "--engine", "libguestfs", image, cache=cache)
    assert said == imgtool("df", "--engine", "direct", image, cache=cache).stdout
    assert "/dev/debian-vg/home" in said


def test_raid_over_two_disks_is_put_together(cache):
    first, second = disks("md")
    said = continued("ls", first, "-A", second, "/", cache=cache)
    assert "etc" in said.split()


def test_what_is_written_has_the_time_of_now(cache, tmp_path):
    image = tmp_path / "disk.qcow2"
    shutil.copy(guest("data"), image)
    (tmp_path / "new").write_text("content\n")
    before = datetime.now(UTC)
    continued("copy-in", image, tmp_path / "new", "/photos", cache=cache)
    assert imgtool("cat", image, "/photos/new", cache=cache).stdout == "content\n"
    rows = json.loads(imgtool("ls", "-l", "-o", "json", image, "/", cache=cache).stdout)
    changed = next(row["mtime"] for row in rows if row["path"].endswith("photos"))
    # The appliance's clock is set to the millisecond; the host's may be read a little earlier.
    assert before - timedelta(seconds=1) < datetime.fromisoformat(changed) < datetime.now(UTC)


def test_one_that_does_not_continue_is_left_for_one_that_starts(cache, tmp_path):
    broken = tmp_path / "cache"
    shutil.copytree(cache, broken)
    state = broken / "imgtool/appliance/1/state"
    os.truncate(state, state.stat().st_size // 2)
    done = imgtool("ls", "--engine", "libguestfs", guest("lvm"), "/boot", cache=broken)
    assert done.returncode == 0
    assert "vmlinuz-6.1.0-test" in done.stdout
    assert "does not continue" in done.stderr


def test_removed_it_is_gone(cache, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    assert imgtool("appliance", "remove", cache=copy).returncode == 0
    assert not (copy / "imgtool/appliance").exists()
