"""A Sphinx extension: what the command line itself knows is written into the pages of reference.

A page has a comment where it goes:

    <!-- generated: command ls -->    synopsis, description, arguments and options of a command
    <!-- generated: commands -->      every command with its one line
    <!-- generated: spec -->          the steps of a spec of inject

`imgtool-ls(1)` is made a link to the page of that command. Pages and manual pages have the same
text. A comment that names no command stops the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import typer

from imgtool.cli.command_table import COMMANDS, GROUPS, app_with
from imgtool.inject.spec import schema_text

_MARK = re.compile(r"^<!-- generated: (\w+)(?: ([\w-]+))? -->$", re.MULTILINE)
_MANUAL = re.compile(r"\bimgtool-([a-z-]+)\(1\)")
_SPECIAL = re.compile(r"([\\*_<>\[\]{}#|~$])")
# Where the page of a command is, by its name.
PAGE = "reference/commands/{}"


def app() -> Any:
    """The whole command line, as its parser has it."""
    return typer.main.get_command(app_with(None))


def man_pages() -> list[tuple[str, str, str, str, int]]:
    """What the man builder makes: imgtool(1), and a page for each command or group of commands."""
    root = app()
    pages = [("reference/imgtool", "imgtool", _lower(_summary(root)), "", 1)]
    for name in (*COMMANDS, *GROUPS):
        line = _lower(_summary(root.commands[name]))
        pages.append((PAGE.format(name), f"imgtool-{name}", line, "", 1))
    return pages


def _paragraphs(command: Any) -> list[str]:
    return re.split(r"\n\s*\n", (command.help or "").strip())


def _summary(command: Any) -> str:
    """The first sentence of a command's help, without its full stop."""
    return re.split(r"\.(?:\s|$)", " ".join(_paragraphs(command)[0].split()), maxsplit=1)[0]


def _lower(line: str) -> str:
    return line[:1].lower() + line[1:]


def escaped(text: str) -> str:
    """Text of the help as Markdown; what is between backticks is code there too."""
    parts = text.split("`")
    parts[::2] = [_SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _prose(paragraphs: list[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        if paragraph.lstrip().startswith("\b"):  # click's sign: not to be wrapped
            lines = [line for line in paragraph.splitlines() if line.strip() != "\b"]
            yield "\n".join(["```text", *lines, "```"])
        else:
            yield escaped(" ".join(paragraph.split()))


def _usage(path: str, command: Any) -> str:
    """A line of the synopsis, as manual pages have it: braces are the parser's own."""
    context = command.context_class(command, info_name=path)
    pieces = [re.sub(r"^\{(.*)\}$", r"\1", p) for p in command.collect_usage_pieces(context)]
    return f"**{path}** {escaped(' '.join(pieces))}"


def _records(path: str, command: Any) -> Iterator[tuple[str, str, bool]]:
    """Name, help, and whether it is an option, of each parameter that the help shows."""
    context = command.context_class(command, info_name=path)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield *record, parameter.param_type_name == "option"


def _parameters(path: str, command: Any, level: str) -> Iterator[str]:
    records = list(_records(path, command))
    arguments = [(name, text) for name, text, is_option in records if not is_option]
    options = [(name, text) for name, text, is_option in records if is_option]
    if arguments:
        yield f"{level} Arguments"
        for name, text in arguments:
            yield f"`{name}`\n: {escaped(text)}"
    yield f"{level} Options"
    yield f"```{{program}} {path}\n```"
    for name, text in options:
        yield f":::{{option}} {name}\n{escaped(text)}\n:::"


def _one(path: str, command: Any, level: str) -> Iterator[str]:
    yield f"{level} Synopsis"
    yield _usage(path, command)
    yield f"{level} Description"
    yield from _prose(_paragraphs(command))
    yield from _parameters(path, command, level)
    yield from _prose(re.split(r"\n\s*\n", (command.epilog or "").strip()))


def _group(name: str, group: Any) -> Iterator[str]:
    yield "## Synopsis"
    for member, command in group.commands.items():
        yield _usage(f"imgtool {name} {member}", command)
    yield "## Description"
    yield from _prose(_paragraphs(group))
    for member, command in group.commands.items():
        path = f"imgtool {name} {member}"
        yield f"## {path}"
        yield from _prose(_paragraphs(command))
        yield from _parameters(path, command, "###")
        yield from _prose(re.split(r"\n\s*\n", (command.epilog or "").strip()))


def command_page(name: str) -> str:
    """The generated part of a command's page, as Markdown."""
    command = app().commands[name]
    parts = _group(name, command) if name in GROUPS else _one(f"imgtool {name}", command, "##")
    return "\n\n".join(part for part in parts if part.strip())


def command_list() -> str:
    """Every command with its one line and a link to its page."""
    root = app()
    lines = []
    for name in (*COMMANDS, *GROUPS):
        link = f"[`imgtool {name}`](/{PAGE.format(name)}.md)"
        lines.append(f"{link}\n: {escaped(_summary(root.commands[name]))}.")
    return "\n\n".join(lines)


def _keys(step: dict[str, Any]) -> str:
    """The keys of a step in words; those without which it cannot be are bold."""
    forms = [step, *step.get("anyOf", ())]
    keys = {key: form for form in forms for key in form.get("properties", {})}
    words = [f"**{key}**" if key in form.get("required", ()) else key for key, form in keys.items()]
    constant = step.get("const")
    return f"`{constant}`" if constant else ", ".join(words)


def spec_steps() -> str:
    """Each step with what it does, and its keys."""
    steps = json.loads(schema_text())["$defs"]["step"]["properties"]
    lines = ["| step | what | keys |", "| --- | --- | --- |"]
    for name, step in steps.items():
        text = escaped(step.get("description", ""))
        lines.append(f"| `{name}` | {text} | {_keys(step)} |")
    return "\n".join(lines) + "\n\nBold keys have to be there."


def generated(source: str) -> str:
    """A page with its comments replaced."""

    def replaced(mark: re.Match[str]) -> str:
        kind, name = mark[1], mark[2]
        if kind == "commands":
            return command_list()
        if kind == "spec":
            return spec_steps()
        if kind != "command" or name not in app().commands:
            raise ValueError(f"nothing is generated for this: {mark[0]}")
        return command_page(name)

    linked = _MANUAL.sub(lambda name: f"[{name[0]}](/{PAGE.format(name[1])}.md)", source)
    return _MARK.sub(replaced, linked)


def _read(_app: Any, _page: str, source: list[str]) -> None:
    source[0] = generated(source[0])


def setup(app: Any) -> dict[str, bool]:
    from sphinx.writers.manpage import ManualPageTranslator  # tests do without Sphinx

    class ManualPage(ManualPageTranslator):
        """Without the space after a heading, which mandoc(1) complains about, and without the
        addresses of links: those between pages have none here."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            # docutils has put its own on the translator itself.
            self.visit_reference = self.depart_reference = lambda node: None

        def astext(self) -> str:
            return re.sub(r"^(\.S[HS] .*\n)(\.sp\n)+", r"\1", super().astext(), flags=re.M)

    app.set_translator("man", ManualPage)
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
