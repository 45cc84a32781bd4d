"""A Sphinx extension: what the command line itself knows is written into the pages of reference.

A page has a comment where it goes:

    <!-- generated: command ls -->    synopsis, description, arguments and options of a command
    <!-- generated: commands -->      every command with its one line
    <!-- generated: fields df -->     the fields of its rows, as the schema describes them
    <!-- generated: reasons -->       the reasons of --force
    <!-- generated: tasks -->         the ten tasks of the README
    <!-- generated: spec -->          the steps of a spec of inject
    <!-- generated: schemas -->       the schemas of what commands write with -o json

`imgtool-ls(1)` is made a link to the page of that command. Pages and manual pages have the same
text. A comment that names no command stops the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from imgtool.cli.command_table import COMMANDS, GROUPS, app_with
from imgtool.cli.help_text import HEADINGS, paragraphs, summary
from imgtool.errors import Reason
from imgtool.inject.spec import schema_text

_MARK = re.compile(r"^<!-- generated: (\w+)(?: ([\w-]+))? -->$", re.MULTILINE)
_MANUAL = re.compile(r"\bimgtool-([a-z-]+)\(1\)")
_SPECIAL = re.compile(r"([\\*_<>\[\]{}#|~$])")
# What the paragraphs of the help begin with that have a heading in a page.
_EXAMPLES, _STATUS = "Examples:", "Exit status:"
# Where the page of a command is, by its name.
PAGE = "reference/commands/{}"
SCHEMAS = Path(__file__).parents[1] / "imgtool/schemas"


def app() -> Any:
    """The whole command line, as its parser has it."""
    return typer.main.get_command(app_with(None))


def man_pages() -> list[tuple[str, str, str, str, int]]:
    """What the man builder makes: imgtool(1), and a page for each command or group of commands."""
    root = app()
    pages = [("reference/imgtool", "imgtool", _lower(summary(root)), "", 1)]
    for name in (*COMMANDS, *GROUPS):
        line = _lower(summary(root.commands[name]))
        pages.append((PAGE.format(name), f"imgtool-{name}", line, "", 1))
    return pages


def write_aliases(folder: Path) -> None:
    """Write a manual page for each command of a group, such as imgtool-overlay-commit(1): it is
    that of its group. `folder` has the pages, in man1."""
    for group, (_, members) in GROUPS.items():
        for member in members:
            alias = folder / f"man1/imgtool-{group}-{member}.1"
            alias.unlink(missing_ok=True)
            alias.symlink_to(f"imgtool-{group}.1")


def _lower(line: str) -> str:
    return line[:1].lower() + line[1:]


def escaped(text: str) -> str:
    """Text of the help as Markdown; what is between backticks is code there too."""
    parts = text.split("`")
    parts[::2] = [_SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _prose(texts: list[str]) -> Iterator[str]:
    for paragraph in texts:
        if paragraph.lstrip().startswith("\b"):  # click's sign: not to be wrapped
            lines = [line for line in paragraph.splitlines() if line.strip() != "\b"]
            yield "\n".join(["```text", *lines, "```"])
        else:
            yield escaped(" ".join(paragraph.split()))


def _is_section(paragraph: str) -> bool:
    return paragraph.lstrip("\b\n ").startswith((_EXAMPLES, _STATUS))


def _sections(command: Any, level: str) -> Iterator[str]:
    """Examples and exit statuses of a command, which have headings of their own in its page."""
    for paragraph in filter(_is_section, paragraphs(command)):
        text = paragraph.lstrip("\b\n ")
        if text.startswith(_EXAMPLES):
            yield f"{level} Examples"
            lines = [line.strip() for line in text.removeprefix(_EXAMPLES).strip().splitlines()]
            yield "\n".join(["```text", *lines, "```"])
        else:
            yield f"{level} Exit status"
            words = " ".join(text.removeprefix(_STATUS).split())
            yield escaped(words[:1].upper() + words[1:]) + " Else as imgtool(1) has them."


def _description(command: Any) -> Iterator[str]:
    return _prose([text for text in paragraphs(command) if not _is_section(text)])


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
    yield from _description(command)
    yield from _parameters(path, command, level)
    yield from _sections(command, level)


def _group(name: str, group: Any) -> Iterator[str]:
    yield "## Synopsis"
    for member, command in group.commands.items():
        yield _usage(f"imgtool {name} {member}", command)
    yield "## Description"
    yield from _prose(paragraphs(group))
    for member, command in group.commands.items():
        path = f"imgtool {name} {member}"
        yield f"## {path}"
        yield from _description(command)
        yield from _parameters(path, command, "###")
        yield from _sections(command, "###")


def command_page(name: str) -> str:
    """The generated part of a command's page, as Markdown."""
    command = app().commands[name]
    parts = _group(name, command) if name in GROUPS else _one(f"imgtool {name}", command, "##")
    return "\n\n".join(part for part in parts if part.strip())


def command_list() -> str:
    """Every command with its one line and a link to its page."""
    root = app()
    parts = []
    for heading, names in HEADINGS.items():
        parts.append(f"### {heading}")
        for name in names:
            link = f"[`imgtool {name}`](/{PAGE.format(name)}.md)"
            parts.append(f"{link}\n: {escaped(summary(root.commands[name]))}.")
    return "\n\n".join(parts)


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


def schema_list() -> str:
    """Each schema, to be downloaded: the page of it is in docs/reference."""
    files = sorted(SCHEMAS.glob("*.json"))
    return "\n".join(
        f"- {{download}}`{json.loads(file.read_text())['title']} "
        f"<../../imgtool/schemas/{file.name}>`"
        for file in files
    )


def field_list(name: str) -> str:
    """Each field of a command's rows, with what its schema says of it."""
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    return "\n\n".join(
        f"`{field}`\n: {one['description']}"
        for field, one in schema["properties"].items()
        if not field.endswith("_bytes")  # of a name that is no text: the page of JSON says it
    )


def reason_list() -> str:
    """Each reason of --force, with what may happen without that guard."""
    return "\n\n".join(f"`{reason}`\n: {escaped(reason.without)}." for reason in Reason)


def task_list() -> str:
    """The tasks of the README, each with what to type and its page. `README.md` is beside docs."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme.split("## Ten tasks\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+) \| (.+) \(\[more\]\(docs/(.+)\)\) \|$", table, re.MULTILINE)
    return "\n\n".join(f"{task}\n: {typed}; [more](/{page})" for task, typed, page in rows)


def generated(source: str) -> str:
    """A page with its comments replaced."""

    def replaced(mark: re.Match[str]) -> str:
        kind, name = mark[1], mark[2]
        if kind == "commands":
            return command_list()
        if kind == "spec":
            return spec_steps()
        if kind == "reasons":
            return reason_list()
        if kind == "tasks":
            return task_list()
        if kind == "schemas":
            return schema_list()
        if kind == "fields" and (SCHEMAS / f"{name}.json").is_file():
            return field_list(name)
        if kind != "command" or name not in app().commands:
            raise ValueError(f"nothing is generated for this: {mark[0]}")
        return command_page(name)

    page = _MARK.sub(replaced, source)
    return _MANUAL.sub(lambda name: f"[{name[0]}](/{PAGE.format(name[1])}.md)", page)


def _finished(sphinx: Any, error: Exception | None) -> None:
    if error is None and sphinx.builder.name == "man":
        write_aliases(Path(sphinx.outdir))


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
    app.connect("build-finished", _finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
