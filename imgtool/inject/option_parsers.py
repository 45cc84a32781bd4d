"""Steps and variables as options of the command line write them."""

from __future__ import annotations

from collections.abc import Sequence

from imgtool.errors import UsageError
from imgtool.inject.planner import LocatedStep
from imgtool.inject.registry import OPTIONS
from imgtool.inject.steps.step import Asked


def steps_of(given: Asked) -> list[LocatedStep]:
    """The steps that options ask for, in the options' turns. Raises `UsageError` for a text
    that is not of the option's form.
    """
    found: list[LocatedStep] = []
    for option, step in OPTIONS:
        value = given.get(option.parameter) or ()
        texts = [""] if value is True else [value] if isinstance(value, str) else value
        found += [LocatedStep(step.from_option(text), option.name) for text in texts]
    return found


def variables_of(texts: Sequence[str]) -> dict[str, str]:
    """The variables in `NAME=VALUE` texts."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.replace("-", "_").isidentifier():
            raise UsageError("--var takes NAME=VALUE", subject=text)
        found[name] = value
    return found
