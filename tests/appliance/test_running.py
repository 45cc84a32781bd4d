"""Commands as processes of their own: interrupted, side by side, on snapshots, without KVM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import guests
from tests.support.guests import guest

pytestmark = pytest.mark.appliance
IMGTOOL = [sys.executable, "-m", "imgtool"]


def descendants(pid: int) -> set[int]:
    """Every process below one, by their parents."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
        except OSError:
            continue  # it ended meanwhile
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        above = waiting.pop()
        below = {child for child, parent in parents.items() if parent == above} - found
        found |= below
        waiting += below
    return found


def running_qemu(pid: int) -> int | None:
    for child in descendants(pid):
        try:
            if "qemu-system" in Path(f"/proc/{child}/cmdline").read_text():
                return child
        except OSError:
            continue
    return None


def test_ctrl_c_while_the_appliance_starts_leaves_nothing(tmp_path):
    # libguestfs keeps its appliance where it always does.
    environment = {**os.environ, "TMPDIR": str(tmp_path), "LIBGUESTFS_CACHEDIR": "/var/tmp"}
    process = subprocess.Popen(
        [*IMGTOOL, "ls", "--engine", "libguestfs", guest("lvm"), "-R", "/"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while (qemu := running_qemu(process.pid)) is None:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == b""
    assert err.decode().splitlines()[-1] == "imgtool: error: interrupted"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{qemu}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{qemu}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break  # dead, and nobody's child here
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{qemu}").exists()
    assert list(tmp_path.iterdir()) == []


def test_images_side_by_side_are_rows_in_the_order_given(tmp_path):
    noise = tmp_path / "noise.img"
    noise.write_bytes(os.urandom(1 << 20))
    images = [guest("data"), noise, guest("plain")]
    done = subprocess.run(
        [*IMGTOOL, "df", "--engine", "libguestfs", *images, "-P", "2", "-o", "json"],
        capture_output=True,
        check=False,
    )
    rows = json.loads(done.stdout)
    assert [row["image"] for row in rows] == [str(image) for image in images]
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert done.returncode == 3  # the status of the only failure
    assert str(noise) in done.stderr.decode()


def test_a_snapshot_shows_the_guest_as_it_was(tmp_path):
    image = tmp_path / "disk.qcow2"
    base = guest("data")
    qemu_img = ["qemu-img"]
    subprocess.run([*qemu_img, "convert", "-O", "qcow2", base, image], check=True)
    subprocess.run([*qemu_img, "snapshot", "-c", "before", image], check=True)
    new = tmp_path / "readme.txt"
    new.write_bytes(b"written after the snapshot\n")
    subprocess.run([*IMGTOOL, "copy-in", image, new, "/"], check=True, capture_output=True)
    listed = image.read_bytes()

    def cat(*options: str) -> bytes:
        words = [*IMGTOOL, "cat", "--engine", "libguestfs", image, "/readme.txt", *options]
        return subprocess.run(words, check=True, capture_output=True).stdout

    assert cat() == new.read_bytes()
    assert cat("--snapshot", "before") == guests.DATA_FILES["/readme.txt"]
    assert image.read_bytes() == listed


def test_a_kvm_that_does_not_work_is_said_once_and_remembered(tmp_path):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("this machine offers no /dev/kvm, so nothing is tried before emulation")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LIBGUESTFS")}
    environment["XDG_CACHE_HOME"] = str(tmp_path)

    def run() -> subprocess.CompletedProcess[bytes]:
        words: list[str | Path] = [
            *IMGTOOL,
            "cat",
            "--engine",
            "libguestfs",
            guest("data"),
            "/readme.txt",
        ]
        return subprocess.run(words, env=environment, check=True, capture_output=True)

    first, second = run(), run()
    assert first.stdout == second.stdout == guests.DATA_FILES["/readme.txt"]
    outcome = json.loads((tmp_path / "imgtool/acceleration.json").read_text())["outcome"]
    said = b"KVM does not work on this machine" in first.stderr
    assert said == (outcome == "tcg")
    assert b"KVM" not in second.stderr


def test_a_progress_bar_stands_on_a_terminal_alone(tmp_path):
    path = next(path for path in guests.DATA_FILES if path.endswith("cat.raw"))
    words: list[str | Path] = [*IMGTOOL, "copy-out", "--engine", "libguestfs", guest("data"), path]
    terminal = subprocess.run(
        ["script", "-qec", " ".join(map(str, [*words, tmp_path / "a"])), "/dev/null"],
        capture_output=True,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    assert b"\x1b[" in terminal.stdout  # what the bar moves the cursor with
    pipe = subprocess.run([*words, tmp_path / "b"], capture_output=True, check=True)
    assert pipe.stdout == pipe.stderr == b""
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
