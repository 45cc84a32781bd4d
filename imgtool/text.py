"""Names of files in messages: on one line, unable to steer a terminal, fit to be typed."""

from __future__ import annotations

import shlex
from pathlib import Path


def printable(name: str | bytes | Path) -> str:
    """A name out of a header or a guest, on one line and unable to steer a terminal; of bytes those
    that are not UTF-8 are escaped."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def typed(name: str | Path) -> str:
    """A name in a command that somebody may type as it stands: one word."""
    return shlex.quote(printable(name))
