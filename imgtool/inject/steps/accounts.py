"""Users: their lines as shadow-utils writes them, and their homes."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NotRequired, TypedDict

from imgtool.errors import ImgtoolError, NotInGuestError, UsageError
from imgtool.guest.changes import Owner
from imgtool.inject.guest_files.login_defs import login_defs, number, useradd_defaults
from imgtool.inject.guest_files.passwd import (
    GROUP,
    GSHADOW,
    PASSWD,
    SHADOW,
    account,
    group_id,
    id_of,
    rows,
    used_ids,
    with_fields,
    with_line,
)
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import NAMES, PATH, TEXT, WORD, YES_OR_NO, Schema, mapping
from imgtool.inject.steps.step import Option, Step, StepContext

# useradd(8), of Debian and others.
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_SUDOERS = "/etc/sudoers.d"


class _User(TypedDict):
    """A user in a spec, as the schema has it."""

    name: str
    uid: NotRequired[int]
    comment: NotRequired[str]
    home: NotRequired[str]
    shell: NotRequired[str]
    groups: NotRequired[str | list[str]]
    system: NotRequired[bool]
    sudo: NotRequired[bool | str]


@dataclass(frozen=True)
class User(Step):
    """A user that the guest has, with at least these groups."""

    kind = "user"
    schema: ClassVar[Schema] = {
        "description": "A user; a name alone takes the guest's own defaults.",
        "anyOf": [
            WORD,
            mapping(
                {
                    "name": WORD,
                    "uid": {"type": "integer", "minimum": 1, "maximum": 4294967293},
                    "comment": TEXT,
                    "home": PATH,
                    "shell": PATH,
                    "groups": {**NAMES, "description": "Further groups, which the guest has."},
                    "system": {
                        **YES_OR_NO,
                        "description": "A number below UID_MIN, and no home.",
                    },
                    "sudo": {
                        "description": "May become root by sudo: with the own password, or "
                        "without.",
                        "enum": [True, False, "password", "nopasswd"],
                    },
                },
                required=("name",),
            ),
        ],
    }
    option = Option("--user", "NAME[:GROUP,...][:sudo]", "Have a user.")
    name: str
    uid: int | None = None
    comment: str | None = None
    home: str | None = None
    shell: str | None = None
    groups: Sequence[str] = ()
    system: bool = False
    sudo: bool | str = False

    @classmethod
    def from_spec(cls, value: str | _User, folder: Path) -> Sequence[Step]:
        """A name, or all that is said of the user."""
        if isinstance(value, str):
            return [cls(value)]
        groups = value.get("groups", ())
        several = (groups,) if isinstance(groups, str) else tuple(groups)
        return [replace(cls(**value), groups=several)]

    @classmethod
    def from_option(cls, text: str) -> Step:
        """A name, groups between commas, and whether the user may become root."""
        name, *rest = text.split(":")
        sudo = rest[-1:] == ["sudo"]
        groups = rest[: len(rest) - sudo]
        if len(groups) > 1:
            raise UsageError(
                "--user takes NAME, NAME:GROUP,... and ':sudo' at its end", subject=text
            )
        return cls(name, groups=tuple(g for g in "".join(groups).split(",") if g), sudo=sudo)

    @property
    def subject(self) -> str:
        """The name."""
        return self.name

    def check(self, variables: Mapping[str, str]) -> None:
        """The name is one, and nothing would break a line of passwd."""
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                "not a user name: small letters, digits, '_' and '-', at most 32", subject=self.name
            )
        for value in (self.comment, self.home, self.shell):
            if value is not None and re.search(r"[:\n\0]", value):
                raise UsageError("no ':' and no line end can be in this", subject=value)

    def apply(self, site: StepContext) -> bool:
        """Make the user, or have the one that is there have what is given."""
        view = site.view
        if any(row[0] == self.name for row in rows(view, PASSWD)):
            changed = self._amended(view)
        else:
            self._make(view)
            changed = True
        for group in self.groups:
            changed |= _joined(view, self.name, group)
        if self.sudo:
            changed |= self._may_become_root(view)
        return changed

    def _amended(self, view: GuestOverlay) -> bool:
        found = account(view, self.name)
        if self.uid is not None and found.uid != self.uid:
            raise ImgtoolError(f"the user is there with the number {found.uid}", subject=self.name)
        if self.home is not None and found.home != self.home:
            raise ImgtoolError(f"the user is there with the home {found.home}", subject=self.name)
        fields = {4: self.comment, 6: self.shell}
        given = {at: value for at, value in fields.items() if value is not None}
        return with_fields(view, PASSWD, self.name, given) if given else False

    def _make(self, view: GuestOverlay) -> None:
        defs, defaults = login_defs(view), useradd_defaults(view)
        uid = self.uid if self.uid is not None else _free_number(view, PASSWD, defs, self.system)
        taken = {row[2]: row[0] for row in rows(view, PASSWD) if len(row) > 2}
        if str(uid) in taken:
            raise ImgtoolError(f"the number {uid} is that of {taken[str(uid)]}", subject=self.name)
        gid = self._primary_group(view, defs, uid)
        home = self.home or f"{defaults.get('HOME', '/home').rstrip('/')}/{self.name}"
        shadowed = view.read(SHADOW) is not None
        fields = [self.name, "x" if shadowed else "!", uid, gid, self.comment or "", home]
        with_line(view, PASSWD, ":".join(map(str, [*fields, self.shell or self._shell(view)])))
        if shadowed:
            with_line(view, SHADOW, f"{self.name}:!:{_ageing(defs, self.system)}")
        if not self.system:
            for path in ("/etc/subuid", "/etc/subgid"):
                _subordinate(view, path, self.name, defs)
            _make_home(view, home, (uid, gid), defs, defaults.get("SKEL", "/etc/skel"))

    def _primary_group(self, view: GuestOverlay, defs: Mapping[str, str], uid: int) -> int:
        known = {row[0]: row[2] for row in rows(view, GROUP) if len(row) > 2}
        if self.name in known:
            return group_id(view, self.name)
        gid = uid
        if str(uid) in known.values():
            gid = _free_number(view, GROUP, defs, self.system)
        with_line(view, GROUP, f"{self.name}:x:{gid}:")
        if view.read(GSHADOW) is not None:
            with_line(view, GSHADOW, f"{self.name}:!::")
        return gid

    def _shell(self, view: GuestOverlay) -> str:
        if self.system:
            choices = ["/usr/sbin/nologin", "/sbin/nologin", "/bin/false"]
        else:
            # Debian's useradd says /bin/sh, and its adduser gives everybody bash.
            preset = useradd_defaults(view).get("SHELL", "")
            choices = [preset] if preset not in ("", "/bin/sh") else []
            choices += ["/bin/bash", "/bin/sh"]
        return next((one for one in choices if view.kind(one) == "file"), choices[-1])

    def _may_become_root(self, view: GuestOverlay) -> bool:
        main = view.read("/etc/sudoers")
        if main is None:
            raise NotInGuestError("the guest has no sudo", subject="/etc/sudoers")
        if not re.search(rb"^[#@]includedir\s+/etc/sudoers\.d\s*$", main, re.MULTILINE):
            raise ImgtoolError("the guest's sudo does not read this folder", subject=_SUDOERS)
        free = "NOPASSWD: " if self.sudo == "nopasswd" else ""
        changed = view.folder(_SUDOERS, new_mode=0o750)
        line = f"{self.name} ALL=(ALL:ALL) {free}ALL\n"
        path = f"{_SUDOERS}/90-imgtool-{self.name}"
        return view.write(path, line.encode(), mode=0o440, owner=(0, 0)) or changed


def _free_number(view: GuestOverlay, path: str, defs: Mapping[str, str], system: bool) -> int:
    """The next free number, as shadow-utils finds it: one more than the highest that is used, or
    for the system one less than the lowest (find_new_uid.c); past the end the first free one."""
    what = "UID" if path == PASSWD else "GID"
    used = used_ids(view, path)
    if path == PASSWD:  # the group of the user gets the same number, if it can
        used |= used_ids(view, GROUP)
    if system:
        lowest = number(defs, f"SYS_{what}_MIN", 101)
        highest = number(defs, f"SYS_{what}_MAX", number(defs, f"{what}_MIN", 1000) - 1)
        order = range(highest, lowest - 1, -1)
        taken = [one for one in used if lowest <= one <= highest]
        first = min(taken) - 1 if taken else highest
    else:
        lowest, highest = number(defs, f"{what}_MIN", 1000), number(defs, f"{what}_MAX", 60000)
        order = range(lowest, highest + 1)
        taken = [one for one in used if lowest <= one <= highest]
        first = max(taken) + 1 if taken else lowest
    if lowest <= first <= highest:
        return first
    for candidate in order:
        if candidate not in used:
            return candidate
    raise ImgtoolError("no number is left for a user", subject=f"{lowest}-{highest}")


def _ageing(defs: Mapping[str, str], system: bool) -> str:
    today = int(time.time()) // 86400
    if system:
        return f"{today}::::::"
    days = [number(defs, f"PASS_{x}", y) for x, y in (("MIN_DAYS", 0), ("MAX_DAYS", 99999))]
    return f"{today}:{days[0]}:{days[1]}:{number(defs, 'PASS_WARN_AGE', 7)}:::"


def _subordinate(view: GuestOverlay, path: str, name: str, defs: Mapping[str, str]) -> None:
    """Numbers for the user's containers, where the guest gives such: subuid(5)."""
    if view.read(path) is None:
        return
    what = "SUB_UID" if path.endswith("uid") else "SUB_GID"
    first = number(defs, f"{what}_MIN", 100000)
    count = number(defs, f"{what}_COUNT", 65536)
    for row in rows(view, path):
        if row[0] == name:
            return
        start, size = (id_of(row[1]), id_of(row[2])) if len(row) == 3 else (None, None)
        if start is not None and size is not None:
            first = max(first, start + size)
    with_line(view, path, f"{name}:{first}:{count}")


