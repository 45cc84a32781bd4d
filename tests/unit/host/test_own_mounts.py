"""Processes that serve a mount of imgtool's are known as such."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool.host.own_mounts import served_mount


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "imgtool/4711"
    folder.mkdir(parents=True)
    (folder / "journal.json").write_text(json.dumps({"mountpoint": "/"}))
    return folder


@pytest.fixture
def start() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def _start(started: list[subprocess.Popen[bytes]], *words: str) -> int:
    code = "import sys; print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    started.append(process)
    return process.pid


def test_the_folder_of_a_journal_is_found_among_the_words(folder, start):
    assert served_mount(_start(start, str(folder))) == "/"
    assert served_mount(_start(start, f"--pid-file={folder}/nbd0.pid")) == "/"


def test_a_process_is_known_by_the_one_that_started_it(folder, start):
    process = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait", str(folder)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    try:
        assert served_mount(pid) == "/"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


_NOT_MOUNTED = '{"mountpoint": "/nothing/is/here"}'


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"mountpoint": 5}', "not json", "[" * 100000, _NOT_MOUNTED]
)
def test_no_journal_is_no_mount(folder, start, content):
    (folder / "journal.json").write_text(content)
    assert served_mount(_start(start, str(folder))) is None


def test_a_journal_that_is_no_file_of_ours_is_not_read(folder, start):
    """It could be a pipe that nobody writes to, or lead to a device."""
    pid = _start(start, str(folder))
    journal = folder / "journal.json"
    journal.rename(folder / "other")
    os.mkfifo(journal)
    assert served_mount(pid) is None
    journal.unlink()
    journal.symlink_to("other")
    assert served_mount(pid) is None
    journal.unlink()
    (folder / "other").rename(journal)
    os.chown(journal, 12345, 12345)
    assert served_mount(pid) is None


def test_other_processes_serve_none(tmp_path, start):
    assert served_mount(_start(start, str(tmp_path), "--pid-file=/nowhere/imgtool/x")) is None
    assert served_mount(os.getpid()) is None
    assert served_mount(1 << 22) is None
