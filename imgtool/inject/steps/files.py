"""Steps on files and folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from imgtool.errors import ImgtoolError, NotInGuestError, UsageError
from imgtool.inject.guest_files.passwd import owner_in
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import (
    HOST_FILE,
    MODE,
    OWNER,
    PATH,
    TEXT,
    WORD,
    YES_OR_NO,
    Schema,
    mapping,
)
from imgtool.inject.steps.step import (
    Option,
    Step,
    StepContext,
    filled,
    guest_path,
    host_file,
    octal,
)

_TEMPLATE = 16 << 20
_FROM_HOST = "SRC:DEST, and DEST is absolute"


@dataclass(frozen=True)
class _OnPath(Step):
    path: str

    @property
    def subject(self) -> str:
        """The path in the guest."""
        return self.path

    def check(self, variables: Mapping[str, str]) -> None:
        """The path makes sense."""
        guest_path(self.path)

    @classmethod
    def from_spec(cls, value: object, folder: Path) -> Sequence[Step]:
        """A source is a file of the host, an owner may be a number."""
        if isinstance(value, dict):
            value = dict(value)
            if "source" in value:
                value["source"] = folder / value["source"]
            if "owner" in value:
                value["owner"] = str(value["owner"])
        return super().from_spec(value, folder)


@dataclass(frozen=True)
class _WithOwner(_OnPath):
    mode: str | int | None = None
    owner: str | None = None

    def check(self, variables: Mapping[str, str]) -> None:
        """Path, mode and owner make sense."""
        super().check(variables)
        octal(self.mode)
        if self.owner is not None:
            _owner_form(self.owner)

    def _have(
        self, view: GuestOverlay, path: str, content: bytes | Path, new_mode: int = 0o644
    ) -> bool:
        return view.write(
            path,
            content,
            mode=octal(self.mode),
            owner=None if self.owner is None else owner_in(view, self.owner),
            new_mode=new_mode,
        )


def _owner_form(text: str) -> None:
    user, colon, group = text.partition(":")
    if (not user and not group) or ":" in group or (colon and not group):
        raise UsageError("an owner is USER, USER:GROUP or :GROUP", subject=text)


@dataclass(frozen=True)
class Write(_WithOwner):
    """A file with this text."""

    kind = "write"
    schema = mapping(
        {"path": PATH, "content": TEXT, "mode": MODE, "owner": OWNER},
        description="A file with this text.",
        required=("path", "content"),
    )
    option = Option("--write", "PATH:TEXT", "A file of one line.")
    content: str = ""

    @classmethod
    def from_option(cls, text: str) -> Step:
        """The text gets a line end, unless there is none."""
        path, colon, content = text.partition(":")
        if not colon:
            raise UsageError("--write takes PATH:TEXT", subject=path)
        return cls(path, content=content + "\n" if content else "")

    def apply(self, site: StepContext) -> bool:
        """A file that is there keeps its mode and owner unless they are given."""
        return self._have(site.view, self.path, os.fsencode(self.content))


@dataclass(frozen=True)
class Template(_WithOwner):
    """A file from a text with `{{ NAME }}` in it, which is `content` or in the file `source`."""

    kind = "template"
    schema = mapping(
        {"path": PATH, "source": HOST_FILE, "content": TEXT, "mode": MODE, "owner": OWNER},
        description="A file from a text in which {{ NAME }} stands for a variable.",
        required=("path",),
        one_of=("source", "content"),
    )
    option = Option("--template", "SRC:DEST", "Copy a text, its {{ NAME }} filled in.")
    source: Path | None = None
    content: str | None = None

    @classmethod
    def from_option(cls, text: str) -> Step:
        """From a file of the host."""
        source, path = cls.option.with_path(text, _FROM_HOST)
        return cls(path, source=Path(source))

    def _text(self) -> str:
        if self.source is None:
            return self.content or ""
        return host_file(self.source, _TEMPLATE).decode("utf-8", "surrogateescape")

    def check(self, variables: Mapping[str, str]) -> None:
        """The source can be read, and every variable in it is given."""
        super().check(variables)
        filled(self._text(), variables, self.source or self.path)

    def apply(self, site: StepContext) -> bool:
        """The text with the variables of this image."""
        text = site.filled(self._text(), self.source or self.path)
        return self._have(site.view, self.path, text.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Copy(_WithOwner):
    """A file or folder of the host.

    `path` is its name in the guest; a file goes into a folder that has this name, and with a slash
    at the end everything does. Times are those of the copying; the owner is root unless given.
    """

    kind = "copy"
    schema = mapping(
        {"source": HOST_FILE, "path": PATH, "mode": MODE, "owner": OWNER},
        description="A file or folder of the host; "
        "a 'path' with a slash at its end is a folder to copy into.",
        required=("source", "path"),
    )
    option = Option("--copy", "SRC:DEST", "Copy a host file or folder.")
    source: Path = Path()

    @classmethod
    def from_option(cls, text: str) -> Step:
        """With mode and owner as the source has and root is."""
        source, path = cls.option.with_path(text, _FROM_HOST)
        return cls(path, source=Path(source))

    def check(self, variables: Mapping[str, str]) -> None:
        """Everything below the source can be read."""
        super().check(variables)
        try:
            for path, status in _below(self.source):
                if stat.S_ISREG(status.st_mode):
                    with path.open("rb"):
                        pass
        except OSError as error:
            raise ImgtoolError(
                f"cannot be read: {error.strerror}", subject=error.filename or self.source
            ) from error

    def apply(self, site: StepContext) -> bool:
        """Folders are merged into those that are there, files replace the content of files."""
        view = site.view
        is_folder = self.source.is_dir()
        top = self.path
        if top.endswith("/") or (not is_folder and view.kind(top) == "directory"):
            if view.kind(top) is None:
                raise NotInGuestError("no such folder in the guest", subject=top)
            top = f"{top.rstrip('/')}/{self.source.name or self.source.resolve().name}"
        owner = (0, 0) if self.owner is None else owner_in(view, self.owner)
        different = False
        for path, status in _below(self.source):
            relative = path.relative_to(self.source)
            here = top if relative == Path() else f"{top}/{relative}"
            bits = stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                given = owner if self.owner else None
                different |= view.folder(here, owner=given, new_mode=bits, new_owner=owner)
            elif stat.S_ISLNK(status.st_mode):
                different |= view.symlink(here, os.readlink(path), owner=owner)  # noqa: PTH115
            elif stat.S_ISREG(status.st_mode):
                different |= self._have(view, here, path, bits)
        return different


def _below(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A host path, its link followed, and everything below it; other links are not followed."""
    yield path, path.stat()
    if path.is_dir():
        for child in sorted(path.iterdir()):
            status = child.lstat()
            if stat.S_ISDIR(status.st_mode):
                yield from _below(child)
            else:
                yield child, status


