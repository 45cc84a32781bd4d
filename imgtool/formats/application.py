"""A package that is installed in a guest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Application:
    """An installed package."""

    name: str
    version: str
    release: str = ""
    epoch: int = 0
    arch: str = ""
