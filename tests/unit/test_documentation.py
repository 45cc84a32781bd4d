"""What the documentation says of the program is so: commands, options, statuses, names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imgtool.cli.command_table import COMMANDS, GROUPS
from tests.support.documentation import (
    DOCS,
    Block,
    blocks,
    extension,
    invocations,
    mistakes,
    name_of,
    options,
    pages,
    reference_pages,
    spans,
    typed,
)

# Options of other programs that the prose names by themselves.
_OF_OTHERS = {"--no-tests"}  # of scripts/setup.sh


def test_each_command_has_a_page_and_each_page_a_command():
    known = {page.stem for page in (DOCS / "reference/commands").glob("*.md")} - {"index"}
    assert known == {*COMMANDS, *GROUPS}


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_the_page_of_a_command_is_made_of_the_program(name):
    source = (DOCS / f"reference/commands/{name}.md").read_text()
    assert source.startswith(f"# imgtool {name}\n\n<!-- generated: command {name} -->\n")
    page = reference_pages().generated(source)
    for full, known in options().items():
        if full == name or full.startswith(f"{name} "):
            assert f"**imgtool {full}**" in page or name in GROUPS
            for option in known:
                assert re.search(rf"^:::{{option}} (.*, )?{option}\b", page, re.M), option


def test_a_page_of_no_command_stops_the_build():
    with pytest.raises(ValueError, match="nothing is generated for this"):
        reference_pages().generated("<!-- generated: command nonsense -->")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_packages_leave_out_what_leads_to_developers(page: Path):
    """Packages leave these lines out, and the pages."""
    if DOCS in page.parents and DOCS / "development" not in page.parents:
        assert "development/" not in extension("plain_text").without_developers(page.read_text())


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("overlays", "../howto/overlays.txt#moved", " (../howto/overlays.txt)"),
        ("semantic", "https://semver.org/", " <https://semver.org/>"),
        ("https://semver.org/", "https://semver.org/", ""),
        ("imgtool-ls(1)", "ls.txt", ""),
        ("further down", "#below", ""),
    ],
)
def test_a_link_in_plain_text_has_the_file_beside_it(text, address, shown):
    assert extension("plain_text").shown_address(text, address) == shown


def test_a_table_in_plain_text_fits_a_terminal():
    widths = extension("plain_text").column_widths
    assert widths([10, 20], [5, 5], most=80) == [10, 20]
    assert widths([10, 200], [5, 30], most=80) == [10, 63]
    assert widths([90, 90], [70, 70], most=80) == [70, 70]


def test_the_ten_tasks_are_on_the_first_page():
    page = reference_pages().generated((DOCS / "index.md").read_text())
    tasks = page.split("## Ten tasks")[1].split("\n## ")[0]
    assert len(re.findall(r"^: `imgtool .*; \[more\]\(/howto/[\w-]+\.md\)$", tasks, re.M)) == 10


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_examples_are_where_they_are_found(page: Path):
    """A block in a list would never be run; a reason above no block is for nothing."""
    source = page.read_text()
    assert re.findall(r"^[ >]+(?:```|:::).*", source, re.M) == []
    skipped = [block for block in blocks(page) if block.not_run is not None]
    assert len(re.findall(r"^<!-- not run: ", source, re.M)) == len(skipped)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_commands_and_options_that_a_page_names_exist(page: Path):
    wrong = []
    for block in blocks(page):
        if block.language == "console":
            for one in typed(block):
                for words in invocations(one.command):
                    wrong += [f"line {one.line}: {text}" for text in mistakes(words)]
    everywhere = set().union(*options().values()) | _OF_OTHERS
    for span in spans(page):
        for words in invocations(span):
            wrong += list(mistakes(words))
        if re.fullmatch(r"--[a-z][a-z-]*", span.split()[0].split("=")[0]):
            option = span.split()[0].split("=")[0]
            wrong += [] if option in everywhere else [f"no such option: {span}"]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("imgtool ls guest.qcow2 -lR /etc | head", []),
        ("sudo imgtool overlay commit --remove x", []),
        ("imgtool resize disk.qcow2 -- -5G", []),
        ("A=1 imgtool lss x", ["no such command: imgtool lss"]),
        ("imgtool overlay merge x", ["no such command: imgtool overlay merge"]),
        ("true; imgtool ls --sort x", ["no such option: imgtool ls --sort"]),
        ("imgtool ls -lq x", ["no such option: imgtool ls -lq"]),
        ("imgtool --nonsense", ["no such option: imgtool  --nonsense"]),
        ("imgtool COMMAND --help", []),
    ],
)
def test_a_command_that_is_not_there_is_found(line, wrong):
    assert [text for words in invocations(line) for text in mistakes(words)] == wrong


def test_what_is_printed_belongs_to_the_command_above_it():
    block = Block("console", 7, "$ one \\\n>     more\nout\n\n# two\n", None)
    assert [(one.command, one.line, one.output) for one in typed(block)] == [
        ("one \\\n    more", 8, ["out", ""]),
        ("two", 12, []),
    ]
