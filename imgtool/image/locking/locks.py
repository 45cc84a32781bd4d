"""Who has an image open: the locks that QEMU takes on bytes of every image file, and the kernel.

QEMU shares permissions over a file by locking single bytes, never ranges that hold data: byte
100 + N is locked by whoever has permission N, byte 200 + N by whoever does not let others have it
(block/file-posix.c). The kernel reports no process for such locks (they belong to the open file),
but /proc/PID/fdinfo lists them with each open file that holds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from imgtool.errors import Force, Reason, RefusedError
from imgtool.host.own_mounts import served_mount
from imgtool.image.locking.attached import attached_to
from imgtool.image.locking.held import holding, is_held, way_to
from imgtool.text import printable, typed

if TYPE_CHECKING:
    from imgtool.image.chain.chain import Chain

_HELD, _NOT_SHARED = 100, 200
_WRITE, _RESIZE = 1, 3
_LAST_PERMISSION = 63
_READERS = ("qemu-nbd", "qemu-img", "qemu-io")
PATIENCE = 15.0  # seconds that a writer waits for readers
FLOCK = struct.Struct("hhqqi0q")  # struct flock of 64-bit Linux


@dataclass(frozen=True)
class Holder:
    """A process that has the image open through QEMU's block layer, or a block device of the host.

    `pid` and `program` are None where the locks are there but their process is out of sight (of
    another user, or of another container); `pid` alone for a device, which `program` describes.
    `exclusive`: it does not let others write, or relies on nobody doing so. `mountpoint` is where
    it serves a mount of imgtool's.
    """

    pid: int | None
    program: str | None
    writes: bool
    exclusive: bool
    mountpoint: str | None = None

    def __str__(self) -> str:
        if self.mountpoint is not None:
            at = printable(self.mountpoint)
            return f"imgtool's own mount at {at} ({self.program}, process {self.pid})"
        if self.pid is None:
            return self.program or "a process that cannot be seen from here"
        return f"{self.program or 'a process'}, process {self.pid}"

    @property
    def passes(self) -> bool:
        """Whether it is a reader of the kind that is done in a moment, or was done already."""
        if self.mountpoint is not None:
            return False
        unseen = self.pid is None and self.program is None
        return not self.writes and (unseen or self.program in _READERS)

    @property
    def is_device(self) -> bool:
        """Whether it is a block device of the host, and no process of QEMU's."""
        return self.pid is None and self.program is not None

    @property
    def hint(self) -> str:
        """What to do where it is in the way."""
        if self.mountpoint is not None:
            return f"imgtool umount {typed(self.mountpoint)}"
        if self.is_device:
            return "unmount it and detach the device; 'imgtool mounts' lists imgtool's own"
        return "shut the guest down, or end that process, then try again"


def _holder(pid: int | None, program: str | None, locked: set[int]) -> Holder:
    return Holder(
        pid=pid,
        program=program,
        writes=bool(locked & {_HELD + _WRITE, _HELD + _RESIZE}),
        exclusive=bool(locked & {_NOT_SHARED + _WRITE, _NOT_SHARED + _RESIZE}),
        mountpoint=None if pid is None else served_mount(pid),
    )


