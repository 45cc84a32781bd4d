"""Guest paths as users type them."""

from __future__ import annotations

import os
import posixpath
import re

from imgtool.errors import NotInGuestError, UsageError

_DRIVE = re.compile(rb"^([A-Za-z]):[\\/]*")


def guest_path(typed: str | bytes, *, windows: bool = False) -> bytes:
    """The absolute, normalised guest path that `typed` means.

    In a Windows guest `C:\\Windows` and `\\Windows` are `/Windows`. Raises `UsageError` for a path
    that is not absolute, `NotInGuestError` for a drive other than `C:`.
    """
    raw = os.fsencode(typed)
    path = raw
    if windows:
        if drive := _DRIVE.match(path):
            if drive[1].upper() != b"C":
                raise NotInGuestError(
                    f"only drive C: is mounted, not {drive[1].decode()}:",
                    subject=os.fsdecode(raw),
                    hint="'imgtool filesystems' lists the others; use one with -m DEVICE",
                )
            path = b"/" + path[drive.end() :]
        path = path.replace(b"\\", b"/")
    elif _DRIVE.match(path) and not path.startswith(b"/"):
        raise UsageError("this guest is not Windows", subject=os.fsdecode(raw))
    if not path.startswith(b"/"):
        raise UsageError(
            "guest paths are absolute", subject=os.fsdecode(raw), hint="begin the path with /"
        )
    if b"\0" in path:
        raise UsageError("a path cannot contain NUL")
    # `..` is taken by name, before links: what the user sees is what is meant.
    return b"/" + posixpath.normpath(path).lstrip(b"/")
