"""The files of which this process holds QEMU's locks itself, and those that it works on in place.

What is done to an image in several steps is done by several QEMUs, and no guest may come between
them. So imgtool holds the locks from the first step to the last (`imgtool.image.locking.locks`),
and the QEMUs that it starts on such a file do not ask for them. They inherit the descriptors: a
lock is held until the last of them has ended, also where imgtool is killed before.

Nor may another file come between them, where others can put one at the name of the image. So a path
can stand for the file that was looked at (`imgtool.image.chain.steady.bind_images`): what opens an
image for a step, or has QEMU open it, takes the `way_to` it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_files: dict[tuple[int, int], int] = {}  # the descriptor that holds the locks

_others: list[int] = []

# By its name: the descriptor of a file, None where there is none, and where it was then.
_known: dict[Path, list[tuple[int | None, Path]]] = {}


def way_to(path: Path) -> Path:
    """By which name the file at a path is opened, and looked at: its own; or that of a descriptor,
    while the path stands for a file. QEMU can be given it, and nothing may write it down."""
    known = _known.get(path.absolute()) if _known else None
    if not known:
        return path
    descriptor, _ = known[-1]
    # Of this process for others too. There is no descriptor of what was not there.
    return Path(f"/proc/{os.getpid()}/fd/{'none' if descriptor is None else descriptor}")


def real_path(path: Path) -> Path:
    """The path without symlinks, as it was when it began to stand for a file."""
    known = _known.get(path.absolute()) if _known else None
    return known[-1][1] if known else path.resolve()


def is_one_file(path: Path, other: Path) -> bool:
    """Whether two paths lead to the same file. Raises `OSError`."""
    return way_to(path).samefile(way_to(other))


@contextlib.contextmanager
def bind_path(path: Path, descriptor: int | None) -> Iterator[None]:
    """Until the block ends a path, and the name of its file without symlinks, stand for the file of
    a descriptor; with None for no file."""
    path, real = path.absolute(), path.resolve()
    if descriptor is not None:
        with contextlib.suppress(OSError):  # no /proc
            now = Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
            real = now if os.fstat(descriptor).st_nlink else path
    names = {path, real}
    for name in names:
        _known.setdefault(name, []).append((descriptor, real))
    try:
        yield
    finally:
        for name in names:
            _known[name].remove((descriptor, real))
            if not _known[name]:
                del _known[name]


def remove_file(path: Path, known: os.stat_result) -> bool:
    """Remove a file by its name, if that is the one of this status still; whether it was."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # What is put in the place of the folder now does not count.
            if os.path.samestat(os.lstat(path.name, dir_fd=folder), known):
                os.unlink(path.name, dir_fd=folder)
                return True
        finally:
            os.close(folder)
    return False


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, ValueError):
        status = way_to(path).stat()
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
def holding(descriptor: int) -> Iterator[None]:
    """The locks on a file are this process's while the block runs, held by a descriptor of it."""
    status = os.fstat(descriptor)
    identity = status.st_dev, status.st_ino
    if identity in _files:
        yield
        return
    _files[identity] = descriptor
    try:
        yield
    finally:
        _files.pop(identity, None)
