"""Help is whole: each command below a heading on a line of its own, examples, the manual page."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from imgtool.cli import _run
from imgtool.cli.command_table import COMMANDS, GROUPS, app_with, overview
from imgtool.cli.help_text import HEADINGS, Root, paragraphs, summary
from imgtool.cli.other_names import OTHER_NAMES
from tests.support.documentation import commands_of, invocations

ROOT = typer.main.get_command(app_with(None))
ALL = commands_of(ROOT)
EVERY = {
    **{name: ALL[name] for name in COMMANDS},
    **{
        f"{name} {member}": command
        for name in GROUPS
        for member, command in commands_of(ALL[name]).items()
    },
}


def help_of(*words: str, columns: int = 80) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", str(columns))
        assert _run([*words, "--help"]) == 0
    return out.getvalue()


def test_help_of_the_program_is_what_is_looked_at_here():
    words = [sys.executable, "-m", "imgtool", "chain", "show", "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == help_of("chain", "show")


def examples(name: str) -> list[str]:
    (block,) = [text for text in paragraphs(EVERY[name]) if "Examples:\n" in text]
    assert block.startswith("\b\n"), "else its lines are put together"
    return [line.strip() for line in block.splitlines()[2:]]


def test_each_command_is_below_one_heading():
    below = [name for names in HEADINGS.values() for name in names]
    assert sorted(below) == sorted((*COMMANDS, *GROUPS))


def test_the_help_has_a_whole_line_for_each_command():
    text = help_of()
    for heading, names in HEADINGS.items():
        lines = text.split(f"\n{heading}:\n")[1].split("\n\n")[0].splitlines()
        assert [line.split()[0] for line in lines] == list(names)
    for name in (*COMMANDS, *GROUPS):
        assert re.search(rf"^  {name} +{re.escape(summary(ALL[name]))}\.$", text, re.M)
    assert "..." not in text.replace("[ARGS]...", "")


@pytest.mark.parametrize("name", GROUPS)
def test_the_help_of_a_group_has_a_whole_line_for_each_command(name):
    text = help_of(name)
    for member, command in commands_of(ALL[name]).items():
        assert re.search(rf"^  {member} +{re.escape(summary(command))}\.$", text, re.M)


def test_a_narrow_terminal_cuts_nothing_off():
    words = " ".join(help_of(columns=40).split())
    assert [n for n in COMMANDS if f"{n} {summary(ALL[n])}." not in words] == []


def test_a_line_that_is_too_long_is_found():
    """The test above sees a line that does not fit, since what is shown is then two lines."""
    root = Root(name="imgtool", commands={"df": typer.core.TyperCommand("df", help="x " * 40)})
    text = root.get_help(typer.Context(root, info_name="imgtool", terminal_width=80))
    assert not re.search(rf"^  df +{summary(root.commands['df'])}\.$", text, re.M)


@pytest.mark.parametrize("name", EVERY)
def test_a_command_has_examples_that_can_be_typed(name):
    lines = examples(name)
    assert 2 <= len(lines) <= 3
    for line in lines:
        ((*words,),) = invocations(line)
        assert " ".join(words[: len(name.split())]) == name, line
        arguments = words[len(name.split()) :]
        EVERY[name].make_context(name, arguments)  # raises for what the parser does not take
        assert shlex.split(line)


@pytest.mark.parametrize("name", [*EVERY, *GROUPS])
def test_the_help_says_where_the_manual_page_is(name):
    text = help_of(*name.split())
    page = name.split()[0]
    last = f"Manual page: imgtool-{page}(1), which 'imgtool help {page}' shows"
    assert text.endswith(f"\n{last}\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("convert a b --force", "imgtool convert"),  # this error does not say of which command
        ("snapshot revert a b --save-as", "imgtool snapshot revert"),
        ("overlay", "imgtool overlay"),
        ("ls -v --nope", "imgtool ls"),
        ("--nope ls", "imgtool ls"),
        ("frob --nope", "imgtool"),
        ("help --nope", "imgtool help"),
    ],
)
def test_an_error_of_use_names_the_help_of_its_command(words: str, named: str, capfd):
    assert _run(words.split()) == 2
    assert f"hint: '{named} --help' lists the arguments" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "listing"),
    [("help cp", "imgtool"), ("schema lss", "imgtool"), ("help chain tre", "imgtool chain")],
)
def test_help_of_an_unknown_command_leads_to_the_list(words, listing, capfd):
    assert _run(words.split()) == 2
    assert capfd.readouterr().err.endswith(f"hint: '{listing} --help' lists the commands\n")


def _begins_with_a_command(words: str) -> bool:
    return " ".join(words.split()[:2]) in EVERY or words.split()[0] in EVERY


@pytest.mark.parametrize(("called", "names"), OTHER_NAMES.items())
def test_another_name_of_a_command_leads_to_it(called, names, capfd):
    assert all(name.startswith("--") or _begins_with_a_command(name) for name in names)
    assert called not in EVERY
    for words in ([*called.split(), "x"], ["help", *called.split()]):
        assert _run(words) == 2
        found = " or ".join(f"'imgtool {name}'" for name in names)
        assert f"Did you mean {found}?" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["df", "copy-out", "filesystems", "ls"])
def test_virt_tools_are_known_by_their_names(command, capfd):
    assert _run([f"virt-{command}", "disk.qcow2"]) == 2
    assert f"Did you mean 'imgtool {command}'?" in capfd.readouterr().err


def test_what_most_come_for_is_found_in_the_help():
    assert re.search(r"^  inject .*\bpasswords\b", help_of(), re.M)
    assert "--password root:prompt" in help_of("inject").split("Options:")[0]
    assert re.search(r"^  overlay .*\bmerge\b", help_of(), re.M)


def test_the_overview_is_that_of_the_commands_themselves():
    """It is made without importing them; a stand-in has nothing but the help."""
    listed = typer.main.get_command(overview())
    texts = []
    for root in (listed, ROOT):
        with typer.Context(root, info_name="imgtool") as context:
            texts.append(root.get_help(context))
    assert texts[0] == texts[1]
    assert commands_of(listed).keys() == ALL.keys()
