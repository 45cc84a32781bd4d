"""What a step is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from imgtool.errors import UsageError
from imgtool.inject.guest_overlay import GuestOverlay

_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_-]*)\s*\}\}")
_MODE = re.compile(r"[0-7]{1,4}")


@dataclass(frozen=True)
class StepContext:
    """The guest that steps are taken in, and what is said of it."""

    view: GuestOverlay
    variables: Mapping[str, str] = field(default_factory=dict)

    def filled(self, text: str, what: object) -> str:
        """The text with `{{ NAME }}` replaced; `UsageError` for a variable that is not given."""
        return filled(text, self.variables, what)


class Step(ABC):
    """One thing that a guest is to have. `subject` says which, in a few words without secrets."""

    kind: ClassVar[str]

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


def filled(text: str, variables: Mapping[str, str], what: object) -> str:
    """The text with `{{ NAME }}` replaced; `UsageError` for a variable that is not given."""

    def value(found: re.Match[str]) -> str:
        try:
            return variables[found[1]]
        except KeyError:
            raise UsageError(
                f"the variable '{found[1]}' is not given",
                subject=what,
                hint="give it under 'vars' of the spec, or with --var NAME=VALUE",
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
