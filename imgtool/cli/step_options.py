"""The options of the command `inject` that ask for steps, from what each step says of its own.

    @guest_command(...)
    @step_options(after="var")
    def inject(request: Request, asked: Asked, var: ..., spec: ...) -> None:

gives `inject` the options of all steps after its parameter `var`, and passes their values as
`asked`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from imgtool.inject.registry import OPTIONS
from imgtool.inject.steps.step import Option

_ASKED = "asked"
_Command = Callable[..., object]


def _parameter(option: Option) -> inspect.Parameter:
    """The option as Typer takes it: a flag, a text, or several."""
    declared = typer.Option(option.name, metavar=option.metavar, help=option.help)
    kind: object = list[str] | None
    if option.metavar is None:
        kind = bool
    elif option.once:
        kind = str | None
    return inspect.Parameter(
        option.parameter,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=False if kind is bool else None,
        annotation=Annotated[kind, declared],
    )


def step_options(*, after: str) -> Callable[[_Command], _Command]:
    """Build a function with the options of the steps, after the parameter `after`, of one that has
    their values in `asked`: by the option's name as that of a variable, as `steps_of` takes them.
    """

    def decorate(function: _Command) -> _Command:
        parameters = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name != _ASKED:
                parameters.append(parameter)
            if parameter.name == after:
                parameters += [_parameter(option) for option, _ in OPTIONS]

        def command(request: object, **given: object) -> object:
            asked = {option.parameter: given.pop(option.parameter) for option, _ in OPTIONS}
            return function(request, asked=asked, **given)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__module__, command.__qualname__ = function.__module__, function.__qualname__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate
