"""Files that imgtool has made, opened by what they are and not by their names alone."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.errors import RefusedError
from imgtool.image.chain.steady import is_out_of_reach
from imgtool.image.intent.marks import identity_of, is_same_file
from imgtool.text import printable


def make_file(path: Path) -> list[int | str]:
    """Make an empty file that nobody else may read; its identity. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        return identity_of(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_as_made(
    words: Sequence[str | Path], made: Path | None, identity: object = None
) -> Iterator[Sequence[str | Path]]:
    """The words of a program that writes to the file `made`: where another user can put a link in
    its place, by a descriptor of the one of this identity."""
    if made is None or is_out_of_reach(made):
        yield words
        return
    with made_file(made, write=True, made=identity) as descriptor:
        name = f"/proc/{os.getpid()}/fd/{descriptor}"
        yield [name if str(word) == str(made) else word for word in words]


@contextlib.contextmanager
def made_file(
    path: Path, *, write: bool = False, made: object = None, folder: int | None = None
) -> Iterator[int]:
    """A descriptor of a file that imgtool has made, to change its attributes or to `write` to it.

    In a folder of another user that one can put a link to any file at its name, and root would
    change that file. Raises `RefusedError` where it is a link, or has other names, or is another
    file than the one whose identity `made` is. With `folder`, a descriptor, it is looked for there.
    """
    try:
        access = os.O_RDWR if write else os.O_RDONLY
        flags = access | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path if folder is None else path.name, flags, dir_fd=folder)
    except OSError as error:
        raise _not_as_made(path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise _not_as_made(path)
        if made is not None and not is_same_file(made, Path(f"/proc/self/fd/{descriptor}")):
            raise _not_as_made(path)
        yield descriptor
    finally:
        os.close(descriptor)


def _not_as_made(path: Path) -> RefusedError:
    return RefusedError(
        "somebody put something else in the place of a file that was made",
        subject=printable(path),
        hint="work on a copy in a folder that only you can write to",
    )
