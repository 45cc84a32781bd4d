"""The spec: a YAML file of steps, checked against its schema with the lines of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtool.errors import ImgtoolError, UsageError
from imgtool.inject.planner import LocatedStep
from imgtool.inject.registry import STEPS
from imgtool.inject.steps.schema import DEFINITIONS, Schema, mapping
from imgtool.inject.yaml_lines import Lines

_VARIABLES = {
    "description": "Variables of templates and of 'hostname', used as {{ NAME }}. 'image' is the "
    "name of the image without its ending.",
    "type": "object",
    "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_-]*$"},
    "additionalProperties": {"type": ["string", "integer", "number"]},
}


@dataclass(frozen=True)
class Spec:
    """What a spec asks for."""

    steps: tuple[LocatedStep, ...]
    variables: Mapping[str, str]


def schema() -> Schema:
    """The JSON schema of a spec, made of those of the steps."""
    spec = mapping(
        {
            "vars": _VARIABLES,
            "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
        },
        required=("steps",),
    )
    step = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": {kind: step.schema for kind, step in STEPS.items()},
    }
    definitions = {**DEFINITIONS, "step": step}
    for one in STEPS.values():
        definitions |= one.definitions
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A spec of imgtool inject",
        "description": "Steps that are taken in a guest in their order. Relative files of the host "
        "are sought beside the spec.",
        **spec,
        "$defs": definitions,
    }


def schema_text() -> str:
    """`schema`, as it is printed."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def read_spec(path: Path) -> tuple[Spec | None, list[ImgtoolError]]:
    """The spec in a file, or what is wrong with it, each with its line.

    Raises `UsageError` for what is no YAML, `ImgtoolError` for a file that cannot be read.
    """
    lines = Lines(path)
    problems = _problems(lines)
    if problems:
        return None, problems
    steps = []
    for number, step in enumerate(lines.data["steps"]):
        ((kind, value),) = step.items()
        where = lines.where(("steps", number, kind))
        steps += [LocatedStep(one, where) for one in STEPS[kind].from_spec(value, path.parent)]
    variables = {name: str(value) for name, value in lines.data.get("vars", {}).items()}
    return Spec(tuple(steps), variables), []


def _problems(lines: Lines) -> list[ImgtoolError]:
    import jsonschema

    if lines.data is None:
        return [UsageError(f"{lines.where(())}: the spec is empty")]
    found: dict[tuple[str, str], UsageError] = {}
    for error in jsonschema.Draft202012Validator(schema()).iter_errors(lines.data):
        # Of alternatives, the one that comes nearest.
        deepest = jsonschema.exceptions.best_match([error]) or error
        place, message = tuple(deepest.absolute_path), _said(deepest)
        if deepest.validator == "additionalProperties" and isinstance(deepest.instance, dict):
            unknown = [key for key in deepest.instance if key not in deepest.schema["properties"]]
            place = (*place, unknown[0])
            message = _unknown(unknown[0], list(deepest.schema["properties"]))
        where = lines.where(place)
        found.setdefault((where, message), UsageError(f"{where}: {message}"))
    return sorted(found.values(), key=lambda e: int(e.message.split(":")[1]))


def _unknown(key: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, 1)
    meant = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return f"'{key}' is not known here; {meant}"


def _said(error: Any) -> str:
    """What is wrong, in the spec's words; values may be long or secret, and are left out."""
    name = next((f"'{key}'" for key in reversed(error.absolute_path) if isinstance(key, str)), "")
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"{name or 'the spec'} needs '{missing[0]}'"
    if error.validator in ("oneOf", "anyOf"):
        choices = [c["required"][0] for c in error.validator_value if c.get("required")]
        if choices:
            return f"{name} needs one of: {', '.join(choices)}"
    if error.validator == "type":
        kinds = error.validator_value
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return f"{name or 'the spec'} is to be of type {' or '.join(kinds)}"
    if error.validator == "const":
        return f"{name} is to be '{error.validator_value}'"
    if error.validator == "enum":
        return f"{name} is to be one of: {', '.join(map(str, error.validator_value))}"
    if error.validator == "pattern":
        form = error.schema.get("description", f"of the form {error.validator_value}")
        return f"{name} is not as it has to be: {form.rstrip('.')}"
    if error.validator == "maxProperties":
        return "a step is one thing: begin the next one with '- '"
    return f"{name}: {error.message[:200]}" if name else str(error.message)[:200]
