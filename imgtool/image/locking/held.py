"""The files of which this process holds QEMU's locks itself.

What is done to an image in several steps is done by several QEMUs, and no guest may come between
them. So imgtool holds the locks from the first step to the last (`imgtool.image.locking.locks`),
and the QEMUs that it starts on such a file do not ask for them. They inherit the descriptors: a
lock is held until the last of them has ended, also where imgtool is killed before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_files: dict[tuple[int, int], int] = {}  # the descriptor that holds the locks

_others: list[int] = []


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)  # noqa: PTH116
        return status.st_dev, status.st_ino
    return None


def is_held(path: Path) -> bool:
    """Whether this process holds QEMU's locks on the file."""
    return bool(_files) and _identity(path) in _files


def descriptors() -> tuple[int, ...]:
    """What holds the locks, for the programs that work on the files."""
    return (*_files.values(), *_others)


@contextlib.contextmanager
def kept_open(descriptor: int) -> Iterator[None]:
    """While the block runs those programs inherit this descriptor too."""
    _others.append(descriptor)
    try:
        yield
    finally:
        _others.remove(descriptor)


@contextlib.contextmanager
def holding(path: Path, descriptor: int) -> Iterator[None]:
    """The locks on the file are this process's while the block runs, held by a descriptor."""
    identity = _identity(path)
    if identity is None or identity in _files:
        yield
        return
    _files[identity] = descriptor
    try:
        yield
    finally:
        _files.pop(identity, None)
