"""The guest's own names of users and groups, from its passwd and group."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from imgtool.errors import ImgtoolError, NotInGuestError
from imgtool.formats.numbers import whole_number
from imgtool.guest.changes import Owner
from imgtool.inject.guest_overlay import GuestOverlay

PASSWD, GROUP = "/etc/passwd", "/etc/group"
SHADOW, GSHADOW = "/etc/shadow", "/etc/gshadow"
_LARGEST = 0xFFFFFFFE


def id_of(text: str) -> int | None:
    """The number of a user or group that a field says; None for what is none, or too large."""
    found = whole_number(text)
    return found if found is not None and found <= _LARGEST else None


def used_ids(view: GuestOverlay, path: str) -> set[int]:
    """The numbers in a file of accounts."""
    found = (id_of(row[2]) for row in rows(view, path) if len(row) > 2)
    return {number for number in found if number is not None}


def rows(view: GuestOverlay, path: str) -> list[list[str]]:
    """The lines of a file of accounts, as their fields; `NotInGuestError` if there is no file."""
    content = view.read(path)
    if content is None:
        raise NotInGuestError("the guest has no such file", subject=path)
    return [line.split(":") for line in content.decode("utf-8", "surrogateescape").splitlines()]


def with_fields(view: GuestOverlay, path: str, name: str, fields: Mapping[int, str]) -> bool:
    """Give fields of the first line that begins with a name these values; whether they had others.

    All other lines stay as they are, to the byte.
    """
    content = view.read(path) or b""
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        row = line.decode("utf-8", "surrogateescape").split(":")
        if row[0] == name:
            row += [""] * (max(fields) + 1 - len(row))
            for at, value in fields.items():
                row[at] = value
            lines[number] = ":".join(row).encode("utf-8", "surrogateescape")
            break
    return view.write(path, b"\n".join(lines))


def with_line(view: GuestOverlay, path: str, line: str) -> None:
    """Add a line of accounts."""
    content = view.read(path) or b""
    if content and not content.endswith(b"\n"):
        content += b"\n"
    view.write(path, content + line.encode("utf-8", "surrogateescape") + b"\n")


@dataclass(frozen=True)
class Account:
    """A line of passwd."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str


def account(view: GuestOverlay, name: str) -> Account:
    """The user of that name; `NotInGuestError`, with the names that are near, if there is none."""
    known = []
    for row in rows(view, PASSWD):
        if row[0] == name:
            uid, gid = (id_of(row[2]), id_of(row[3])) if len(row) == 7 else (None, None)
            if uid is None or gid is None:
                raise ImgtoolError("the user's line in /etc/passwd is damaged", subject=name)
            return Account(name, uid, gid, row[5], row[6])
        known.append(row[0])
    raise missing("user", name, known)


def group_id(view: GuestOverlay, name: str) -> int:
    """The number of a group; `NotInGuestError` if there is no group of that name."""
    known = []
    for row in rows(view, GROUP):
        gid = id_of(row[2]) if len(row) >= 3 else None
        if row[0] == name and gid is not None:
            return gid
        known.append(row[0])
    raise missing("group", name, known)


def missing(what: str, name: str, known: list[str]) -> NotInGuestError:
    """The error for a name that the guest does not have; its hint has those that are near."""
    near = difflib.get_close_matches(name, known, 3)
    hint = f"it has: {', '.join(near)}" if near else None
    return NotInGuestError(f"the guest has no such {what}", subject=name, hint=hint)


def owner_in(view: GuestOverlay, text: str, kept: Owner = (0, 0)) -> Owner:
    """The numbers that `USER`, `USER:GROUP` or `:GROUP` mean in the guest; numbers are themselves.

    What is not given is that of `kept`; `USER` alone keeps the group.
    """
    user, _, group = text.partition(":")
    uid, gid = kept
    if user:
        number = id_of(user)
        uid = account(view, user).uid if number is None else number
    if group:
        number = id_of(group)
        gid = group_id(view, group) if number is None else number
    return uid, gid
