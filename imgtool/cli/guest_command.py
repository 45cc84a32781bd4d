"""The options that many commands have: each is spelled once, here.

    @guest_command(*READ)
    def ls(request: Request, paths: options.GuestPaths, ...) -> None:

gives `ls` the parameter IMAGE before its own and the options of `READ` after them, and calls it
with the request that they make. What opens no guest is a `plain_command`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imgtool.cli import options
from imgtool.cli.session import Common, Request, set_up_logging

# Each option, called as the field of `Request` or `Common` that has it: its annotation, and its
# default. What may be given several times is None where it is not given.
OPTIONS: dict[str, tuple[object, object]] = {
    "add": (options.Add, None),
    "format": (options.Format, None),
    "snapshot": (options.Snapshot, None),
    "mounts": (options.Mounts, None),
    "root": (options.Root, None),
    "keys": (options.Keys, None),
    "engine": (options.EngineOption, options.Engine.auto),
    "dry_run": (options.DryRun, False),
    "clone": (options.Clone, None),
    "tmp_dir": (options.TmpDir, None),
    "force": (options.Force, None),
    "backing_dirs": (options.BackingDirs, None),
    "verbose": (options.Verbose, False),
    "debug": (options.Debug, False),
}
READ = ("add", "format", "snapshot", "mounts", "root", "keys", "engine", "backing_dirs")
WRITE = (
    *("add", "format", "mounts", "root", "keys", "engine"),
    *("dry_run", "clone", "tmp_dir", "force", "backing_dirs"),
)
_LAST = ("verbose", "debug")
_IMAGE = "image"
_KIND = inspect.Parameter.POSITIONAL_OR_KEYWORD
_Command = Callable[..., object]


def guest_command(*names: str, image: bool = True) -> Callable[[_Command], _Command]:
    """Build a command of a function that takes a `Request` first: it gets IMAGE, its own
    parameters, and the options `names`, in this order. An option that the function has itself
    stays its own, and is not in the request. Without `image` it has another way to name images,
    and has to put one into the request.
    """

    def make(given: Mapping[str, Any], fields: dict[str, Any]) -> Request:
        one = given.get(_IMAGE, Path())
        return Request(image=one[0] if isinstance(one, list) else one, **fields)

    def decorate(function: _Command) -> _Command:
        own = _own(function)
        if image and _IMAGE not in own:
            first = [inspect.Parameter(_IMAGE, _KIND, annotation=options.Image)]
        else:
            first = []
        return _build(function, first, own, [name for name in names if name not in own], make)

    return decorate


def plain_command(*names: str) -> Callable[[_Command], _Command]:
    """Build a command of a function that takes a `Common` first: it gets its own parameters, and
    the options `names`, in this order. An option of its own stands among them if it is named."""

    def decorate(function: _Command) -> _Command:
        return _build(function, [], _own(function), names, lambda _, fields: Common(**fields))

    return decorate


def _own(function: _Command) -> dict[str, inspect.Parameter]:
    """The parameters of a function after the first one, which is made for it."""
    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    return {parameter.name: parameter for parameter in own}


def _build(
    function: _Command,
    first: list[inspect.Parameter],
    own: Mapping[str, inspect.Parameter],
    names: Sequence[str],
    make: Callable[[Mapping[str, Any], dict[str, Any]], Request | Common],
) -> _Command:
    """The command that calls `function` with what `make` makes of all that was given, and of the
    fields of the options."""
    names = (*names, *_LAST)
    taken = [name for name in names if name not in own]

    def command(**given: Any) -> object:
        fields = {name: given[name] for name in taken if given[name] is not None}
        set_up_logging(verbose=fields.pop("verbose"), debug=fields["debug"])
        return function(make(given, fields), **{name: given[name] for name in own})

    before = [parameter for name, parameter in own.items() if name not in names]
    after = [own.get(name) or _parameter(name) for name in names]
    parameters = [*first, *before, *after]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__module__, command.__qualname__ = function.__module__, function.__qualname__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _parameter(name: str) -> inspect.Parameter:
    annotation, default = OPTIONS[name]
    return inspect.Parameter(name, _KIND, default=default, annotation=annotation)
