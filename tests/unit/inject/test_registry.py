"""inject: what each step says of itself, and that schema and options are made of nothing else."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import typer

from imgtool.cli.command_table import app_with
from imgtool.inject import registry, steps
from imgtool.inject.registry import OPTIONS, STEPS
from imgtool.inject.spec import schema, schema_text
from imgtool.inject.steps.schema import DEFINITIONS
from imgtool.inject.steps.step import Option, Step
from tests.support.documentation import commands_of


def modules() -> list[ModuleType]:
    return [
        importlib.import_module(f"{steps.__name__}.{found.name}")
        for found in pkgutil.iter_modules(steps.__path__)
    ]


def classes(modules: list[ModuleType]) -> set[type[Step]]:
    """The steps that can be made of a class in these modules."""
    return {
        one
        for module in modules
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, Step) and not inspect.isabstract(one)
    }


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        yield from [schema["$ref"]] if "$ref" in schema else []
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def test_each_step_class_is_registered_by_its_kind() -> None:
    assert len(STEPS) == len(registry._TURNS)
    assert classes(modules()) == set(STEPS.values())
    assert {kind: step.kind for kind, step in STEPS.items()} == {kind: kind for kind in STEPS}


def test_a_step_class_that_is_not_registered_is_found() -> None:
    @dataclass(frozen=True)
    class Forgotten(Step):
        subject = ""

        def apply(self, site: object) -> bool:
            return False

    module = ModuleType("forgotten")
    module.Forgotten = Forgotten  # type: ignore[attr-defined]
    assert classes([module]) - set(STEPS.values()) == {Forgotten}


@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.kind)
def test_step_fragment_is_a_schema_that_refers_to_what_is_there(step: type[Step]) -> None:
    known = {**DEFINITIONS, **step.definitions}
    jsonschema.Draft202012Validator.check_schema({**step.schema, "$defs": known})
    used = {name.removeprefix("#/$defs/") for name in references([step.schema, step.definitions])}
    assert used <= set(known)
    assert set(step.definitions) <= used


def test_the_published_schema_is_made_of_the_fragments() -> None:
    published = json.loads(schema_text())
    assert published == schema()
    jsonschema.Draft202012Validator.check_schema(published)
    definitions = published["$defs"]
    fragments = definitions.pop("step")["properties"]
    assert list(fragments) == list(STEPS)
    assert fragments == {kind: step.schema for kind, step in STEPS.items()}
    expected = dict(DEFINITIONS)
    for step in STEPS.values():
        assert not set(step.definitions) & set(expected), "two with one name"
        expected |= step.definitions
    assert definitions == expected


def test_each_option_has_a_turn_of_its_own() -> None:
    turns = {step: turn for step, turn in registry._TURNS if turn is not None}
    assert set(turns) == {step for step in STEPS.values() if step.option is not None}
    assert len(set(turns.values())) == len(turns)
    assert {option.name: step for option, step in OPTIONS} == {
        step.option.name: step for step in turns if step.option is not None
    }


def test_the_command_has_the_options_that_the_steps_declare() -> None:
    command = commands_of(typer.main.get_command(app_with("inject")))["inject"]
    found = {
        parameter.opts[0]: Option(
            parameter.opts[0],
            None if parameter.is_flag else parameter.metavar,
            parameter.help or "",
            not (parameter.multiple or parameter.is_flag),
        )
        for parameter in command.params
        if isinstance(parameter, typer.core.TyperOption)
    }
    assert [found[option.name] for option, _ in OPTIONS] == [option for option, _ in OPTIONS]
    shown = [name for name in found if name in {option.name for option, _ in OPTIONS}]
    assert shown == [option.name for option, _ in OPTIONS]
