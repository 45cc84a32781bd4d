"""What a step is. Its class says all of it: what it is called in a spec, what it has there, and
with which option it is asked for.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from imgtool.errors import UsageError
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import Schema

_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_-]*)\s*\}\}")
_MODE = re.compile(r"[0-7]{1,4}")


# What is given to options of steps, by the option's name as that of a variable: texts, one text
# where the option is not repeated, a bool where it takes no value, None where it is not given.
Asked = Mapping[str, bool | str | Sequence[str] | None]


@dataclass(frozen=True)
class StepContext:
    """The guest that steps are taken in, and what is said of it."""

    view: GuestOverlay
    variables: Mapping[str, str] = field(default_factory=dict)

    def filled(self, text: str, what: object) -> str:
        """The text with `{{ NAME }}` replaced; `UsageError` for a variable that is not given."""
        return filled(text, self.variables, what)


@dataclass(frozen=True)
class Option:
    """The option of `inject` that asks for a step, with its line of help. Without `metavar` it
    takes no value; with `once` it is not repeated.
    """

    name: str
    metavar: str | None
    help: str
    once: bool = False

    @property
    def parameter(self) -> str:
        """Its name as that of a variable."""
        return self.name.removeprefix("--").replace("-", "_")

    def two_parts(self, text: str, form: str | None = None) -> tuple[str, str]:
        """What is before and after the first colon. Raises `UsageError`, with the form, if one is
        empty.
        """
        first, _, second = text.partition(":")
        if not first or not second:
            raise UsageError(f"{self.name} takes {form or self.metavar}", subject=text)
        return first, second

    def with_path(self, text: str, form: str | None = None) -> tuple[str, str]:
        """What is before a guest path, and the path, which begins with the last `:/`: a file of the
        host may have a colon in its name. Raises `UsageError`, with the form, if one is empty.
        """
        first, colon, path = text.rpartition(":/")
        if not colon or not first:
            raise UsageError(f"{self.name} takes {form or self.metavar}", subject=text)
        return first, f"/{path}"


class Step(ABC):
    """One thing that a guest is to have. `subject` says which, in a few words without secrets.

    `kind` is its key in a spec, `schema` the JSON schema of what stands there, which may refer to
    `DEFINITIONS` and to its own `definitions`.
    """

    kind: ClassVar[str]
    schema: ClassVar[Schema]
    definitions: ClassVar[Mapping[str, Schema]] = {}
    option: ClassVar[Option | None] = None

    @classmethod
    def from_spec(cls, value: Any, folder: Path) -> Sequence[Step]:
        """The steps that a spec means by a value, which fits the schema; relative files of the host
        are in `folder`. Here fields are called as in the spec, and a lone value is the first.
        """
        make: Callable[..., Step] = cls
        return [make(**value) if isinstance(value, dict) else make(value)]

    @classmethod
    def from_option(cls, text: str) -> Step:
        """The step that the option means by a text. Raises `UsageError` for one of another form."""
        make: Callable[..., Step] = cls
        return make(text)

    @property
    @abstractmethod
    def subject(self) -> str:
        """What it is about: a path, a user, a unit."""

    def subject_in(self, variables: Mapping[str, str]) -> str:
        """What it is about in one image, with that image's variables."""
        return self.subject

    def check(self, variables: Mapping[str, str]) -> None:  # noqa: B027 - few need no check
        """Look at all that can be looked at before a guest is opened.

        Raises `UsageError` for values that make no sense, `ImgtoolError` for a file of the host
        that cannot be read.
        """

    @abstractmethod
    def apply(self, site: StepContext) -> bool:
        """Have it so in the guest's view; whether it was otherwise.

        Raises `NotInGuestError` for what the guest does not have, `ImgtoolError` for what cannot be
        done in it.
        """


class WordStep(Step):
    """A step without details: one word in a spec, an option without a value."""

    word: ClassVar[str]

    @property
    def subject(self) -> str:
        """What is done."""
        return self.word

    @classmethod
    def from_spec(cls, value: object, folder: Path) -> Sequence[Step]:
        """The step."""
        return [cls()]

    @classmethod
    def from_option(cls, text: str) -> Step:
        """The step."""
        return cls()


def filled(text: str, variables: Mapping[str, str], what: object) -> str:
    """The text with `{{ NAME }}` replaced; `UsageError` for a variable that is not given."""

    def value(found: re.Match[str]) -> str:
        try:
            return variables[found[1]]
        except KeyError:
            raise UsageError(
                f"the variable '{found[1]}' is not given",
                subject=what,
                hint=f"give it under 'vars' of the spec, or with --var {found[1]}=VALUE",
            ) from None

    return _VARIABLE.sub(value, text)


def guest_path(path: str) -> str:
    """A path of the guest as it was given; `UsageError` if it is not absolute or has `..`."""
    if not path.startswith("/"):
        raise UsageError("guest paths are absolute", subject=path, hint="begin the path with /")
    if ".." in path.split("/"):
        raise UsageError("a guest path has no '..' here", subject=path)
    if "\0" in path:
        raise UsageError("a path cannot contain NUL")
    return path


def octal(text: str | int | None) -> int | None:
    """A mode of octal digits; `UsageError` for anything else."""
    if text is None:
        return None
    if not _MODE.fullmatch(str(text)):
        raise UsageError("a mode is octal digits, such as 0644", subject=text)
    return int(str(text), 8)


def host_file(path: Path, limit: int | None = None) -> bytes:
    """A file of the host; `ImgtoolError` if it cannot be read or is longer than `limit`."""
    from imgtool.errors import ImgtoolError

    try:
        with path.open("rb") as file:
            content = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise ImgtoolError(f"cannot be read: {error.strerror}", subject=path) from error
    if limit is not None and len(content) > limit:
        raise UsageError(f"the file is longer than {limit} bytes", subject=path)
    return content
