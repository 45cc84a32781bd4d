"""Permission bits as `find -perm` takes them."""

from __future__ import annotations

import re

from imgtool.errors import UsageError

_WHO = {"u": 0o4700, "g": 0o2070, "o": 0o1007, "a": 0o7777}
_BITS = {"r": 0o444, "w": 0o222, "x": 0o111, "s": 0o6000, "t": 0o1000}
_CLAUSE = re.compile(r"([ugoa]*)([+=-])([rwxst]*)")


def parse_mode(text: str) -> int:
    """The bits of `644` or `u+s,g=rx`, which begins with none. Raises `UsageError`."""
    if re.fullmatch(r"[0-7]{1,4}", text):
        return int(text, 8)
    mode = 0
    for clause in text.split(","):
        found = _CLAUSE.fullmatch(clause)
        if not found:
            raise UsageError("not permission bits", subject=text, hint="such as 644, -4000 or /u+s")
        who = 0
        for letter in found[1] or "a":
            who |= _WHO[letter]
        bits = 0
        for letter in found[3]:
            bits |= _BITS[letter]
        bits &= who
        if found[2] == "=":
            mode &= ~who
        mode = mode & ~bits if found[2] == "-" else mode | bits
    return mode
