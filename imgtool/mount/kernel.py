"""What the kernel knows of mounts, processes and block devices, and the calls that change it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from imgtool.errors import HostError
from imgtool.host.libc import libc
from imgtool.host.mountinfo import MountInfo, mounts

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
PATIENCE = 60.0  # seconds until something that should happen at once is given up


def wait_until(done: Callable[[], bool], what: str, limit: float = PATIENCE) -> None:
    """Wait for something that takes a moment. Raises `HostError` past the limit."""
    deadline = time.monotonic() + limit
    pause = 0.001
    while not done():
        if time.monotonic() > deadline:
            raise HostError(f"{what} in {limit:g} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


# Mounts


def mounted_at(target: str) -> MountInfo | None:
    """What is mounted at this very directory, on top."""
    return next((row for row in reversed(mounts()) if row.target == target), None)


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2): no helper program is looked for. Raises `OSError`."""
    words = [os.fsencode(word) for word in (source, target, fstype)]
    if libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data) if data else None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source)


def unmount(target: str, flags: int = 0) -> None:
    """umount(2), which does not follow a link. Raises `OSError`."""
    if libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def filesystem_types() -> set[str]:
    """The filesystems that the kernel has at this moment; others it may load as modules."""
    lines = Path("/proc/filesystems").read_text().splitlines()
    return {line.split("\t")[-1] for line in lines}


# Processes


def end_process(pid: int, *, gently: float = PATIENCE) -> None:
    """Ask a process to end, make it after a while, and wait until it has."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number, limit in ((signal.SIGTERM, gently), (signal.SIGKILL, PATIENCE)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], limit)[0]:
                return
    finally:
        os.close(handle)
    raise HostError("the process does not end", subject=pid)


def await_end(pid: int) -> None:
    """Wait for a process that is about to end by itself; end it if it does not."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if select.select([handle], [], [], PATIENCE)[0]:
            return
    finally:
        os.close(handle)
    end_process(pid)


def _uses(process: Path, device: int, target: str) -> bool:
    for name in ("cwd", "root", "exe"):
        with contextlib.suppress(OSError):
            if (process / name).stat().st_dev == device:
                return True
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if link.stat().st_dev == device:
                    return True
    with contextlib.suppress(OSError):
        maps = os.fsdecode((process / "maps").read_bytes())
        return f" {target}/" in maps
    return False


def _name(process: Path) -> str:
    return f"{(process / 'comm').read_text().strip()} (process {process.name})"


def still_mounted(source: str) -> list[str]:
    """Where a device is mounted besides: directories here, processes with mounts of their own.

    A sandbox or container that started during a mount has a copy of it, which stays there until it
    ends, where the host's mounts are not shared with it.
    """
    found = [row.target for row in mounts() if row.source == source]
    seen = {os.readlink("/proc/self/ns/mnt")}  # noqa: PTH115
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                namespace = os.readlink(process / "ns/mnt")  # noqa: PTH115
                if namespace in seen:
                    continue
                seen.add(namespace)
                if any(row.source == source for row in mounts(process.name)):
                    found.append(f"in a sandbox or container, {_name(process)}")
    return found


def users_of(target: str) -> list[str]:
    """The processes that hold a mounted filesystem, as `NAME (PID)`."""
    try:
        device = os.stat(target).st_dev  # noqa: PTH116
    except OSError:
        return []
    found = []
    own = ("self", str(os.getpid()))
    for process in Path("/proc").iterdir():
        if process.name not in own and process.name.isdigit() and _uses(process, device, target):
            with contextlib.suppress(OSError):
                found.append(_name(process))
    return found
