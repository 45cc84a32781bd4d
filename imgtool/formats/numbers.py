"""Numbers that a guest's files and filesystems say, in text that may be anything."""

from __future__ import annotations

import re

# Python would take other digits, and refuse five thousand of them with an error of its own.
_DIGITS = re.compile(r"[0-9]{1,18}")


def whole_number(text: str) -> int | None:
    """The number that at most 18 decimal digits say; None for anything else."""
    return int(text) if _DIGITS.fullmatch(text) else None
