"""The documentation as tests read it: pages, their blocks of code, and the commands in them."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from imgtool.cli.command_table import app_with
from imgtool.search.expression import KNOWN

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^(`{3,}|:{3,})(.*)$")
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_PROMPT = re.compile(r"^[$#] ")
_LITERAL = re.compile(r"[a-z][\w-]*$")


def pages() -> list[Path]:
    """Every page that people read: those of docs, and those at the top of the project."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    return sorted(DOCS.rglob("*.md")) + [page for page in top if page.exists()]


@functools.cache
def extension(name: str) -> ModuleType:
    """An extension of docs, which Sphinx loads by its path."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_pages() -> ModuleType:
    """What writes the generated parts of pages."""
    return extension("reference_pages")


@functools.cache
def whole(page: Path) -> str:
    """A page with its generated parts, as readers have it."""
    text: str = reference_pages().generated(page.read_text())
    return text


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass
class Block:
    """A block of code: its language, where it begins, and why it is not run, if it is not."""

    language: str
    line: int
    text: str
    not_run: str | None


def blocks(page: Path) -> Iterator[Block]:
    fence, language, start, not_run = "", "", 0, None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        found = _FENCE.match(line)
        if not fence and found:
            fence, language, start, lines = found[1], found[2].strip(), number, []
        elif fence and line.strip() == fence:
            yield Block(language, start, "\n".join(lines), not_run)
            fence, not_run = "", None
        elif fence:
            lines.append(line)
        elif line.strip():
            said = _NOT_RUN.match(line)
            not_run = said[1] if said else None


def prose(page: Path) -> str:
    """A page without its blocks of code, all lines in their places."""
    kept, fence = [], ""
    for line in page.read_text().splitlines():
        found = _FENCE.match(line)
        if not fence and found:
            fence = found[1]
        elif fence and line.strip() == fence:
            fence = ""
        else:
            kept.append("" if fence and fence[0] == "`" else line)
            continue
        kept.append("")
    return "\n".join(kept)


def spans(page: Path) -> Iterator[str]:
    """What stands between backticks in the prose of a page."""
    for found in _SPAN.finditer(prose(page)):
        yield " ".join(found[2].split())


@dataclass
class Typed:
    """A command of a block, and what it is said to print."""

    command: str
    line: int
    output: list[str] = field(default_factory=list)


def commands_of(group: object) -> Mapping[str, Any]:
    """The commands of a group of them, by their names."""
    assert isinstance(group, typer.core.TyperGroup)
    return group.commands


def typed(block: Block) -> list[Typed]:
    """The commands of a block of console; a line that begins with `> ` goes on with a command."""
    every: list[Typed] = []
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if _PROMPT.match(line):
            every.append(Typed(line[2:], number))
            continue
        assert every, f"output before any command, line {number}"
        if line.startswith("> ") and not every[-1].output:
            every[-1].command += "\n" + line[2:]
        else:
            every[-1].output.append(line)
    return every


@functools.cache
def options() -> dict[str, set[str]]:
    """The options of each command, by its name, such as `overlay commit`; of all, by ``."""

    def of(command: Any) -> set[str]:
        every = {option for parameter in command.params for option in parameter.opts}
        return {option for option in every if option.startswith("-")} | {"--help"}

    root = typer.main.get_command(app_with(None))
    found = {"": of(root)}
    for name, command in commands_of(root).items():
        found[name] = of(command)
        for member, one in getattr(command, "commands", {}).items():
            found[f"{name} {member}"] = of(one)
    return found


def mistakes(words: list[str]) -> Iterator[str]:
    """What the words after `imgtool` name that is not there."""
    known = options()
    names = [word for word in words if not word.startswith("-")]
    if names and words[0] == names[0] and not _LITERAL.match(names[0]):
        return  # imgtool COMMAND
    name = names[0] if names and _LITERAL.match(names[0]) else ""
    is_group = any(one.startswith(f"{name} ") for one in known)
    if name and is_group and len(names) > 1 and _LITERAL.match(names[1]):
        name = f"{name} {names[1]}"
    if name not in known:
        yield f"no such command: imgtool {name}"
        return
    for word in words:
        if word == "--":
            return
        option = word.split("=")[0]
        if name == "find" and word in KNOWN:  # its expression
            continue
        if not re.match(r"--?[A-Za-z]", option) or option in known[name]:
            continue
        letters = option[1:] if re.fullmatch(r"-[A-Za-z]+", option) else ""
        if not letters or any(f"-{letter}" not in known[name] for letter in letters):
            yield f"no such option: imgtool {name} {option}"


def invocations(line: str) -> Iterator[list[str]]:
    """The words after each `imgtool` of a line of shell."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>()")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # an apostrophe of prose
        words = line.split()
    current: list[str] | None = None
    begins = True
    for word in words:
        if set(word) <= set("|;&<>()"):
            if current is not None:
                yield current
            current, begins = None, True
        elif begins and word == "imgtool":
            current, begins = [], False
        elif current is not None:
            current.append(word)
        elif "=" not in word and word not in ("sudo", "for", "do", "then", "if", "time"):
            begins = False
    if current is not None:
        yield current
