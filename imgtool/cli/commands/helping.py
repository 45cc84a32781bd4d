"""`help`: the manual page of a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from imgtool.cli import completing, render
from imgtool.cli.command_table import COMMANDS, GROUPS, app_with
from imgtool.errors import UsageError
from imgtool.host import process

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[COMMAND]...",
        help="Such as ls, or chain show.",
        autocompletion=completing.commands,
    ),
]


def named_command(words: Sequence[str]) -> tuple[Any, typer.Context]:
    """The command that words name, with its context; an unknown one is wrong usage, as it is where
    it is typed as a command, and names that are near are said.
    """
    known = bool(words) and (words[0] in COMMANDS or words[0] in GROUPS)
    command: Any = typer.main.get_command(app_with(words[0] if known else None))
    context = typer.Context(command, info_name="imgtool")
    for word in words:
        if not hasattr(command, "commands"):
            raise UsageError("it has no commands of its own", subject=context.command_path)
        name, command, _ = command.resolve_command(context, [word])
        context = typer.Context(command, info_name=name, parent=context)
    return command, context


def _manual_page(name: str) -> Path | None:
    """The file of a manual page: this installation's own, else what man(1) finds."""
    project = Path(__file__).parents[3]
    for folder in (Path(sys.prefix, "share/man"), project / "build/man"):
        for ending in ("", ".gz"):
            path = folder / "man1" / f"{name}.1{ending}"
            if path.is_file():
                return path
    where = {"MANPATH": os.environ["MANPATH"]} if "MANPATH" in os.environ else None
    try:
        found = process.run(["man", "-w", "1", name], env=where).stdout
    except process.ProgramFailed:  # it knows none
        return None
    path = Path(os.fsdecode(found.rstrip(b"\n")))
    return path if path.is_file() else None


def show_help(words: Words = None) -> None:
    """Show the manual page of imgtool or of a command.

    Where none is installed, or there is no man(1), the help is shown that --help gives.

    \b
    Examples:
      imgtool help
      imgtool help copy-in
      imgtool help chain show
    """
    command, context = named_command(words or ())
    if process.find("man") is not None:
        page = _manual_page("-".join(["imgtool", *(words or ())[:1]]))
        if page is not None and process.interactive(["man", "-l", page]) == 0:
            return
    render.text(command.get_help(context) + "\n")
