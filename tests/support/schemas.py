"""What a command writes with -o json is as its schema says."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jsonschema

from imgtool.cli.command_table import GROUPS
from imgtool.cli.commands.schemas import schema_text


@functools.cache
def validator(name: str) -> Any:
    text = schema_text(name)
    assert text is not None, f"imgtool {name} has -o json and no schema"
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def form(arguments: Sequence[str]) -> str | None:
    """What -o is given, if it is."""
    for option, value in zip(arguments, [*arguments, ""][1:], strict=True):
        if option in ("-o", "--output"):
            return value
        if option.startswith(("--output=", "-ojson")):
            return option.removeprefix("--output=").removeprefix("-o")
    return None


def require_schema(arguments: Sequence[str], written: bytes) -> list[Any]:
    """The rows of a command that was given -o json or jsonl; each is as the schema says."""
    wanted = form(arguments)
    if wanted not in ("json", "jsonl") or not written:
        return []
    name = " ".join(arguments[:2]) if arguments[0] in GROUPS else arguments[0]
    try:
        lines = [written] if wanted == "json" else written.splitlines()
        found = [json.loads(line) for line in lines]
    except ValueError:
        return []  # the test that wanted it says so
    rows = found[0] if wanted == "json" else found
    for row in rows:
        validator(name).validate(row)
    return list(rows)
