"""Small things that tests in the virtual machine need."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MIB = 1 << 20


def run(*words: str | Path) -> str:
    """What the program prints; a failure shows what it complained about."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def settle() -> None:
    """Wait until udev has done with what happened.

    Asked again when udev, busy, closes the connection: nothing was answered then.
    """
    for _ in range(5):
        words = ["udevadm", "settle"]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            return
        assert "Broken pipe" in done.stderr, done.stderr
    raise AssertionError(f"udev closed the connection five times: {done.stderr}")


def wait_until(condition: Callable[[], object], what: str, limit: float = 60) -> None:
    """Until it holds; emulated, everything takes its time."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit:g} seconds: {what}"
        time.sleep(0.1)


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def partition(disk: Path, table: str, *sizes: str) -> None:
    """Write a partition table (`gpt` or `dos`): Linux partitions of these sizes, as in sfdisk."""
    script = f"label: {table}\n" + "".join(f"size={size}, type=L\n" for size in sizes)
    subprocess.run(["sfdisk", "--quiet", disk], input=script, text=True, check=True)


@contextlib.contextmanager
def mounted(source: str | Path, folder: Path, *options: str) -> Iterator[Path]:
    """The filesystem at `folder`, which is made."""
    folder.mkdir()
    run("mount", *options, source, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextlib.contextmanager
def loop_device(image: Path, *options: str) -> Iterator[str]:
    """A loop device for the image."""
    device = run("losetup", "--find", "--show", *options, image).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def nbd_device(image: Path, *options: str, device: str = "/dev/nbd0") -> Iterator[str]:
    """The image as a device of the kernel's, served by qemu-nbd."""
    size = Path("/sys/block", Path(device).name, "size")
    run("modprobe", "nbd")
    run("qemu-nbd", *options, f"--connect={device}", image)
    try:
        wait_until(lambda: size.read_text().strip() != "0", f"{device} has a size")
        settle()
        yield device
    finally:
        run("qemu-nbd", "--disconnect", device)
        # The kernel lets go a moment later, and fails what udev still reads.
        wait_until(lambda: not size.with_name("pid").exists(), f"{device} is free")
        settle()
