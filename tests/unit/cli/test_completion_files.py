"""The completion files that a package installs are what the program gives, and TAB works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import ROOT


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completions")
    subprocess.run([ROOT / "scripts/build-completions", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a command `imgtool`."""
    path = tmp_path_factory.mktemp("bin") / "imgtool"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m imgtool "$@"\n')
    path.chmod(0o755)
    return path.parent


def given(shell: str) -> str:
    """What the program gives for a shell."""
    return subprocess.run(
        [sys.executable, "-m", "imgtool"],
        env={**os.environ, "_IMGTOOL_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(("name", "shell"), [("imgtool", "bash"), ("imgtool.fish", "fish")])
def test_a_file_is_what_the_program_gives(files, name, shell):
    text = (files / name).read_text()
    assert "_IMGTOOL_COMPLETE=complete_" in text
    assert text == given(shell)


def test_the_file_of_zsh_also_answers_the_tab_that_loads_it(files):
    lines = (files / "_imgtool").read_text().splitlines()
    old = [line for line in given("zsh").splitlines() if line]
    assert lines[0] == "#compdef imgtool", "else zsh does not find it"
    end = [
        "if [[ $zsh_eval_context[-1] == loadautofunc ]]; then",
        '    _imgtool_completion "$@"',
        "else",
        "    compdef _imgtool_completion imgtool",
        "fi",
    ]
    assert old[-1] == "compdef _imgtool_completion imgtool"
    assert lines == [*old[:-1], *end]


# What each shell would offer after `imgtool copy-`. Of zsh's own functions only those that are
# called are there: they print what they get.
_OTHERS = {
    "fish": ("--no-config", "source {0}/imgtool.fish; complete -C 'imgtool copy-'"),
    "zsh": (
        "-f",
        "compdef() {{ : }}; _arguments() {{ print -l -- $@ }}; source {0}/_imgtool;"
        " words=(imgtool copy-) CURRENT=2; _imgtool_completion",
    ),
}


@pytest.mark.parametrize("shell", _OTHERS)
def test_the_other_shells_offer_commands(files, program, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here: scripts/setup.sh installs it")
    option, script = _OTHERS[shell]
    done = subprocess.run(
        [shell, option, "-c", script.format(files)],
        env={**os.environ, "PATH": f"{program}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert set(re.findall(r"\bcopy-[a-z]+", done.stdout)) == {"copy-in", "copy-out"}


def tab(files: Path, program: Path, *words: str) -> list[str]:
    """What bash offers for the last word, with the function that its file registers."""
    script = (
        f"source {files}/imgtool && set -- $(complete -p imgtool) && "
        'while [ "$1" != -F ]; do shift; done; function=$2; '
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        f"[ {len(words)} -gt 0 ] && COMP_WORDS[{len(words) - 1}]={words[-1]!r}; "
        '"$function" imgtool; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", script],
        env={**os.environ, "PATH": f"{program}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["imgtool", "copy"], {"copy-out", "copy-in"}),
        (["imgtool", "overlay", "re"], {"rebase"}),
        (["imgtool", "ls", "--che"], {"--checksum"}),
        (["imgtool", "ls", "--checksum", "sha"], {"sha1", "sha256"}),
        (["imgtool", "help", "snap"], {"snapshot"}),
    ],
)
def test_tab_in_bash(files, program, words, offered):
    assert set(tab(files, program, *words)) == offered


def test_tab_offers_every_command(files, program):
    from imgtool.cli.command_table import COMMANDS, GROUPS

    assert set(tab(files, program, "imgtool", "")) == {*COMMANDS, *GROUPS}
