"""Readers and a write that becomes the image's own: neither meets the other half way.

Whoever reads an image through imgtool holds a lock on one byte of it, which no QEMU looks at, so
that a virtual machine starts all the same. The word that a write is kept is given only while
nobody reads. From then on the image is read through the overlay, until that is written down and,
again once nobody reads it, removed. A file system without locks has none of this.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.errors import RefusedError
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.intent.intent_log import read_facts, worker_on
from imgtool.image.intent.intent_state import is_unfinished, unfinished_commit
from imgtool.image.locking.held import real_path, remove_file, way_to
from imgtool.image.locking.host_file import exchanged_file
from imgtool.image.locking.locks import FLOCK, PATIENCE, in_use_for_writing
from imgtool.text import printable

# Far from the bytes that QEMU locks, which end at 263.
_BYTE = 4000
_PAUSE = 0.02  # seconds


def _lock(path: Path, kind: int, stack: contextlib.ExitStack) -> bool:
    """Whether nobody's lock was in the way; the lock is held until the stack is closed."""
    mode = os.O_RDWR if kind == fcntl.F_WRLCK else os.O_RDONLY
    try:
        descriptor = os.open(way_to(path), mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True  # whoever opens it next says why it cannot be
    stack.callback(os.close, descriptor)
    try:
        lock = FLOCK.pack(kind, os.SEEK_SET, _BYTE, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks
    return True


@contextlib.contextmanager
def chain_to_read(
    path: str | Path,
    *,
    format: str | None = None,
    backing_dirs: Sequence[str | Path] = (),
    partial: bool = False,
) -> Iterator[Chain]:
    """`open_chain`, and until the block ends no imgtool gives the chain's image other content."""
    path = Path(path)
    until = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as held:
        while True:
            with contextlib.ExitStack() as locks:
                overlay = _overlay_of_now(path, until)
                # Where a write is being finished the overlay has all of it, and has to stay.
                free = _lock(path, fcntl.F_RDLCK, locks)
                if overlay is not None:
                    free = _lock(overlay, fcntl.F_RDLCK, locks)
                if free and unfinished_commit(path) == overlay:
                    held.enter_context(locks.pop_all())
                    break
            if time.monotonic() > until:
                raise _being_written(path)
            time.sleep(_PAUSE)
        yield open_chain(path, format=format, backing_dirs=backing_dirs, partial=partial)


def _overlay_of_now(path: Path, until: float) -> Path | None:
    """`unfinished_commit`, once another user's imgtool, whose record proves nothing to this one,
    is done with the image."""
    was_idle = False
    while True:
        try:
            return unfinished_commit(path)
        except RefusedError:
            # Once more where nobody is at work: it may have ended after its record was read.
            idle = worker_on(path) in (None, os.getpid())
            if (idle and was_idle) or time.monotonic() > until:
                raise
            was_idle = idle
            time.sleep(_PAUSE)


def passes_locks(chain: Chain) -> bool:
    """Whether to read past QEMU's locks: where somebody writes, or a write is being finished.

    Elsewhere QEMU's own locks keep a writer from starting while it reads.
    """
    if any(in_use_for_writing(path) is not None for path in chain.files):
        return True
    return any(is_unfinished(link.path, read_facts(link.path)) for link in chain.links[1:])


def _being_written(path: Path) -> RefusedError:
    return RefusedError(
        f"another imgtool has been writing to it for {PATIENCE:g} s or more",
        subject=printable(path),
        hint="wait until it has ended, then repeat the command",
    )


@contextlib.contextmanager
def base_lock(chain: Chain) -> Iterator[None]:
    """Until the block ends no imgtool writes to a chain on which an overlay is being made."""
    until = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as held:
        for path in chain.files:
            while not _try_lock(path, held, fcntl.F_RDLCK):
                if time.monotonic() > until:
                    raise _being_written(path)
                time.sleep(_PAUSE)
        yield


@contextlib.contextmanager
def block_readers(paths: Sequence[Path]) -> Iterator[None]:
    """Until the block ends nobody begins to read these images as they are.

    Those who read are given some seconds to finish. Raises `RefusedError` if one does not.
    """
    until = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as held:
        for path in paths:
            while not _try_lock(path, held):
                if time.monotonic() > until:
                    raise RefusedError(
                        f"another imgtool has been reading it for {PATIENCE:g} s or more",
                        subject=printable(path),
                        hint="wait until it has ended, then repeat the command",
                    )
                time.sleep(_PAUSE)
        yield


def _try_lock(path: Path, held: contextlib.ExitStack, kind: int = fcntl.F_WRLCK) -> bool:
    with contextlib.ExitStack() as attempt:
        if not _lock(path, kind, attempt):
            return False
        held.enter_context(attempt.pop_all())
    return True


def remove_unread(path: Path) -> None:
    """Remove an overlay that nobody needs; who has just found it may still be opening it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RefusedError):  # it has long been opened, and stays open to them
            stack.enter_context(block_readers([path]))
        if way_to(path) == path:
            path.unlink()
        elif not remove_file(real_path(path), way_to(path).stat()):
            raise exchanged_file(path)
