"""Keys with which users may log in."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import NotInGuestError, RefusedError, UsageError
from imgtool.inject.guest_files.passwd import Account, account
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import HOST_FILE, WORD, mapping
from imgtool.inject.steps.step import Option, Step, StepContext, host_file

_KEY_TYPES = re.compile(r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@.-]+")
_LONGEST_KEYS = 1 << 20


@dataclass(frozen=True)
class SshKey(Step):
    """Public keys with which a user may log in."""

    kind = "ssh-key"
    schema = mapping(
        {"user": WORD, "file": HOST_FILE, "key": WORD},
        description="A public key that may log in as the user.",
        required=("user",),
        one_of=("file", "key"),
    )
    option = Option("--ssh-key", "USER:FILE", "A public key that may log in.")
    user: str
    file: Path | None = None
    key: str | None = None

    @classmethod
    def from_spec(cls, value: Mapping[str, str], folder: Path) -> Sequence[Step]:
        """The key itself, or a file."""
        file = folder / value["file"] if "file" in value else None
        return [cls(value["user"], file, value.get("key"))]

    @classmethod
    def from_option(cls, text: str) -> Step:
        """The keys in a file."""
        user, file = cls.option.two_parts(text)
        return cls(user, Path(file))

    @property
    def subject(self) -> str:
        """The user."""
        return self.user

    def _keys(self) -> list[str]:
        text = self.key or ""
        if self.file is not None:
            text = host_file(self.file, _LONGEST_KEYS).decode("utf-8", "replace")
        return [x.strip() for x in text.splitlines() if x.strip() and x.strip()[0] != "#"]

    def check(self, variables: Mapping[str, str]) -> None:
        """They are public keys, each with the type that its name says."""
        keys = self._keys()
        if "PRIVATE KEY-----" in "".join(keys[:1]):
            raise UsageError(
                "this is a private key", subject=self.file, hint="give the file with .pub"
            )
        if not keys or not all(map(_is_public, keys)):
            raise UsageError(
                "not an SSH public key", subject=self.file or self.user,
                hint="such as ~/.ssh/id_ed25519.pub",
            )  # fmt: skip

    def apply(self, site: StepContext) -> bool:
        """Add those that are not in ~/.ssh/authorized_keys, which nobody else may write."""
        view = site.view
        owner = account(view, self.user)
        folder = f"{_home(view, owner)}/.ssh"
        numbers = (owner.uid, owner.gid)
        path = f"{folder}/authorized_keys"
        if owner.uid != 0:
            _refuse_links(view, folder, path)
        changed = view.folder(folder, mode=0o700, owner=numbers)
        old = view.read(path) or b""
        have = {_identity(line) for line in old.decode("utf-8", "replace").splitlines()}
        new = [key for key in self._keys() if _identity(key) not in have]
        end = b"\n" if old and not old.endswith(b"\n") else b""
        added = end + "".join(f"{key}\n" for key in new).encode() if new else b""
        return view.write(path, old + added, mode=0o600, owner=numbers) or changed


def _home(view: GuestOverlay, owner: Account) -> str:
    if not owner.home.startswith("/") or view.kind(owner.home) != "directory":
        raise NotInGuestError(f"{owner.name} has no home folder in the guest", subject=owner.home)
    return owner.home.rstrip("/")


def _refuse_links(view: GuestOverlay, *paths: str) -> None:
    """What is in a home is the user's to make, and what a link leads to would become the user's."""
    for path in paths:
        entry = view.lstat(path)
        if entry is not None and (
            entry.type == "symlink" or (entry.type == "file" and entry.nlink > 1)
        ):
            raise RefusedError(
                "a link in a user's home is not followed, nor a file of several names changed",
                subject=path,
                hint="delete it in a step before, or add the key to the right file with "
                "append-line",
            )


def _identity(line: str) -> tuple[str, ...]:
    """Type and key of a line; its options and comment are not what tells keys apart."""
    words = line.split()
    for at, word in enumerate(words[:-1]):
        if _KEY_TYPES.fullmatch(word):
            return word, words[at + 1]
    return (line.strip(),)


def _is_public(line: str) -> bool:
    words = line.split()
    if len(words) < 2 or not _KEY_TYPES.fullmatch(words[0]):
        return False
    try:
        blob = base64.b64decode(words[1], validate=True)
    except binascii.Error:
        return False
    # RFC 4253, 6.6: the type again, with its length before it.
    name = words[0].encode()
    return blob[: 4 + len(name)] == len(name).to_bytes(4, "big") + name
