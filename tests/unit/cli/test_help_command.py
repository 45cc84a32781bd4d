"""`imgtool help`: the manual page where there is one, else the help; an unknown name is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgtool.cli.commands import helping
from imgtool.host import process

ROFF = ".TH IMGTOOL-CHAIN 1\n.SH NAME\nimgtool-chain \\- the page itself\n"


def imgtool(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imgtool", *words],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def manual(tmp_path: Path, monkeypatch) -> Path:
    """A folder of manual pages that this installation has."""
    folder = tmp_path / "share/man/man1"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (folder / "imgtool-chain.1").write_text(ROFF)
    return folder


@pytest.mark.parametrize("words", [["chain"], ["chain", "show"]])
def test_the_page_of_this_installation_is_shown(manual, monkeypatch, words):
    shown: list[list[str | Path]] = []

    def show(argv: list[str | Path]) -> int:
        shown.append(argv)
        return 0

    monkeypatch.setattr(process, "interactive", show)
    helping.show_help(words)
    assert shown == [["man", "-l", manual / "imgtool-chain.1"]]


def test_a_page_that_man_cannot_show_is_no_answer(manual, monkeypatch, capsys):
    monkeypatch.setattr(process, "interactive", lambda argv: 3)
    helping.show_help(["chain", "show"])
    assert capsys.readouterr().out.startswith("Usage: imgtool chain show ")


def test_a_page_that_man_finds_is_shown(manual, monkeypatch):
    """Such as that of a package whose modules are elsewhere."""
    if process.find("man") is None:
        pytest.skip("no man(1) here")
    elsewhere = manual.parents[1] / "other/man1"
    elsewhere.mkdir(parents=True)
    (elsewhere / "imgtool-of-nobody.1").write_text(ROFF)
    monkeypatch.setenv("MANPATH", str(elsewhere.parent))
    assert helping._manual_page("imgtool-of-nobody") == elsewhere / "imgtool-of-nobody.1"
    assert helping._manual_page("imgtool-of-nobody-else") is None


def test_without_man_the_help_is_shown(tmp_path):
    done = imgtool("help", "chain", "show", PATH=str(tmp_path))
    if process.find("man") in ("/usr/sbin/man", "/sbin/man"):
        pytest.skip("man(1) is where every program looks")
    assert done.returncode == 0
    assert done.stdout == imgtool("chain", "show", "--help").stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lss"], "No such command 'lss'. Did you mean 'ls'?"),
        (["nonsense"], "No such command 'nonsense'"),
        (["chain", "tre"], "No such command 'tre'. Did you mean 'tree'?"),
        (["ls", "chain"], "it has no commands of its own (imgtool ls)"),
    ],
)
def test_what_is_no_command_is_wrong_usage(words, line):
    done = imgtool("help", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == f"imgtool: error: {line}"
