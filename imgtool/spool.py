"""Where temporary files go that may become large."""

from __future__ import annotations

import os
from pathlib import Path

_ON_DISK = Path("/var/tmp")


def large_files() -> str | None:
    """The folder for them; None is the usual one.

    On many hosts /tmp is memory, and /var/tmp never is. A TMPDIR is the user's own choice.
    """
    if os.environ.get("TMPDIR") or not os.access(_ON_DISK, os.W_OK | os.X_OK):
        return None
    return str(_ON_DISK)
