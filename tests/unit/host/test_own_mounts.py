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
    (folder / "journal.json").write_text(json.dumps({"mountpoint": "/mnt/disk"}))
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
    assert served_mount(_start(start, str(folder))) == "/mnt/disk"
    assert served_mount(_start(start, f"--pid-file={folder}/nbd0.pid")) == "/mnt/disk"


def test_a_process_is_known_by_the_one_that_started_it(folder, start):
    process = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait", str(folder)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    try:
        assert served_mount(pid) == "/mnt/disk"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"mountpoint": 5}', "not json"])
def test_no_journal_is_no_mount(folder, start, content):
    (folder / "journal.json").write_text(content)
    assert served_mount(_start(start, str(folder))) is None


def test_other_processes_serve_none(tmp_path, start):
    assert served_mount(_start(start, str(tmp_path), "--pid-file=/nowhere/imgtool/x")) is None
    assert served_mount(os.getpid()) is None
    assert served_mount(1 << 22) is None
