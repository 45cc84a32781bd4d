"""Shell completion of guest paths, from the image itself, and of names of commands."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest

_MOST = 500


def guest_paths(ctx: typer.Context, incomplete: str) -> list[str]:
    """What the path that is being typed can become: names in the guest, directories with a slash.

    Answers from the direct engine alone, since nobody waits for an appliance at a prompt. Whatever
    is wrong with the image or the options is said by the command itself, once it is run.
    """
    quiet = io.StringIO()
    # Not an error in the prompt, whatever happens.
    with contextlib.suppress(Exception), contextlib.redirect_stderr(quiet):
        return list(_found(ctx.params, incomplete))
    return []


def commands(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of commands; after that of a group, of its own."""
    from imgtool.cli.command_table import COMMANDS, GROUPS

    typed = ctx.params.get("words") or ()
    names = [*COMMANDS, *GROUPS] if not typed else GROUPS.get(typed[0], ("", {}))[1]
    return [name for name in names if len(typed) < 2 and name.startswith(incomplete)]


def outward_paths(ctx: typer.Context, incomplete: str) -> list[str]:
    """Paths for SRC... DEST out of a guest: the first is the guest's, a later one may be either."""
    found = guest_paths(ctx, incomplete)
    if ctx.params.get("paths"):
        found += _host_paths(incomplete)
    return list(dict.fromkeys(found))


def inward_paths(ctx: typer.Context, incomplete: str) -> list[str]:
    """Paths for SRC... DEST into a guest: the first is the host's, a later one may be either."""
    found = _host_paths(incomplete)
    if ctx.params.get("paths"):
        found += guest_paths(ctx, incomplete)
    return list(dict.fromkeys(found))


def _host_paths(incomplete: str) -> list[str]:
    directory, slash, begun = incomplete.rpartition("/")
    if not all(_plain(os.fsencode(part)) for part in directory.split("/") if part):
        return []
    with contextlib.suppress(OSError), os.scandir(directory or slash or ".") as entries:
        return sorted(
            f"{directory}{slash}{entry.name}" + ("/" if entry.is_dir() else "")
            for entry in entries
            if entry.name.startswith(begun) and _plain(os.fsencode(entry.name))
        )[:_MOST]
    return []


def _found(given: dict[str, Any], incomplete: str) -> Iterator[str]:
    from imgtool.guest.guest_options import GuestOptions
    from imgtool.opening import open_guest

    image = given.get("image")
    if isinstance(image, (list, tuple)):
        image = image[0]
    if image is None or not incomplete.startswith("/"):
        if image is not None and not incomplete:
            yield "/"
        return
    directory, _, begun = incomplete.rpartition("/")
    if not all(_plain(os.fsencode(part)) for part in directory.split("/") if part):
        return
    # Keys are for the appliance, which is not asked.
    names = GuestOptions().keywords().keys() - {"engine", "keys"}
    typed = {name: given[name] for name in names if given.get(name)}
    with open_guest(image, **typed, engine="direct", notice=lambda line: None) as guest:
        found = _names(guest, directory, begun)
        if len(found) == 1 and found[0].endswith("/"):
            # A shell puts a space after the only choice: what is in the directory is offered too.
            found = _names(guest, found[0].rstrip("/"), "") or found
        yield from found


def _names(guest: Guest, directory: str, begun: str) -> list[str]:
    wanted = os.fsencode(begun)
    found = []
    for entry in guest.entries(directory or "/"):
        if not entry.name.startswith(wanted) or not _plain(entry.name):
            continue
        kind = entry.type
        if kind == "symlink":
            with contextlib.suppress(OSError):
                kind = guest.lstat(guest.resolve(entry.path)).type
        found.append(f"{directory}/{entry.name.decode()}" + ("/" if kind == "directory" else ""))
        if len(found) == _MOST:
            break
    return found


def _plain(name: bytes) -> bool:
    """Whether a name can stand on a command line as it is.

    The shells' completion scripts quote nothing: any other character could run as a command.
    """
    try:
        return re.fullmatch(r"[\w.,+@%=-]+", name.decode()) is not None
    except UnicodeDecodeError:
        return False
