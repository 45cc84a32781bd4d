"""The examples of the help do what they say: each ends with status 0 on the demonstration guests.

What mounts, asks the terminal or keeps something of this host is left to the suites of those
commands.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from imgtool.cli.command_table import COMMANDS, GROUPS
from tests.docs.examples import run
from tests.unit.cli.test_help import EVERY, examples

_NOT_RUN = {
    *("mount", "umount", "cleanup", "appliance save", "appliance remove", "doctor"),
    "edit",  # it needs a terminal
}
# What asks on the terminal: tests/appliance/test_password_prompt.py answers.
_ASKS = {"imgtool inject guest.qcow2 --password root:prompt"}
_SNAPSHOT = "imgtool snapshot create guest.qcow2 before-update"
# What is there before the examples of a command.
_BEFORE = {
    "copy-out": "mkdir rescued",
    "copy-in": "echo hello > motd; mkdir site; echo hello > site/index.html",
    "inject": "mkdir clones; printf 'steps:\\n- hostname: web1\\n' > spec.yaml",
    "resize": "imgtool create disk.qcow2 10G",
    "diff": _SNAPSHOT,
    "snapshot revert": _SNAPSHOT,
    "snapshot delete": _SNAPSHOT,
    "overlay rebase": "cp guest.qcow2 other.qcow2; mkdir moved; cp guest.qcow2 moved",
}
_WITH_APPLIANCE = {"copy-in", "inject", "rm"}


def _marked(name: str):
    return pytest.param(name, marks=[pytest.mark.appliance] if name in _WITH_APPLIANCE else [])


@pytest.mark.parametrize("name", [_marked(name) for name in EVERY if name not in _NOT_RUN])
def test_the_examples_of_a_command_work(name: str, tmp_path: Path):
    commands = [
        f"({line}) > /dev/null; echo status $?" for line in examples(name) if line not in _ASKS
    ]
    setting_up = [": guest.qcow2", _BEFORE.get(name, ":")]  # an image that is named is there
    page = tmp_path / "page.md"
    lines = [f"$ {line}" for line in (*setting_up, *commands)]
    page.write_text("\n".join(["```console", *lines, "```"]) + "\n")
    answers = [(one.command, printed) for one, printed in run(page)]
    assert len(answers) == len(lines)
    failed = [answer for answer in answers[2:] if answer[1][-1:] != ["status 0"]]
    assert failed == []


def test_what_is_not_run_is_a_command():
    assert _NOT_RUN | set(_BEFORE) <= {*EVERY, *COMMANDS, *GROUPS}
