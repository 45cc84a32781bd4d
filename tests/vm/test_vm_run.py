"""scripts/vm-run when the virtual machine does not come to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LIMIT = 60  # seconds


def start(place: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """vm-run with its temporary files in `place`, by which its QEMU can be told from others."""
    return subprocess.Popen(
        ["scripts/vm-run", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(place), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # What is started in the background of a script ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def machine_is_running(place: Path) -> bool:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:  # it has just ended
            continue
        if b"/qemu-system-" in words.split(b"\0")[0] and os.fsencode(place) in words:
            return True
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_machine_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    process = start(tmp_path, "--timeout", "2", "true")
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 6
    assert stderr.startswith("vm-run: error: the virtual machine did not start within 2 seconds\n")
    assert not machine_is_running(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_kernel_it_says_what_to_do(tmp_path: Path) -> None:
    process = start(tmp_path, "true", XDG_CACHE_HOME=str(tmp_path))
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 6
    assert "run scripts/setup.sh" in stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_the_machine_goes_with_vm_run(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process = start(tmp_path, "sleep", "infinity")
    try:
        wait_until(lambda: machine_is_running(tmp_path))
        process.send_signal(number)
        assert process.wait(LIMIT) == status
        wait_until(lambda: not machine_is_running(tmp_path))
    finally:
        process.kill()
        process.communicate()
