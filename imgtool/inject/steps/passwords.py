"""Passwords: read from anywhere but the command line, written as hashes, shown nowhere."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgtool.errors import UsageError
from imgtool.inject.guest_files.login_defs import login_defs
from imgtool.inject.guest_files.passwd import PASSWD, SHADOW, account, rows, with_fields, with_line
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import HOST_FILE, WORD, mapping
from imgtool.inject.steps.step import Option, Step, StepContext, host_file

# crypt(5): what libcrypt takes, and more than anybody types.
_LONGEST = 511
_HASH = re.compile(r"[!*]+|\$[A-Za-z0-9]{1,8}\$[./A-Za-z0-9=,$]+")


@dataclass
class Secret:
    """Where a password comes from; it is read once, and is in no text that is made of this."""

    source: str
    name: str = field(default="", repr=False)
    _value: bytes | None = field(default=None, repr=False)

    def read(self, user: str) -> bytes:
        """The password, or with the source `hash` the hash."""
        if self._value is None:
            self._value = self._check(self._read(user), user)
        return self._value

    def _read(self, user: str) -> bytes:
        if self.source == "file":
            raw = host_file(Path(self.name), 4096)
            return raw.removesuffix(b"\n").removesuffix(b"\r")
        if self.source == "env":
            value = os.environb.get(os.fsencode(self.name))
            if value is None:
                raise UsageError("there is no such variable of the environment", subject=self.name)
            return value
        if self.source == "stdin":
            return sys.stdin.buffer.readline(4096).removesuffix(b"\n").removesuffix(b"\r")
        if self.source == "prompt":
            return _ask(user)
        return self.name.encode()

    def _check(self, value: bytes, user: str) -> bytes:
        if self.source == "hash":
            if not _HASH.fullmatch(value.decode("utf-8", "replace")):
                raise UsageError("not a hash as in /etc/shadow", subject=user)
        elif not value or len(value) > _LONGEST or b"\0" in value or b"\n" in value:
            raise UsageError(
                f"a password is one line of 1 to {_LONGEST} bytes; this is not", subject=user
            )
        return value


def _ask(user: str) -> bytes:
    import getpass

    if not sys.stdin.isatty():
        raise UsageError("a password is asked for on a terminal, and there is none", subject=user)
    first = getpass.getpass(f"Password of {user}: ")
    if getpass.getpass("Once more: ") != first:
        raise UsageError("the two are not the same", subject=user)
    return os.fsencode(first)


@dataclass(frozen=True)
class Password(Step):
    """The password of a user."""

    kind = "password"
    schema = mapping(
        {"user": WORD, "file": HOST_FILE, "env": WORD, "hash": WORD},
        description="The password of a user, from a file or a variable of the environment, "
        "or hashed as in shadow.",
        required=("user",),
        one_of=("file", "env", "hash"),
    )
    option = Option(
        "--password", "USER:file:FILE", "A password: file:FILE, env:NAME, stdin, prompt."
    )
    user: str
    secret: Secret = field(repr=False)

    @classmethod
    def from_spec(cls, value: Mapping[str, str], folder: Path) -> Sequence[Step]:
        """From a file, a variable, or as a hash."""
        source = next(name for name in ("file", "env", "hash") if name in value)
        name = str(folder / value[source]) if source == "file" else value[source]
        return [cls(value["user"], Secret(source, name))]

    @classmethod
    def from_option(cls, text: str) -> Step:
        """From anywhere but the command line itself."""
        user, _, source = text.partition(":")
        kind, _, name = source.partition(":")
        # What was typed is not repeated: somebody may have typed the password.
        if (
            not user
            or kind not in ("file", "env", "prompt", "stdin")
            or bool(name) != (kind in ("file", "env"))
        ):
            raise UsageError(
                "--password takes USER:file:FILE, USER:env:NAME, USER:stdin or USER:prompt",
                hint="a password on the command line can be seen by everybody on this machine",
            )
        return cls(user, Secret(kind, name))

    @property
    def subject(self) -> str:
        """The user."""
        return self.user

    def check(self, variables: Mapping[str, str]) -> None:
        """The password can be read, and is one."""
        self.secret.read(self.user)

    def apply(self, site: StepContext) -> bool:
        """Write its hash, unless the one that is there is of the same password."""
        from imgtool.inject import crypt

        view = site.view
        account(view, self.user)
        shadowed = view.read(SHADOW) is not None
        stored = _find_hash(view, SHADOW if shadowed else PASSWD, self.user)
        secret = self.secret.read(self.user)
        if self.secret.source == "hash":
            new = secret.decode("ascii")
            if stored == new:
                return False
        else:
            if stored is not None and crypt.verifies(secret, stored):
                return False
            new = crypt.hash_password(secret, _method(view))
        if not shadowed:
            return with_fields(view, PASSWD, self.user, {1: new})
        today = str(int(time.time()) // 86400)
        if stored is None:
            with_line(view, SHADOW, f"{self.user}:{new}:{today}:0:99999:7:::")
            return True
        return with_fields(view, SHADOW, self.user, {1: new, 2: today})


def _find_hash(view: GuestOverlay, path: str, user: str) -> str | None:
    return next((row[1] for row in rows(view, path) if row[0] == user and len(row) > 1), None)


def _method(view: GuestOverlay) -> str:
    """The kind of hash that the guest itself would make; SHA-512 is known to every guest."""
    from imgtool.inject import crypt

    if login_defs(view).get("ENCRYPT_METHOD", "").upper() == "YESCRYPT":
        return crypt.YESCRYPT
    for name in ("common-password", "system-auth"):
        text = view.read(f"/etc/pam.d/{name}") or b""
        if re.search(rb"^\s*password\s.*pam_unix\.so.*\byescrypt\b", text, re.MULTILINE):
            return crypt.YESCRYPT
    return crypt.SHA512
