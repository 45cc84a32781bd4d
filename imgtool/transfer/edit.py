"""Changing the text of one file: by expressions, by keys and values, or in an editor.

Contents are bytes throughout: a file that is not UTF-8, or has DOS line ends, is changed only where
it is meant to be.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imgtool.errors import HostError, ImgtoolError, NotInGuestError, RefusedError, UsageError
from imgtool.host import interrupt
from imgtool.host.process import interactive
from imgtool.host.scratch import scratch_folder

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest
    from imgtool.guest.writable import WritableGuest

# Gives the new content for the old one.
Change = Callable[[bytes], bytes]

LARGEST = 64 << 20
_FLAGS = {"g", "i"}


@dataclass(frozen=True)
class Substitution:
    """`s/PATTERN/REPLACEMENT/FLAGS`: in each line the first match is replaced, with `g` every one.

    PATTERN and REPLACEMENT are those of Python's `re`; `i` ignores case. Any character that is not
    a letter, digit, backslash or space can stand for the slash.
    """

    pattern: re.Pattern[bytes]
    replacement: bytes
    every: bool

    @classmethod
    def parse(cls, text: str) -> Substitution:
        """Raises `UsageError` for what is no substitution, saying what is wrong with it."""
        hint = "such as 's/PermitRootLogin.*/PermitRootLogin no/'"
        if len(text) < 2 or text[0] != "s" or text[1].isalnum() or text[1] in "\\ \n":
            raise UsageError("not a substitution", subject=text, hint=hint)
        mark = text[1]
        parts = _split(text[2:], mark)
        if len(parts) != 3 or not set(parts[2]) <= _FLAGS:
            raise UsageError(
                f"a substitution has two parts and flags (g, i) between '{mark}'",
                subject=text,
                hint=hint,
            )
        flags = re.IGNORECASE if "i" in parts[2] else 0
        replacement = parts[1].encode("utf-8", "surrogateescape")
        try:
            pattern = re.compile(parts[0].encode("utf-8", "surrogateescape"), flags)
            # The template is looked at only when it is used: an empty match uses it.
            re.compile(pattern.pattern + b"|", flags).sub(replacement, b"", count=1)
        except (re.error, IndexError) as error:
            raise UsageError(f"not a regular expression: {error}", subject=text) from error
        return cls(pattern, replacement, "g" in parts[2])

    def apply(self, content: bytes) -> bytes:
        """The content with the replacements; what ends a line is not matched."""
        lines = []
        for line in content.splitlines(keepends=True):
            text = line.rstrip(b"\r\n")
            changed = self.pattern.sub(self.replacement, text, count=0 if self.every else 1)
            lines.append(changed + line[len(text) :])
        return b"".join(lines)


def _split(text: str, mark: str) -> list[str]:
    """Parts between marks; a backslash before a mark makes it an ordinary character."""
    parts, part, at = [], "", 0
    while at < len(text):
        if text[at] == "\\" and at + 1 < len(text):
            part += text[at + 1] if text[at + 1] == mark else text[at : at + 2]
            at += 2
        elif text[at] == mark:
            parts.append(part)
            part, at = "", at + 1
        else:
            part, at = part + text[at], at + 1
    return [*parts, part]


# Files whose lines are rows of a table.
_TABLES = frozenset(
    b"/etc/" + name
    for name in (
        *(b"crontab", b"crypttab", b"exports", b"fstab", b"group", b"gshadow", b"hosts"),
        *(b"inittab", b"passwd", b"protocols", b"services", b"shadow", b"subgid", b"subuid"),
        *(b"sudoers", b"networks", b"hosts.allow", b"hosts.deny"),
    )
)


@dataclass(frozen=True)
class Setting:
    """`KEY=VALUE` for files of keys and values, with `=`, `:` or white space between the two.

    The line that has the key gets the value; what stands around it stays. Without such a line one
    is added behind a commented one, or at the end.
    """

    key: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Raises `UsageError` for what is no KEY=VALUE."""
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or re.search(r"[\s#]", key.strip()) or "\n" in value:
            raise UsageError("not KEY=VALUE", subject=text, hint="such as --set PermitRootLogin=no")
        return cls(key.strip(), value)

    def _pattern(self) -> tuple[bytes, bytes]:
        """What finds the key, and what finds it with what stands before its value."""
        key = re.escape(self.key.encode("utf-8", "surrogateescape"))
        return key, rb"(?:export[ \t]+)?" + key + rb"(?:[ \t]*[=:][ \t]*|[ \t]+)"

    def is_in(self, content: bytes) -> bool:
        """Whether a line has the key, and is no comment."""
        assigned = re.compile(rb"[ \t]*" + self._pattern()[1])
        return any(map(assigned.match, content.splitlines()))

    def apply(self, content: bytes) -> bytes:
        """The content with the value set; every line that sets the key gets it."""
        value = self.value.encode("utf-8", "surrogateescape")
        key, either = self._pattern()
        assigned = re.compile(rb"([ \t]*" + either + rb")")
        # What a comment says about a key is prose, unless the key stands right behind its mark.
        commented = re.compile(
            rb"[ \t]*[#;](?:(" + either + rb")|[ \t]+(" + key + rb"[ \t]*[=:][ \t]*))"
        )
        lines = content.splitlines(keepends=True)
        found = False
        for number, line in enumerate(lines):
            text = line.rstrip(b"\r\n")
            if matched := assigned.match(text):
                lines[number] = matched[1] + value + line[len(text) :]
                found = True
        if found:
            return b"".join(lines)
        end = b"\r\n" if lines and lines[0].endswith(b"\r\n") else b"\n"
        for number, line in enumerate(lines):
            if matched := commented.match(line.rstrip(b"\r\n")):
                lines[number] = _with_line_end(line, end)
                lines.insert(number + 1, (matched[1] or matched[2]) + value + end)
                return b"".join(lines)
        if lines:
            lines[-1] = _with_line_end(lines[-1], end)
        separator = b"=" if _uses_equals(lines) else b" "
        return b"".join(
            [*lines, self.key.encode("utf-8", "surrogateescape") + separator + value + end]
        )