def _is_locked(descriptor: int, first: int, length: int) -> bool:
    asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, length, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _locked_bytes(path: Path) -> set[int] | None:
    """QEMU's bytes that are locked on the file, by anyone; None where the file has no locks."""
    locked: set[int] = set()
    descriptor = os.open(way_to(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not _is_locked(descriptor, _HELD, _NOT_SHARED + _RESIZE - _HELD + 1):
            return locked  # nearly every image
        for base in (_HELD, _NOT_SHARED):
            for byte in range(base, base + _RESIZE + 1):
                if _is_locked(descriptor, byte, 1):
                    locked.add(byte)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return locked


def _lock_lines(fdinfo: str) -> set[int]:
    """The locked bytes in lines like `lock: 1: OFDLCK ADVISORY READ -1 00:1f:1234 100 101`."""
    locked: set[int] = set()
    for line in fdinfo.splitlines():
        words = line.split()
        if words[:1] != ["lock:"] or "OFDLCK" not in words or not words[-2].isdigit():
            continue
        first = int(words[-2])
        last = int(words[-1]) if words[-1].isdigit() else first
        locked.update(range(first, min(last, _NOT_SHARED + _LAST_PERMISSION) + 1))
    return {byte for byte in locked if byte >= _HELD}


def _locks_of_process(process: Path, identity: tuple[int, int]) -> set[int]:
    locked: set[int] = set()
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found = link.stat()
            if (found.st_dev, found.st_ino) == identity:
                locked |= _lock_lines((process / "fdinfo" / link.name).read_text())
    return locked


def _by_the_kernel(path: Path) -> list[Holder]:
    """The loop devices over the file, and the mounts of a device; all rely on nobody writing."""
    return [
        Holder(pid=None, program=found.program, writes=found.writes, exclusive=True)
        for found in attached_to(path)
    ]


def locked_inodes() -> set[int]:
    """The inode numbers of the files of this machine that somebody holds locks like QEMU's on.

    To choose, of thousands of files, those that `holders` is worth asking about: which file system
    a number belongs to is not told, since the kernel and stat(2) name some differently.
    """
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "OFDLCK" in words:
            found.add(int(words[-3].rpartition(":")[2]))
    return found


def holders(path: str | Path) -> tuple[Holder, ...]:
    """The processes that hold QEMU's locks on the file at `path`, and the devices of the host that
    stand on it; writers first.

    Locks whose process cannot be seen give one holder without a process id. Where the file system
    knows no locks, QEMU's processes are not among them: see `in_use_for_writing`.
    """
    path = Path(path)
    found = [*_by_locks(path), *_by_the_kernel(path)]
    return tuple(sorted(found, key=lambda holder: (not holder.writes, holder.pid or 0)))


def _by_locks(path: Path) -> list[Holder]:
    locked = _locked_bytes(path)
    if not locked or is_held(path):  # nobody is in the way of who holds them
        return []
    status = way_to(path).stat()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):
            held = _locks_of_process(process, (status.st_dev, status.st_ino))
            if held:
                program = (process / "exe").readlink().name.removesuffix(" (deleted)")
                found.append(_holder(int(process.name), program, held))
    explained = any(holder.writes for holder in found) or not _holder(None, None, locked).writes
    if not found or not explained:
        found.append(_holder(None, None, locked))
    return found


def in_use_for_writing(path: str | Path) -> Holder | Literal["unknown"] | None:
    """Who may write to the file right now; "unknown" where the file system knows no locks."""
    path = Path(path)
    locked = _locked_bytes(path)
    found = _by_locks(path) if locked and _holder(None, None, locked).writes else []
    writer = next((holder for holder in (*found, *_by_the_kernel(path)) if holder.writes), None)
    return "unknown" if writer is None and locked is None else writer


def refuse_if_in_use(chain: Chain, *, read_only: bool = False, force: Force = ()) -> None:
    """Raise `RefusedError` if writing to the active image would meet another process, or a device.

    On the active image that is one that writes, or one that relies on nobody writing; on the files
    below it, or with `read_only` on any, one that writes. One that only reads, as imgtool itself
    does, is given some seconds to finish. `force` overrides devices alone: QEMU itself lets no
    second writer in.
    """
    until = time.monotonic() + PATIENCE
    while (found := _in_the_way(chain, read_only, force)) is not None:
        path, holder = found
        if not holder.passes or time.monotonic() > until:
            raise RefusedError(
                f"the image is in use by {holder}",
                subject=path,
                hint=holder.hint,
                reason=Reason.IN_USE if holder.is_device else None,
            )
        time.sleep(0.05)


def _in_the_way(chain: Chain, read_only: bool, force: Force) -> tuple[Path, Holder] | None:
    active = () if read_only else chain.active.files
    for path in chain.files:
        for holder in holders(path):
            if holder.is_device and Reason.IN_USE in force:
                continue
            if holder.writes or (holder.exclusive and path in active):
                return path, holder
    return None


@contextlib.contextmanager
def block_writers(chain: Chain) -> Iterator[None]:
    """Hold QEMU's locks on the files of a chain: no QEMU can open one for writing meanwhile.

    For as long as a copy is made that is to take the place of a file: a guest that was started in
    between would write to a file that is thrown away. Raises `RefusedError` if one writes already.
    """
    with contextlib.ExitStack() as stack:
        for path in chain.files:
            descriptor = os.open(way_to(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            try:
                for permission in (_WRITE, _RESIZE):
                    lock = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _NOT_SHARED + permission, 1, 0)
                    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
                written = any(_is_locked(descriptor, _HELD + by, 1) for by in (_WRITE, _RESIZE))
            except OSError:
                continue  # a file system without locks
            if written:
                raise RefusedError(
                    "the image is in use: it has just been opened for writing",
                    subject=path,
                    hint="shut the guest down, then repeat the command",
                )
        yield


@contextlib.contextmanager
def held_for_writing(paths: Sequence[Path]) -> Iterator[None]:
    """Hold QEMU's locks on files as one that writes to them: until the block ends no other QEMU
    opens one, but to read past all locks, and those that this process starts do not ask for them.

    One that only reads is given some seconds to finish. Raises `RefusedError` for a file that is
    in use.
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            until = time.monotonic() + PATIENCE
            while not _hold(path, stack):
                holder = next((one for one in _by_locks(path) if one.writes or one.exclusive), None)
                if time.monotonic() > until or (holder is not None and not holder.passes):
                    raise RefusedError(
                        f"the image is in use by {holder or 'another process'}",
                        subject=path,
                        hint=holder.hint if holder is not None else "try again",
                    )
                time.sleep(0.05)
        yield


def _hold(path: Path, stack: contextlib.ExitStack) -> bool:
    """Whether nobody was in the way, or the file system has no locks; held until the stack ends."""
    if is_held(path):
        return True
    with contextlib.ExitStack() as attempt:
        descriptor = os.open(way_to(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        attempt.callback(os.close, descriptor)
        locked = [kind + by for kind in (_HELD, _NOT_SHARED) for by in (_WRITE, _RESIZE)]
        try:
            for byte in locked:
                lock = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
            if any(_is_locked(descriptor, byte, 1) for byte in locked):
                return False
        except OSError:
            return True  # a file system without locks
        attempt.enter_context(holding(descriptor))
        stack.enter_context(attempt.pop_all())
    return True


def warn_if_written(chain: Chain) -> str | None:
    """A line for a reader whose image is being written by somebody, or None."""
    for path in chain.files:
        holder = in_use_for_writing(path)
        if isinstance(holder, Holder):
            return f"{path} is being written by {holder}: what is read may be inconsistent"
    return None