@dataclass(frozen=True)
class AppendLine(_OnPath):
    """A line that a file has, at its end if nowhere else."""

    kind = "append-line"
    schema = mapping(
        {"path": PATH, "line": TEXT},
        description="A line that a file has; added at its end where it has not.",
        required=("path", "line"),
    )
    option = Option("--append-line", "PATH:LINE", "A line that a file has.")
    line: str = ""

    @classmethod
    def from_option(cls, text: str) -> Step:
        """The line may have colons."""
        path, line = cls.option.two_parts(text)
        return cls(path, line=line)

    def check(self, variables: Mapping[str, str]) -> None:
        """It is one line."""
        super().check(variables)
        if "\n" in self.line or "\r" in self.line:
            raise UsageError("a line has no line end in it", subject=self.path)

    def apply(self, site: StepContext) -> bool:
        """Add it with the file's own kind of line end; a file that is not there is made."""
        old = site.view.read(self.path) or b""
        line = os.fsencode(self.line)
        if line in (have.rstrip(b"\r\n") for have in old.splitlines(keepends=True)):
            return False
        end = b"\r\n" if b"\r\n" in old else b"\n"
        if old and not old.endswith(b"\n"):
            old += end
        return site.view.write(self.path, old + line + end)


@dataclass(frozen=True)
class MakeFolder(_WithOwner):
    """A folder, and those above it."""

    kind = "mkdir"
    schema: ClassVar[Schema] = {
        "description": "A folder, and those above it.",
        "anyOf": [
            PATH,
            mapping({"path": PATH, "mode": MODE, "owner": OWNER}, required=("path",)),
        ],
    }
    option = Option("--mkdir", "PATH", "Have a folder.")

    def apply(self, site: StepContext) -> bool:
        """One that is there keeps its mode and owner unless they are given."""
        owner = None if self.owner is None else owner_in(site.view, self.owner)
        return site.view.folder(self.path, mode=octal(self.mode), owner=owner)


