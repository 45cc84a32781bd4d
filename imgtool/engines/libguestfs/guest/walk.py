"""Walking a tree in the appliance: few calls, sorted, in memory that does not grow with it."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import BinaryIO, cast

from imgtool.engines.libguestfs.guest.calls import CallFailed, Calls
from imgtool.errors import EngineError
from imgtool.formats.xattrs import Xattrs
from imgtool.guest.guest import OnProblem
from imgtool.guest.model import Entry
from imgtool.text import printable

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


def sound_listing(
    calls: Calls, call: Callable[[bytes, str], None], directory: bytes, stack: ExitStack
) -> tuple[BinaryIO, bool]:
    """`listing`, and whether the kernel passed over something damaged in it."""
    names = listing(call, directory, stack)
    if not calls.has_new_errors():
        return names, True
    # Found now, or in what was read before: it is found anew wherever it is.
    names = listing(call, directory, stack)
    return names, not calls.has_new_errors()


def join(directory: bytes, name: bytes) -> bytes:
    """A path below a directory."""
    # The appliance's `find` writes names below any directory but the root with a leading slash.
    return directory.rstrip(b"/") + b"/" + name.lstrip(b"/")


def stats(
    calls: Calls, paths: Iterable[bytes], on_problem: OnProblem | None, *, xattrs: bool = False
) -> Iterator[Entry]:
    """`lstat` of many paths, in their order; what cannot be read goes to `on_problem`."""
    found = _stats(calls, paths, on_problem)
    while xattrs and (batch := list(islice(found, BATCH))):
        yield from _with_xattrs(calls, batch, on_problem)
    yield from found


def _with_xattrs(
    calls: Calls, entries: Sequence[Entry], on_problem: OnProblem | None
) -> Iterator[Entry]:
    """Entries with their extended attributes, with one call a directory where that suffices."""
    for directory, group in groupby(entries, lambda entry: entry.path.rpartition(b"/")[0]):
        siblings = list(group)
        found: Sequence[Xattrs | None] = ()
        with contextlib.suppress(CallFailed):  # too much for one message
            found = calls.xattrs_in(directory or b"/", [entry.name for entry in siblings])
        if len(found) != len(siblings):
            found = [None] * len(siblings)
        for entry, attributes in zip(siblings, found, strict=True):
            try:
                # Alone for the reason, where there was none: a filesystem without attributes, too.
                known = calls.xattrs(entry.path) if attributes is None else attributes
                yield dataclasses.replace(entry, xattrs=known)
            except CallFailed as error:
                if on_problem is None:
                    raise
                on_problem(entry.path, f"its extended attributes: {error.message}")
                yield entry


def _stats(calls: Calls, paths: Iterable[bytes], on_problem: OnProblem | None) -> Iterator[Entry]:
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


def children(
    calls: Calls, directory: bytes, on_problem: OnProblem | None, *, xattrs: bool = False
) -> Iterator[Entry]:
    """The entries of one directory, sorted by name; what the kernel passes over is a problem."""
    with ExitStack() as stack:
        found, is_sound = sound_listing(calls, calls.ls0, directory, stack)
        if not is_sound:
            if on_problem is None:
                raise EngineError(PASSED_OVER, subject=printable(directory))
            on_problem(directory, PASSED_OVER)
        names = sorted_names(read_names(found), stack)
        paths = (join(directory, name) for name in names)
        yield from stats(calls, paths, on_problem, xattrs=xattrs)


def walk(
    calls: Calls, directory: bytes, on_problem: OnProblem | None, *, xattrs: bool = False
) -> Iterator[Entry]:
    """Everything below a directory in preorder, with one `find` in the appliance."""
    with ExitStack() as stack:
        try:
            found, is_sound = sound_listing(calls, calls.find0, directory, stack)
            if not is_sound:
                raise EngineError(PASSED_OVER, subject=printable(directory))
        except EngineError:
            if on_problem is None:
                raise
            # `find` says that something is wrong, not what: look into each directory alone.
            yield from _careful_walk(calls, directory, on_problem, xattrs)
            return
        paths = (join(directory, name) for name in sorted_names(read_names(found), stack))
        yield from stats(calls, paths, on_problem, xattrs=xattrs)


def _careful_walk(
    calls: Calls, directory: bytes, on_problem: OnProblem, xattrs: bool
) -> Iterator[Entry]:
    try:
        for entry in children(calls, directory, on_problem, xattrs=xattrs):
            yield entry
            if entry.type == "directory":
                yield from _careful_walk(calls, entry.path, on_problem, xattrs)
    except CallFailed as error:
        on_problem(directory, error.message)
