"""The beginning and the end of a file: no more of it is read than is shown, and no more held than a
block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from imgtool.errors import UsageError
from imgtool.guest.guest import Guest

_BLOCK = 1 << 20
_UNITS = {"": 1, "b": 512, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Amount:
    """So many lines or bytes; with `skips` what follows, or what precedes, all but so many."""

    count: int
    skips: bool = False


def parse_amount(text: str, *, skips: str) -> Amount:
    """`10`, `2k`; with the sign `skips` all but so many. Raises `UsageError`."""
    sign = text[:1] if text[:1] in ("+", "-") else ""
    found = re.fullmatch(r"(\d{1,18})([bkKMG]?)", text.removeprefix(sign))
    if not found:
        raise UsageError("not a number of lines or bytes", subject=text, hint="such as 20, 4k")
    return Amount(int(found[1]) * _UNITS[found[2]], skips=sign == skips)


def head(guest: Guest, path: str, amount: Amount, *, lines: bool) -> Iterator[bytes]:
    """The first lines or bytes of a file; with `skips` all but the last. Raises as `Guest.open`."""
    if amount.skips:
        size = _size(guest, path)
        end = _line_start(guest, path, size, amount.count) if lines else size - amount.count
        yield from _part(guest, path, 0, max(end, 0))
        return
    if not lines:
        yield from _part(guest, path, 0, amount.count)
        return
    left = amount.count
    with guest.open(path) as stream:
        while left > 0 and (block := stream.read(_BLOCK)):
            count = block.count(b"\n")
            if count >= left:
                yield block[: _nth(block, left)]
                return
            left -= count
            yield block


def tail(guest: Guest, path: str, amount: Amount, *, lines: bool) -> Iterator[bytes]:
    """The last lines or bytes of a file; with `skips` from that line or byte on, counted from 1.

    Raises as `Guest.open`.
    """
    size = _size(guest, path)
    if not amount.skips:
        start = _line_start(guest, path, size, amount.count) if lines else size - amount.count
        yield from _part(guest, path, max(start, 0), size)
    elif not lines:
        yield from _part(guest, path, max(amount.count - 1, 0), size)
    else:
        left = max(amount.count - 1, 0)
        with guest.open(path) as stream:
            while block := stream.read(_BLOCK):
                count = block.count(b"\n") if left else 0
                if left and count < left:
                    left -= count
                    continue
                yield block[_nth(block, left) if left else 0 :]
                left = 0


def _size(guest: Guest, path: str) -> int:
    with guest.open(path):  # says what is no regular file
        pass
    return guest.lstat(guest.resolve(path)).size


def _part(guest: Guest, path: str, start: int, end: int) -> Iterator[bytes]:
    if end <= start:
        with guest.open(path):
            return
    with guest.open_range(path, start, end - start) as stream:
        left = end - start
        while left and (block := stream.read(min(_BLOCK, left))):
            left -= len(block)
            yield block


def _nth(block: bytes, count: int) -> int:
    """Where the line after so many newlines begins."""
    at = 0
    for _ in range(count):
        at = block.index(b"\n", at) + 1
    return at


def _line_start(guest: Guest, path: str, size: int, count: int) -> int:
    """Where the last so many lines begin; an end of the file without a newline is a line too."""
    if count == 0:
        return size
    end, first, left = size, True, count
    while end:
        start = max(end - (_BLOCK if not first else 64 << 10), 0)
        block = b"".join(_part(guest, path, start, end))
        if first and block.endswith(b"\n"):
            left += 1  # it ends the last line
        first = False
        newlines = block.count(b"\n")
        if newlines >= left:
            at = len(block)
            for _ in range(left):
                at = block.rindex(b"\n", 0, at)
            return start + at + 1
        left -= newlines
        end = start
    return 0
