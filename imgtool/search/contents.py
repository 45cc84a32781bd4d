"""Looking into files for a regular expression, line by line, whatever they are made of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from imgtool.errors import UsageError

_BLOCK = 1 << 20
# A line is searched in parts of this length: memory does not grow with it.
LONGEST_LINE = 1 << 20
_LOOKED_AT = 32 << 10  # bytes of a file, to tell whether it is text


@dataclass(frozen=True)
class Match:
    """A line that matches: its number, from 1, and its bytes; None for both in a binary file, of
    which only that it matches is told."""

    number: int | None
    line: bytes | None


def parse_pattern(pattern: str, *, ignore_case: bool = False) -> re.Pattern[bytes]:
    """A regular expression for bytes. Raises `UsageError`."""
    try:
        return re.compile(os.fsencode(pattern), re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise UsageError(f"not a regular expression: {error}", subject=pattern) from error


def matching_lines(stream: BinaryIO, pattern: re.Pattern[bytes]) -> Iterator[Match]:
    """The lines of a file that match, without their ends; one `Match` for all of a binary file.

    A line longer than `LONGEST_LINE` bytes is taken for several.
    """
    number, rest, binary = 0, b"", None
    while block := stream.read(_BLOCK):
        if binary is None:
            binary = b"\0" in block[:_LOOKED_AT]
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if len(rest) > LONGEST_LINE:
            lines.append(rest)
            rest = b""
        for line in lines:
            number += 1
            if pattern.search(line):
                if binary:
                    yield Match(None, None)
                    return
                yield Match(number, line)
    if rest and pattern.search(rest):
        yield Match(None, None) if binary else Match(number + 1, rest)
