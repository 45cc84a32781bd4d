"""Walking a tree in the appliance: few calls, sorted, in memory that does not grow with it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import BinaryIO, cast

from imgtool.engines.libguestfs.calls import CallFailed, Calls, printable
from imgtool.errors import EngineError
from imgtool.guest.guest import OnProblem
from imgtool.guest.model import Entry

# Entries whose directories are asked together: a call a directory and batch.
BATCH = 5000
CHUNK = 50_000
PASSED_OVER = "a directory is damaged: what is in the damaged part is not listed"


def read_names(stream: BinaryIO) -> Iterator[bytes]:
    """NUL-terminated names, one at a time."""
    rest = b""
    while block := stream.read(1 << 16):
        *names, rest = (rest + block).split(b"\0")
        yield from names


def _preorder(path: bytes) -> bytes:
    # NUL is in no name and sorts before everything else: parents come before their children and
    # siblings in the order of their bytes.
    return path.replace(b"/", b"\0")


def sorted_names(names: Iterable[bytes], stack: ExitStack) -> Iterator[bytes]:
    """Names in preorder; all but `CHUNK` of them wait in temporary files that `stack` closes."""
    source = iter(names)
    runs: list[Iterator[bytes]] = []
    while chunk := list(islice(source, CHUNK)):
        chunk.sort(key=_preorder)
        if not runs and len(chunk) < CHUNK:
            return iter(chunk)
        spool = stack.enter_context(TemporaryFile(prefix="imgtool-"))  # noqa: SIM115
        spool.writelines(name + b"\0" for name in chunk)
        spool.seek(0)
        runs.append(read_names(spool))
    return heapq.merge(*runs, key=_preorder)


def listing(call: Callable[[bytes, str], None], directory: bytes, stack: ExitStack) -> BinaryIO:
    """What a libguestfs call that lists names of a directory wrote."""
    spool = stack.enter_context(NamedTemporaryFile(prefix="imgtool-"))  # noqa: SIM115
    call(directory, spool.name)
    # libguestfs truncates and writes the file by its name: the same file, from its start.
    spool.seek(0)
    return cast(BinaryIO, spool)


def join(directory: bytes, name: bytes) -> bytes:
    """A path below a directory."""
    # The appliance's `find` writes names below any directory but the root with a leading slash.
    return directory.rstrip(b"/") + b"/" + name.lstrip(b"/")


def stats(calls: Calls, paths: Iterable[bytes], on_problem: OnProblem | None) -> Iterator[Entry]:
    """`lstat` of many paths, in their order; what cannot be read goes to `on_problem`."""
    source = iter(paths)
    while batch := list(islice(source, BATCH)):
        for path, entry in zip(batch, calls.lstats(batch), strict=True):
            if entry is not None:
                yield entry
                continue
            try:
                yield calls.lstat(path)  # for the reason, which the batch does not give
            except CallFailed as error:
                if on_problem is None:
                    raise
                on_problem(path, error.message)


def children(calls: Calls, directory: bytes, on_problem: OnProblem | None) -> Iterator[Entry]:
    """The entries of one directory, sorted by name; what the kernel passes over is a problem."""
    with ExitStack() as stack:
        calls.has_new_errors()  # what was found before
        names = read_names(listing(calls.ls0, directory, stack))
        if calls.has_new_errors():
            if on_problem is None:
                raise EngineError(PASSED_OVER, subject=printable(directory))
            on_problem(directory, PASSED_OVER)
        paths = (join(directory, name) for name in sorted_names(names, stack))
        yield from stats(calls, paths, on_problem)


def walk(calls: Calls, directory: bytes, on_problem: OnProblem | None) -> Iterator[Entry]:
    """Everything below a directory in preorder, with one `find` in the appliance."""
    with ExitStack() as stack:
        try:
            calls.has_new_errors()  # what was found before
            found = listing(calls.find0, directory, stack)
            if calls.has_new_errors():
                raise EngineError(PASSED_OVER, subject=printable(directory))
        except EngineError:
            if on_problem is None:
                raise
            # `find` says that something is wrong, not what: look into each directory alone.
            yield from _careful_walk(calls, directory, on_problem)
            return
        paths = (join(directory, name) for name in sorted_names(read_names(found), stack))
        yield from stats(calls, paths, on_problem)


def _careful_walk(calls: Calls, directory: bytes, on_problem: OnProblem) -> Iterator[Entry]:
    try:
        for entry in children(calls, directory, on_problem):
            yield entry
            if entry.type == "directory":
                yield from _careful_walk(calls, entry.path, on_problem)
    except CallFailed as error:
        on_problem(directory, error.message)
