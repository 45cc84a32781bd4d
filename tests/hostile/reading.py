"""Read a hostile image in every way, and say how that ended."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from imgtool import open_guest
from imgtool.errors import ImageError, ImgtoolError
from imgtool.guest.guest import Guest
from imgtool.guest.model import Entry, Mount
from imgtool.transfer.copy_out import Report, copy_out
from tests.hostile.mutations import Mutant

LIMIT = 30  # seconds for all that is asked of one image
MEMORY = 1 << 30  # bytes, of each process that reads it
# More than this in one image is sparse files: to read their zeros would only take time.
_MOST_BYTES = 256 << 20


class TooLong(Exception):
    """The limit on time has passed."""


class Outcome(NamedTuple):
    """How it ended (`read`, `damaged` or `refused`), what is wrong, and what it took."""

    how: str
    defects: tuple[str, ...]
    seconds: float
    memory: int
    entries: dict[bytes, Entry] | None
    reason: str = ""


class _Memory:
    """The largest memory that a process below this one has had, of those that are started from now
    on: an appliance that other tests keep open is larger than any of them."""

    def __init__(self) -> None:
        self.largest = 0
        self._older = set(_processes_below())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.look()

    def look(self) -> None:
        for process in _processes_below():
            if process in self._older:
                continue
            with contextlib.suppress(OSError):  # it has ended
                for line in Path(f"/proc/{process}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        self.largest = max(self.largest, int(line.split()[1]) << 10)


def _processes_below() -> Iterator[int]:
    """The ids of all processes that this one, or one below it, has started."""
    waiting = [os.getpid()]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended
            for task in os.listdir(f"/proc/{process}/task"):
                children = Path(f"/proc/{process}/task/{task}/children").read_text()
                waiting += [int(child) for child in children.split()]
        if process != os.getpid():
            yield process


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state_of(folder: Path, *, without: Path | None = None) -> dict[str, object]:
    """All that could change in a folder."""
    found: dict[str, object] = {}
    for directory, folders, files in os.walk(folder):
        if without is not None and without.name in folders and Path(directory) == folder:
            folders.remove(without.name)
        for name in [*folders, *files]:
            path = Path(directory, name)
            status = path.lstat()
            known: list[object] = [status.st_mode, status.st_uid, status.st_gid, status.st_nlink]
            if stat.S_ISREG(status.st_mode):
                known += [status.st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()]
            found[str(path)] = known
    return found


def read(mutant: Mutant, scratch: Path) -> Outcome:
    """Everything that can be asked of a guest, in an order that the number decides."""
    image, out, outside = (scratch / name for name in ("image", "out", "outside"))
    scratch.mkdir()
    out.mkdir()
    outside.mkdir()
    (outside / "canary").write_bytes(b"alive")
    (scratch / "canary").write_bytes(b"alive")
    image.write_bytes(mutant.content)
    os.utime(image, ns=(10**18, 10**18))
    before = state_of(scratch, without=out)
    defects: list[str] = []
    problems: list[str] = []
    seen: dict[bytes, Entry] = {}
    started = time.monotonic()
    how, reason = "read", ""
    with _Memory() as memory:
        try:
            # Two filesystems and no operating system: discovery ends there, a given layout reads.
            disk = mutant.seed.name in ("mbr", "gpt") and mutant.number % 2
            mounts = [Mount("/dev/sda1", "/")] if disk else []
            with (
                _limited(),
                open_guest(
                    image, format=mutant.seed.format, mounts=mounts, engine="direct"
                ) as guest,
            ):
                steps = [_layout, _walk, _usage, _devices, _copy]
                turn = mutant.number // 15 % len(steps)
                for step in steps[turn:] + steps[:turn]:
                    try:
                        step(guest, out, seen, problems)
                    except ImageError:
                        raise  # a refusal holds for all that would follow
                    except ImgtoolError as error:
                        problems.append(str(error))
                memory.look()
        except ImgtoolError as error:
            how, reason = "refused", str(error)
        except TooLong:
            how = "refused"
            defects.append("it takes too long")
        except Exception as error:  # noqa: BLE001 - what else comes out is what is looked for
            how = "refused"
            defects.append(f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - started
    if how == "read" and problems:
        how = "damaged"
    defects += [line for line in (*problems, reason) if "worker failed" in line]
    if memory.largest > MEMORY:
        defects.append(f"{memory.largest >> 20} MiB of memory")
    if state_of(scratch, without=out) != before:
        defects.append("something outside the destination has changed")
    return Outcome(
        how, tuple(defects), seconds, memory.largest, seen if how == "read" else None, reason
    )


def _layout(guest: Guest, out: Path, seen: dict[bytes, Entry], problems: list[str]) -> None:
    if not guest.layout.mounts:
        problems.append("nothing is mounted")


def _walk(guest: Guest, out: Path, seen: dict[bytes, Entry], problems: list[str]) -> None:
    def problem(path: bytes, line: str) -> None:
        problems.append(f"{path!r}: {line}")

    if _sizes(guest, problem) > _MOST_BYTES:
        problems.append("more sparse files than are read here")
        return
    for entry in guest.walk("/", checksum="sha256", xattrs=True, on_problem=problem):
        if entry.path in seen:
            problems.append(f"{entry.path!r} is there twice")
        seen[entry.path] = entry


def _sizes(guest: Guest, problem: Callable[[bytes, str], None] = lambda path, line: None) -> int:
    return sum(entry.size for entry in guest.walk("/", on_problem=problem) if entry.type == "file")


def _usage(guest: Guest, out: Path, seen: dict[bytes, Entry], problems: list[str]) -> None:
    for row in guest.usage():
        if row.error is None and not 0 <= (row.used or 0) <= (row.size or 0):
            problems.append(f"{row.device}: impossible space")


def _devices(guest: Guest, out: Path, seen: dict[bytes, Entry], problems: list[str]) -> None:
    if not guest.devices(everything=True):
        problems.append("there is no device")


def _copy(guest: Guest, out: Path, seen: dict[bytes, Entry], problems: list[str]) -> None:
    def problem(path: bytes, line: str) -> None:
        problems.append(f"{path!r}: {line}")

    if _sizes(guest) > _MOST_BYTES:
        problems.append("more sparse files than are copied here")
        return
    copy_out(guest, "/", out, Report(problem=problem, skipped=lambda path, line: None))


# The kernel's answer


def is_sound(mutant: Mutant, image: Path) -> bool:
    """Whether the filesystem's own checker has nothing to say against it."""
    checker = {"ext": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n", "-f", "-o", "force_geometry")}
    command = checker.get(mutant.seed.filesystem or "")
    if command is None:
        return False
    done = subprocess.run([*command, str(image)], capture_output=True, timeout=60)
    return done.returncode == 0


def differences(image: Path, entries: dict[bytes, Entry]) -> list[str]:
    """Where a walk is not what the host's kernel shows of the same image."""
    mountpoint = image.with_name("mounted")
    mountpoint.mkdir()
    options = "loop,ro,nodev,nosuid,noexec"
    done = subprocess.run(["mount", "-o", options, image, mountpoint], capture_output=True)
    if done.returncode:
        mountpoint.rmdir()
        return ["the kernel does not mount it"]
    try:
        theirs = dict(_kernel_walk(os.fsencode(mountpoint)))
    finally:
        subprocess.run(["umount", mountpoint], check=True)
        mountpoint.rmdir()
    ours = {
        path: (e.mode, e.uid, e.gid, e.size, e.nlink, e.mtime_ns, e.target or e.checksum)
        for path, e in entries.items()
    }
    return [
        f"{path!r}: {ours.get(path)} is not {theirs.get(path)}"
        for path in sorted({*ours, *theirs})
        if ours.get(path) != theirs.get(path)
    ]


def _kernel_walk(top: bytes) -> Iterator[tuple[bytes, tuple[object, ...]]]:
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        for name in os.listdir(top + folder):
            path = folder + b"/" + name
            status = os.lstat(top + path)
            content: object = None
            if stat.S_ISDIR(status.st_mode):
                waiting.append(path)
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(top + path)
            elif stat.S_ISREG(status.st_mode):
                with open(top + path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            yield (
                path,
                (
                    status.st_mode,
                    status.st_uid,
                    status.st_gid,
                    status.st_size,
                    status.st_nlink,
                    status.st_mtime_ns,
                    content,
                ),
            )
