"""Patterns of guest paths, as a shell knows them: `*`, `?` and `[a-z]` in one component."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterator, Sequence

from imgtool.errors import EngineError, NotInGuestError
from imgtool.guest.guest import Guest

_MAGIC = re.compile(r"[*?[]")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


def is_pattern(typed: str) -> bool:
    """Whether a path that was typed may mean more than one file."""
    return _MAGIC.search(typed) is not None


def expand(guest: Guest, typed: str) -> list[str]:
    """The paths that were meant, sorted by name as bytes: the path itself where it is no pattern,
    or where nothing matches but the guest has a file of just that name.

    As in a shell, a name that begins with a dot is found only where the pattern does so too, links
    to directories are followed, and a slash at the end means directories. Raises `NotInGuestError`
    where nothing matches, `EngineError` where a directory cannot be read whole.
    """
    if not is_pattern(typed):
        return [typed]
    # A backslash is in a pattern of a Windows guest what it is in its paths.
    path = os.fsdecode(guest.path(typed))
    found = [b"/"]
    for component in path.strip("/").split("/"):
        found = [below for directory in found for below in _below(guest, directory, component)]
    if typed.endswith("/"):
        found = [one for one in found if _directory(guest, one) is not None]
    if not found:
        with contextlib.suppress(NotInGuestError):
            guest.lstat(typed)
            return [typed]
        raise NotInGuestError(
            "nothing in the guest matches this pattern",
            subject=typed,
            hint="'*' finds no name that begins with a dot; 'imgtool find' looks deeper",
        )
    return [os.fsdecode(path) for path in found]


def expand_all(guest: Guest, typed: Sequence[str]) -> list[str]:
    """The paths that were meant by several, in their order. Raises as `expand`."""
    return [path for one in typed for path in expand(guest, one)]


def matcher(pattern: str, *, ignore_case: bool = False) -> re.Pattern[str]:
    """What finds the names that a pattern means, as a whole: `*`, `?`, `[a-z]`, `[!a-z]`, and a
    backslash before a character that stands for itself.
    """
    pattern = _ESCAPED.sub(
        lambda found: f"[{found[1]}]" if found[1] in "*?[" else found[1], pattern
    )
    pattern = pattern.replace("[^", "[!")
    return re.compile(fnmatch.translate(pattern), re.IGNORECASE if ignore_case else 0)


def _below(guest: Guest, directory: bytes, component: str) -> Iterator[bytes]:
    """The paths below a directory that one component of a pattern means."""
    if not is_pattern(component):
        path = directory.rstrip(b"/") + b"/" + os.fsencode(component)
        with contextlib.suppress(NotInGuestError, EngineError):
            guest.lstat(path)
            yield path
        return
    pattern = matcher(component)
    real = _directory(guest, directory)
    if real is None:
        return
    for entry in guest.entries(real):
        name = os.fsdecode(entry.name)
        hidden = name.startswith(".") and not component.startswith(".")
        if hidden or not pattern.match(name):
            continue
        path = directory.rstrip(b"/") + b"/" + entry.name
        if guest.windows and b"\\" in entry.name:  # it would be taken for several components
            raise EngineError(
                "a name with a backslash cannot be meant by a pattern", subject=os.fsdecode(path)
            )
        yield path


def _directory(guest: Guest, path: bytes) -> bytes | None:
    """The directory that a path leads to; None where it leads to none."""
    with contextlib.suppress(NotInGuestError, EngineError):  # a link in a circle, or to nothing
        real = guest.resolve(path)
        return real if guest.lstat(real).type == "directory" else None
    return None