def refuse_settings(path: bytes) -> None:
    """Raise `UsageError` for a file of the guest that is known to have no keys and values: a line
    that is added to it, or replaced, would break it.
    """
    if path in _TABLES:
        raise UsageError(
            "this file has no keys and values, so --set would break it",
            subject=os.fsdecode(path),
            hint="change it with -e 's/RE/TEXT/', or in an editor",
        )


def _with_line_end(line: bytes, end: bytes) -> bytes:
    return line if line.endswith((b"\n", b"\r")) else line + end


def _uses_equals(lines: Sequence[bytes]) -> bool:
    """Whether `=` is what stands between keys and values here; where nothing tells, it is."""
    with_equals = spaced = 0
    for line in lines:
        if re.match(rb"[ \t]*[\w.-]+[ \t]*=", line):
            with_equals += 1
        elif re.match(rb"[ \t]*[\w.-]+[ \t]+\S", line):
            spaced += 1
    return with_equals >= spaced


def all_of(changes: Sequence[Change]) -> Change:
    """One change after the other."""

    def change(content: bytes) -> bytes:
        for one in changes:
            content = one(content)
        return content

    return change


def in_editor(name: str, words: Sequence[str]) -> Change:
    """A change by a person: `words` is the editor, which gets a private copy called `name`.

    Raises `ImgtoolError` if the editor fails: then nothing is to be changed.
    """

    def change(content: bytes) -> bytes:
        with scratch_folder("edit") as folder:
            copy = folder / name
            with os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(content)
            status = interactive([*words, str(copy)])
            if status != 0:
                raise ImgtoolError(
                    f"the editor ended with status {status}; nothing was changed",
                    subject=words[0],
                )
            return copy.read_bytes()

    return change


@contextlib.contextmanager
def kept_if_refused(name: str, content: bytes, notice: Callable[[str], None]) -> Iterator[None]:
    """Keep what a person wrote in a private file of the host if the block that writes it fails.

    The hint of the error says where; `notice` does for Ctrl-C, which has no hint.
    """
    try:
        yield
    except BaseException as error:
        descriptor, kept = tempfile.mkstemp(prefix="imgtool-edit-", suffix=f"-{name}")  # mode 0600
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
        line = f"what you wrote is kept in {kept}"
        if isinstance(error, ImgtoolError) and not interrupt.pending():
            error.hint = f"{error.hint}; {line}" if error.hint else line
        else:
            notice(line)
        raise


def read_to_edit(guest: Guest, path: str, *, backup: str | None = None) -> tuple[bytes, bytes]:
    """The path without links and the content of a file that is to be edited.

    Raises `ImgtoolError` for what is no regular file or larger than `LARGEST`, `NotInGuestError`
    for what is not there, and `RefusedError` where the `backup` would overwrite something.
    """
    found = guest.resolve(path)
    kind = guest.lstat(found).type
    if kind != "file":
        raise ImgtoolError(f"not a regular file but a {kind}", subject=path)
    if backup is not None:
        backup_of(guest, found, backup)
    return found, guest.read_bytes(found, LARGEST)


def backup_of(guest: Guest, path: bytes, ending: str) -> bytes:
    """The name of a file's backup; `RefusedError` if there is something of that name.

    An older backup is kept, and what a user of the guest put there, such as a link to another
    file, is neither followed nor replaced.
    """
    name = path + os.fsencode(ending)
    try:
        guest.lstat(name)
    except NotInGuestError:
        return name
    raise RefusedError(
        "the backup would overwrite what is there; nothing was changed",
        subject=os.fsdecode(name),
        hint="choose another ending, such as -b .bak2",
    )


def write_edited(
    guest: WritableGuest, path: bytes, old: bytes, new: bytes, *, backup: str | None
) -> None:
    """Replace the content that was edited, once it is sure that it still is the one in the guest.

    With `backup` a copy of the old file is kept beside it, under the name with that ending. Raises
    `RefusedError` where the file has changed meanwhile, or something has that name.
    """
    now = guest.resolve(path)
    if guest.read_bytes(now, LARGEST) != old:
        raise RefusedError("the file has changed since it was read", subject=os.fsdecode(path))
    if backup is not None:
        guest.copy(now, backup_of(guest, now, backup))
    guest.rewrite(now, new)


def editor_words() -> list[str]:
    """The user's editor: $VISUAL, $EDITOR, or vi. Raises `HostError` if it is not installed."""
    import shlex
    import shutil

    for name in ("VISUAL", "EDITOR"):
        if words := shlex.split(os.environ.get(name, "")):
            break
    else:
        words = ["vi"]
    if shutil.which(words[0]) is None:
        raise HostError(
            "the editor is not installed",
            subject=words[0],
            hint="set EDITOR, or change the file with -e or --set",
        )
    return words
