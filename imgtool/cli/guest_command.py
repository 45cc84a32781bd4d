"""The options with which a command opens a guest: each is spelled once, here.

    @guest_command(*READ)
    def ls(request: Request, paths: options.GuestPaths, ...) -> None:

gives `ls` the parameter IMAGE before its own and the options of `READ` after them, and calls it
with the request that they make.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imgtool.cli import options
from imgtool.cli.session import Request, set_up_logging

# Each option in the order of the help: its annotation, its default, and the field of `Request` that
# has it. What may be given several times is None where it is not given.
OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "add": (options.Add, None, "add"),
    "format": (options.Format, None, "format"),
    "snapshot": (options.Snapshot, None, "snapshot"),
    "mounts": (options.Mounts, None, "mounts"),
    "root": (options.Root, None, "root"),
    "key": (options.Keys, None, "keys"),
    "engine": (options.EngineOption, options.Engine.auto, "engine"),
    "dry_run": (options.DryRun, False, "dry_run"),
    "clone": (options.Clone, None, "clone"),
    "tmp_dir": (options.TmpDir, None, "tmp_dir"),
    "force": (options.Force, None, "force"),
    "backing_dir": (options.BackingDirs, None, "backing_dirs"),
    "verbose": (options.Verbose, False, "verbose"),
    "debug": (options.Debug, False, "debug"),
}
READ = ("add", "format", "snapshot", "mounts", "root", "key", "engine", "backing_dir")
WRITE = (
    *("add", "format", "mounts", "root", "key", "engine"),
    *("dry_run", "clone", "tmp_dir", "force", "backing_dir"),
)
_LAST = ("verbose", "debug")
_IMAGE = "image"


def _request(given: dict[str, Any], names: tuple[str, ...]) -> Request:
    """The request of the options `names` among what was given."""
    values = {OPTIONS[name][2]: given[name] for name in names if given[name] is not None}
    set_up_logging(verbose=values.pop("verbose"), debug=values["debug"])
    if "engine" in values:
        values["engine"] = values["engine"].value
    image = given.get(_IMAGE, Path())
    return Request(image=image[0] if isinstance(image, list) else image, **values)


def guest_command(
    *names: str, image: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Build a command of a function that takes a `Request` first: it gets IMAGE, its own
    parameters, and the options `names`, in the order of `OPTIONS`. An option that the function has
    itself stays its own, and is not in the request. Without `image` it has another way to name
    images, and has to put one into the request.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        passed = {parameter.name for parameter in own}
        taken = tuple(n for n in OPTIONS if n in (*names, *_LAST) and n not in passed)
        first = [inspect.Parameter(_IMAGE, kind, annotation=options.Image)]
        if not image or _IMAGE in passed:
            first = []
        last = [
            inspect.Parameter(name, kind, default=OPTIONS[name][1], annotation=OPTIONS[name][0])
            for name in taken
        ]

        def command(**given: Any) -> Any:
            request = _request(given, taken)
            return function(request, **{name: given[name] for name in given if name in passed})

        parameters = [*first, *own, *last]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__module__, command.__qualname__ = function.__module__, function.__qualname__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate
