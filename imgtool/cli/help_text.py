"""How help looks: commands below headings, a whole line for each, and where the manual page is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import typer.core

from imgtool.cli.other_names import meant

# The commands of `imgtool --help`; each is below one heading.
HEADINGS = {
    "Look": (
        "df",
        "filesystems",
        "partitions",
        "inspect",
        "ls",
        "find",
        "du",
        "stat",
        "cat",
        "head",
        "tail",
        "diff",
    ),
    "Copy and change": ("copy-out", "copy-in", "edit", "rm", "inject"),
    "Mount": ("mount", "umount", "mounts", "cleanup"),
    "Images and chains": (
        *("info", "check", "create", "convert", "resize", "compact", "recover"),
        *("chain", "snapshot", "overlay"),
    ),
    "This machine": ("doctor", "appliance"),
    "Help": ("help", "schema"),
}


def paragraphs(command: Any) -> list[str]:
    """The paragraphs of a command's help."""
    return re.split(r"\n\s*\n", (command.help or "").strip())


def summary(command: Any) -> str:
    """The first sentence of a command's help, without its full stop."""
    return re.split(r"\.(?:\s|$)", " ".join(paragraphs(command)[0].split()), maxsplit=1)[0]


def _write_page(context: Any, formatter: Any) -> None:
    """Say where the manual page of a command is: a command of a group is on the group's page."""
    name = context.command_path.split()[1]
    formatter.write_paragraph()
    formatter.write_text(f"Manual page: imgtool-{name}(1), which 'imgtool help {name}' shows")


class Command(typer.core.TyperCommand):
    """A command whose help says where its manual page is."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        _write_page(ctx, formatter)


class WordsCommand(Command):
    """A command whose options end at its first argument."""

    allow_interspersed_args = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Help is asked for wherever its option stands."""
        return super().parse_args(ctx, ["--help"] if "--help" in args else args)


class Group(typer.core.TyperGroup):
    """Commands with a whole line for each."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named first; one of another tool leads to what does it here."""
        if args and args[0] not in self.commands:
            other = meant(ctx.command_path.split()[1:], args[0], self.commands)
            if other is not None:
                ctx.fail(f"No such command {args[0]!r}. Did you mean {other}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        self._write(formatter, "Commands", list(self.commands))

    def _write(self, formatter: Any, heading: str, names: Sequence[str]) -> None:
        # All names take the same width, so that the lines below all headings begin alike.
        width = max(map(len, self.commands))
        rows = [(f"{name:<{width}}", f"{summary(self.commands[name])}.") for name in names]
        with formatter.section(heading):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        _write_page(ctx, formatter)


class Root(Group):
    """All commands, below their headings."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, names in HEADINGS.items():
            self._write(formatter, heading, [name for name in names if name in self.commands])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write_paragraph()
        formatter.write_text(
            "'imgtool COMMAND --help' has examples, 'imgtool help' the manual page."
        )