def _make_home(
    view: GuestOverlay, home: str, owner: Owner, defs: Mapping[str, str], skeleton: str
) -> None:
    if view.kind(home) is not None:
        return  # as useradd: what is there is somebody's
    mode = number(defs, "HOME_MODE", 0o777 & ~number(defs, "UMASK", 0o022))
    view.folder(home, mode=mode, owner=owner)
    _like(view, skeleton, home, owner)


def _like(view: GuestOverlay, source: str, target: str, owner: Owner) -> None:
    for name in view.names(source):
        entry = view.lstat(f"{source}/{name}")
        here = f"{target}/{name}"
        if entry is None:
            continue
        bits = stat.S_IMODE(entry.mode) & 0o777
        if entry.type == "directory":
            view.folder(here, mode=bits, owner=owner)
            _like(view, f"{source}/{name}", here, owner)
        elif entry.type == "symlink":
            view.symlink(
                here, (entry.target or b"").decode("utf-8", "surrogateescape"), owner=owner
            )
        elif entry.type == "file":
            view.write(here, view.read(f"{source}/{name}") or b"", mode=bits, owner=owner)


def _joined(view: GuestOverlay, user: str, group: str) -> bool:
    group_id(view, group)  # it is there
    changed = False
    for path in (GROUP, GSHADOW):
        if view.read(path) is None:
            continue
        for row in rows(view, path):
            members = [] if len(row) < 4 or not row[3] else row[3].split(",")
            if row[0] == group and user not in members:
                changed |= with_fields(view, path, group, {3: ",".join([*members, user])})
    return changed
