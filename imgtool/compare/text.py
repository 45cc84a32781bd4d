"""Unified diffs of changed text files, in the form that patch(1) takes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imgtool.compare.differences import CHANGED, Difference
from imgtool.guest.guest import Guest
from imgtool.host.process import Limits, ProgramFailed, TimedOut, run

LONGEST = 1 << 20
_LOOKED_AT = 8000  # bytes, as git does, for a NUL
# A guest can hold files that no algorithm compares line by line in reasonable time.
_LIMITS = Limits(memory=1 << 30, cpu=10, wall=20)


def text_difference(
    before: Guest, after: Guest, difference: Difference, *, summed: bool = False
) -> bytes:
    """The unified diff of a changed file; nothing for all else and for equal contents.

    A binary file, and one of more than `LONGEST` bytes, gets a line that says so. `summed` says
    that the contents were compared already. Raises `EngineError` for a file that cannot be read.
    """
    one, other = difference.before, difference.after
    if difference.change != CHANGED or one is None or other is None:
        return b""
    if one.type != "file" or other.type != "file":
        return b""
    if not set(difference.fields) & ({"content"} if summed else {"size", "mtime"}):
        return b""
    old, new = quote_name(b"a" + one.path), quote_name(b"b" + other.path)
    if max(one.size, other.size) > LONGEST:
        return b"File %b is longer than %d bytes: its text is not compared\n" % (new, LONGEST)
    was = before.read_bytes(one.path, LONGEST)
    now = after.read_bytes(other.path, LONGEST)
    if was == now:
        return b""
    if b"\0" in was[:_LOOKED_AT] or b"\0" in now[:_LOOKED_AT]:
        return b"Binary files %b and %b differ\n" % (old, new)
    try:
        return _unified_diff(was, now, old, new)
    except (ProgramFailed, TimedOut):
        return b"Files %b and %b differ, too much for their lines to be compared\n" % (old, new)


def quote_name(name: bytes) -> bytes:
    """A name in the header of a diff: as it is, or as git quotes it, which patch(1) knows too."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if text.isprintable() and not set(text) & set('"\\'):
        # A tab ends a name with a space in it.
        return name + b"\t" if b" " in name else name
    shown = (
        b"\\%c" % byte
        if byte in b'"\\'
        else bytes([byte])
        if 0x20 <= byte < 0x7F
        else b"\\%03o" % byte
        for byte in name
    )
    return b'"' + b"".join(shown) + b'"'


def _unified_diff(was: bytes, now: bytes, old: bytes, new: bytes) -> bytes:
    with _memory(was) as first, _memory(now) as second:
        argv = ["diff", "--text", "--unified"]
        argv += [f"--label={os.fsdecode(label)}" for label in (old, new)]
        argv += [f"/proc/self/fd/{descriptor}" for descriptor in (first, second)]
        return run(argv, limits=_LIMITS, ok=(0, 1), pass_fds=(first, second)).stdout


@contextlib.contextmanager
def _memory(content: bytes) -> Iterator[int]:
    """A file that is in no folder."""
    descriptor = os.memfd_create("imgtool")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield descriptor
    finally:
        os.close(descriptor)
