"""`schema`: the JSON Schema of what a command writes with `-o json`."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from imgtool.cli import completing, render
from imgtool.cli.commands.helping import named_command
from imgtool.errors import UsageError

_FOLDER = "schemas"


def schema_text(name: str) -> str | None:
    """The schema of a row of a command, such as `chain show`; None for one without rows."""
    file = resources.files("imgtool") / _FOLDER / f"{name.replace(' ', '-')}.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def schema(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...",
            help="Such as ls, or chain show.",
            autocompletion=completing.commands,
        ),
    ],
) -> None:
    """Show the JSON Schema of the rows that -o json writes.

    The schema is that of one row. With -o jsonl each line is a row, with -o json the rows are in an
    array: the schema of the whole is {"type": "array", "items": SCHEMA}.

    \b
    Examples:
      imgtool schema ls
      imgtool schema chain show
    """
    command, context = named_command(words)
    name = context.command_path.removeprefix("imgtool ")
    text = schema_text(name)
    if text is not None:
        render.text(text)
        return
    members = [one for one in getattr(command, "commands", ()) if schema_text(f"{name} {one}")]
    raise UsageError(
        "it has no -o json, and so no schema",
        subject=f"imgtool {name}",
        hint=f"with one: {', '.join(f'{name} {one}' for one in members)}" if members else None,
    )
