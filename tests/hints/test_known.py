"""Every hint in the code is known, and what it says to type exists."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

from imgtool.cli.command_table import app_with
from imgtool.errors import Reason
from tests.hints import test_chains, test_options, test_records
from tests.hints.collect import hints
from tests.hints.known import KINDS, known

TESTS = Path(__file__).parents[1]
KNOWN = known()
_COMMAND = re.compile(r"(?:^|[:;('] ?|\bthen |\bor )imgtool ((?:[a-z-]+ ?)+)((?:[^';:,()])*)")
# What did harm, or nothing, once.
_HARMFUL = re.compile(
    r"\brestore (it|the)\b|save what is left|--force(?! (?:\{\}|[a-z]))|\be2fsck -f\b"
    r"|(?<!COPY, then )qemu-img check -r|(?<!in the guest, ')sgdisk"
    # What the direct engine does not read is not always read by the appliance.
    r"|appliance reads (it|this|that)\b|leave --engine out, and"
)


def test_every_hint_of_the_code_is_known():
    unknown = {template: where for template, where in hints().items() if template not in KNOWN}
    assert unknown == {}, "say in tests/hints/known.txt how each is known to help"
    assert set(KNOWN) - set(hints()) == set(), "no longer in the code"


def test_known_hints_are_followed_by_tests_that_exist():
    for template, how in KNOWN.items():
        if how in KINDS:
            continue
        module, _, name = how.partition("::")
        source = (TESTS / module).read_text()
        assert not name or f"def {name}(" in source, template


@pytest.mark.parametrize("module", [test_chains, test_options, test_records])
def test_the_rows_of_a_table_are_its_hints(module: ModuleType) -> None:
    path = Path(str(module.__file__)).relative_to(TESTS)
    listed = {template for template, how in KNOWN.items() if how.startswith(f"{path}::")}
    assert {row.hint for row in module.ROWS} == listed


@pytest.mark.parametrize("template", hints())
def test_what_did_harm_is_in_no_hint(template):
    assert not _HARMFUL.search(template)


@pytest.mark.parametrize(
    "template",
    [
        "leave --engine out, and the appliance reads it",
        "restore it from a backup",
        "use --force",
        "e2fsck -f {}",
        "qemu-img check -r all {}",
    ],
)
def test_hints_of_old_are_known_as_such(template):
    assert _HARMFUL.search(template)


def commands() -> dict[str, set[str]]:
    """The options of each command, by its name."""
    found = {}
    root = typer.main.get_command(app_with(None))
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        for full, one in (
            {f"{name} {sub}": c for sub, c in below.items()} if below else {name: command}
        ).items():
            found[full] = {option for parameter in one.params for option in parameter.opts}
    return found


def test_the_commands_and_options_of_hints_exist():
    there = commands()
    for template in hints():
        for matched in _COMMAND.finditer(template):
            words = matched[1].split()
            full = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in there), None)
            assert full is not None, template
            for option in re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", matched[0]):
                assert option in there[full], f"{option}: {template}"


def test_the_reasons_that_refusals_name_exist():
    named = {name for template in hints() for name in re.findall(r"--force ([a-z-]+)", template)}
    assert named <= {str(reason) for reason in Reason}
