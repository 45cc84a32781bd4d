"""Temporary folders: gone with the block, and found where an imgtool was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from imgtool.host import scratch
from imgtool.host.scratch import goes_with, remove_left_behind, scratch_folder


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are; none is too new to be looked at."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_NEW", -1.0)
    return tmp_path


def killed(top: Path) -> Path:
    """The folder of a process that was killed with it."""
    code = """
import sys, time
from imgtool.host.scratch import scratch_folder
with scratch_folder("test") as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    time.sleep(60)
"""
    words = [sys.executable, "-c", code]
    env = {**os.environ, "TMPDIR": str(top)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert (folder / "file").exists()
        assert folder not in remove_left_behind()  # it is in use
        process.send_signal(signal.SIGKILL)
    return folder


def test_it_goes_with_the_block_and_is_for_its_owner_alone(top):
    with scratch_folder("test") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder not in remove_left_behind()
        assert folder.exists()
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_and_nothing_else(top):
    folder = killed(top)
    others = [top / "imgtool-edit-kept", top / "imgtool-x-link", top / "libguestfsOTHER"]
    others[0].write_text("kept")
    others[1].symlink_to(top / "libguestfsOTHER")
    others[2].mkdir()
    assert folder in remove_left_behind()
    assert not folder.exists()
    assert all(os.path.lexists(other) for other in others)


def test_new_folder_is_left_to_whoever_made_it(top, monkeypatch):
    folder = killed(top)
    monkeypatch.setattr(scratch, "_NEW", 10.0)
    assert folder not in remove_left_behind()
    assert folder.exists()


@pytest.mark.parametrize("name", ["libguestfsAbC123", "precious"])
def test_killed_appliances_sockets_go_and_other_files_stay(top, name):
    folder, other = killed(top), top / name
    other.mkdir()
    goes_with(folder, str(other))
    assert folder in remove_left_behind()
    assert other.exists() == (name == "precious")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a folder another user's")
def test_a_note_of_one_user_removes_nothing_of_another(top):
    folder, other = killed(top), top / "libguestfsAbC123"
    other.mkdir()
    goes_with(folder, str(other))
    os.chown(folder, 12345, -1)
    assert folder in remove_left_behind()
    assert other.exists()
