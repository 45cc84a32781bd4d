"""The manual pages: what mandoc and man say of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imgtool.cli.command_table import COMMANDS, GROUPS
from tests.support.documentation import DOCS

# docutils writes a paragraph as one long line.
_STYLE = ("STYLE: input text line longer than 80 bytes",)

ALIASES = {
    f"imgtool-{group}-{member}.1": f"imgtool-{group}.1"
    for group, (_, members) in GROUPS.items()
    for member in members
}


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manual")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "man"]
    subprocess.run([*build, "-d", folder / "read", DOCS, folder], check=True)
    return folder / "man1"


def test_there_is_a_page_for_imgtool_and_for_each_command(manual):
    assert {page.name for page in manual.iterdir()} == {
        "imgtool.1",
        *(f"imgtool-{name}.1" for name in (*COMMANDS, *GROUPS)),
        *ALIASES,
    }


@pytest.mark.parametrize(("alias", "page"), ALIASES.items())
def test_a_command_of_a_group_is_found_as_the_page_of_its_group(manual, alias, page):
    man = ["man", "-M", manual.parent, "1", alias.removesuffix(".1")]
    shown = subprocess.run(man, capture_output=True, text=True, check=True).stdout
    whole = subprocess.run(["man", "-l", manual / page], capture_output=True, text=True, check=True)
    assert shown == whole.stdout
    assert "SYNOPSIS" in shown


def test_mandoc_finds_nothing_wrong(manual):
    lint = ["mandoc", "-T", "lint", *sorted(manual.iterdir())]
    said = subprocess.run(lint, capture_output=True, text=True, check=False).stdout
    assert [line for line in said.splitlines() if not any(one in line for one in _STYLE)] == []


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_a_page_has_the_sections_that_readers_look_for(manual, name):
    page = (manual / f"imgtool-{name}.1").read_text()
    assert f".SH NAME\nimgtool\\-{name} \\- " in page or f".SH NAME\nimgtool-{name} \\- " in page
    for section in ("SYNOPSIS", "DESCRIPTION"):
        assert f".SH {section}\n" in page