@dataclass(frozen=True)
class ChangeMode(_OnPath):
    """The mode of what is at a path; a link is followed."""

    kind = "chmod"
    schema = mapping({"path": PATH, "mode": MODE}, required=("path", "mode"))
    option = Option("--chmod", "MODE:PATH", "Change a mode.")
    mode: str | int = "0644"

    @classmethod
    def from_option(cls, text: str) -> Step:
        """The path may have colons."""
        mode, path = cls.option.two_parts(text)
        return cls(path, mode=mode)

    def check(self, variables: Mapping[str, str]) -> None:
        """Path and mode make sense."""
        super().check(variables)
        octal(self.mode)

    def apply(self, site: StepContext) -> bool:
        """Set it."""
        bits = octal(self.mode)
        assert bits is not None
        return site.view.chmod(self.path, bits)


@dataclass(frozen=True)
class ChangeOwner(_OnPath):
    """The owner of what is at a path, by the guest's own names; with `recursive` of all below."""

    kind = "chown"
    schema = mapping(
        {"path": PATH, "owner": OWNER, "recursive": YES_OR_NO}, required=("path", "owner")
    )
    option = Option("--chown", "USER:GROUP:PATH", "Change an owner.")
    owner: str = ""
    recursive: bool = False

    @classmethod
    def from_option(cls, text: str) -> Step:
        """Of the path alone, not of what is below it."""
        owner, path = cls.option.with_path(text)
        return cls(path, owner=owner)

    def check(self, variables: Mapping[str, str]) -> None:
        """Path and owner make sense."""
        super().check(variables)
        _owner_form(self.owner)

    def apply(self, site: StepContext) -> bool:
        """Set it; below a folder links get it themselves."""
        view = site.view
        return self._own(view, view.place(self.path, follow=True))

    def _own(self, view: GuestOverlay, path: str) -> bool:
        entry = view.lstat(path)
        kept = (entry.uid, entry.gid) if entry else (0, 0)
        different = view.chown(path, owner_in(view, self.owner, kept), follow=False)
        if self.recursive and entry is not None and entry.type == "directory":
            for name in view.names(path):
                different |= self._own(view, f"{path.rstrip('/')}/{name}")
        return different


@dataclass(frozen=True)
class Link(_OnPath):
    """A symbolic link."""

    kind = "link"
    schema = mapping(
        {"path": PATH, "target": WORD},
        description="A symbolic link at 'path'.",
        required=("path", "target"),
    )
    option = Option("--link", "PATH:TARGET", "A symbolic link at PATH.")
    target: str = ""

    @classmethod
    def from_option(cls, text: str) -> Step:
        """The target may have colons."""
        path, target = cls.option.two_parts(text)
        return cls(path, target=target)

    def check(self, variables: Mapping[str, str]) -> None:
        """The link leads to something."""
        super().check(variables)
        if not self.target or "\0" in self.target:
            raise UsageError("a link has a target", subject=self.path)

    def apply(self, site: StepContext) -> bool:
        """Made in the place of what is no folder."""
        return site.view.symlink(self.path, self.target)


@dataclass(frozen=True)
class Delete(_OnPath):
    """Nothing at a path."""

    kind = "delete"
    schema: ClassVar[Schema] = {"description": "Nothing at this path.", **PATH}
    option = Option("--delete", "PATH", "Have nothing there.")

    def check(self, variables: Mapping[str, str]) -> None:
        """It is not the root."""
        super().check(variables)
        if not self.path.strip("/."):
            raise UsageError("the root of a guest is not deleted", subject=self.path)

    def apply(self, site: StepContext) -> bool:
        """A folder goes with all that is in it."""
        return site.view.delete(self.path)
