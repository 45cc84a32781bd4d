"""A step of a host mount: it can be done, undone, and asked whether it still stands.

A step is written into the journal before it is done, so it holds by then whatever `undo` needs to
find what it made, done or half done or not begun at all, and to tell it from what others made.
Undoing is safe to repeat.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import ClassVar

Save = Callable[[], None]


class Step(ABC):
    """One change to the host."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, object]:
        """The step as the journal holds it."""
        known = {row.name: getattr(self, row.name) for row in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **known}

    @abstractmethod
    def do(self, save: Save) -> None:
        """Do it; `save` writes the journal again once something more is known."""

    @abstractmethod
    def undo(self) -> None:
        """Undo it if it was done, and wait until that is really so."""

    def fault(self) -> str | None:
        """What is no longer as it was made, in one line; None if all is well."""
        return None
