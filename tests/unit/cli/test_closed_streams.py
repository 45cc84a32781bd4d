"""Standard streams that are closed: what is asked for is done, or one line says why not."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").write_bytes(b"what is in it\n")
    with path.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "root", path], check=True)
    return path


def shell(closed: str, *words: object) -> subprocess.CompletedProcess[bytes]:
    line = shlex.join([sys.executable, "-m", "imgtool", *map(str, words)])
    return subprocess.run(["sh", "-c", f"{line} {closed}"], capture_output=True, check=False)


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- 2>&-"])
def test_what_is_asked_for_goes_to_the_streams_that_are_open(image, closed):
    done = shell(closed, "cat", image, "/file", "--format", "raw")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"what is in it\n", b"")


@pytest.mark.parametrize(
    "words",
    [
        ("cat", "IMAGE", "/file"),
        ("ls", "IMAGE", "/"),
        ("copy-out", "IMAGE", "/", "-"),
        ("--version",),
    ],
)
@pytest.mark.parametrize("closed", [">&-", "<&- >&-"])
def test_answer_that_cannot_be_written_is_an_error_of_one_line(image, words, closed):
    done = shell(closed, *[image if word == "IMAGE" else word for word in words])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == b"imgtool: error: the answer cannot be written: stdout is closed"


def test_no_arguments_and_no_stdout_is_no_traceback():
    done = shell(">&-")
    assert b"Traceback" not in done.stderr
    assert done.returncode in (1, 2)


def test_what_writes_no_answer_needs_no_stdout(image, tmp_path):
    done = shell(">&-", "copy-out", image, "/file", tmp_path / "out", "--format", "raw")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out").read_bytes() == b"what is in it\n"
