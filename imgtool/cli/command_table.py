"""Which command is which function. Only the one that is asked for is imported and built: to build
all of them takes longer than most of them do."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
from collections.abc import Callable
from types import CodeType
from typing import Annotated

import typer

from imgtool import __version__
from imgtool.cli.help_text import Command, Group, Root, WordsCommand

# `help_text` has the headings that they stand below.
COMMANDS = {
    "df": "space.df",
    "filesystems": "space.filesystems",
    "partitions": "space.partitions",
    "ls": "listing.ls",
    "find": "finding.find",
    "du": "measuring.du",
    "stat": "looking.stat",
    "cat": "listing.cat",
    "head": "looking.head",
    "tail": "looking.tail",
    "copy-out": "copying.copy_out",
    "copy-in": "copying.copy_in",
    "rm": "removing.rm",
    "edit": "editing.edit",
    "inject": "injecting.inject",
    "mount": "mounting.mount",
    "umount": "mounting.umount",
    "mounts": "mounting.mounts",
    "cleanup": "mounting.cleanup",
    "info": "images.info",
    "check": "single.check",
    "create": "single.create",
    "convert": "single.convert",
    "resize": "single.resize",
    "compact": "overlaying.compact",
    "recover": "single.recover",
    "diff": "diffing.diff",
    "inspect": "inspecting.inspect",
    "doctor": "inspecting.doctor",
    "help": "helping.show_help",
    "schema": "schemas.schema",
}
# Those whose options end at the first argument: what follows are words of another language.
WITH_WORDS = ("find",)
# Commands of commands, each with its help.
GROUPS = {
    "chain": (
        "See what stands on what, and whether it is sound.",
        {"show": "chains.show", "tree": "chains.tree", "check": "chain_checks.check"},
    ),
    "snapshot": (
        "Make, list, revert to and delete snapshots of a qcow2 image. To look into one reverts "
        "nothing: --snapshot NAME.",
        {
            "create": "snapshotting.create",
            "list": "snapshotting.list_",
            "revert": "snapshotting.revert",
            "delete": "snapshotting.delete",
        },
    ),
    "overlay": (
        "Make overlays on an image; merge (commit) or flatten them.",
        {
            "create": "overlaying.create",
            "commit": "overlaying.commit",
            "rebase": "overlaying.rebase",
            "flatten": "overlaying.flatten",
        },
    ),
    "appliance": (
        "Keep a started appliance, which is there in a second.",
        {"save": "appliance.save", "list": "appliance.list_", "remove": "appliance.remove"},
    ),
}


def _load(name: str) -> Callable[..., object]:
    module, _, function = name.partition(".")
    command: Callable[..., object] = getattr(
        importlib.import_module(f"imgtool.cli.commands.{module}"), function
    )
    return command


def _version(wanted: bool) -> None:
    if wanted:
        print(f"imgtool {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Say which version."),
    ] = False,
) -> None:
    pass


def _stand_in(name: str) -> Callable[[], None]:
    """A function with the docstring of a command's. It is out of the compiled module, which is not
    run: what all of them import takes longer than the rest of `imgtool --help`."""
    module, _, function = name.partition(".")
    spec = importlib.util.find_spec(f"imgtool.cli.commands.{module}")
    assert spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader)
    code = spec.loader.get_code(spec.name)
    assert code is not None
    (found,) = (
        one for one in code.co_consts if isinstance(one, CodeType) and one.co_name == function
    )

    def command() -> None:
        raise NotImplementedError(name)

    command.__doc__ = found.co_consts[0]
    return command


@functools.cache
def app_with(wanted: str | None) -> typer.Typer:
    """The command line with one command, or one group of them; with all where it is None."""
    return _app(wanted, _load)


@functools.cache
def overview() -> typer.Typer:
    """The command line for what names no command: its commands can be listed, and not be run."""
    return _app(None, _stand_in)


def _app(one: str | None, function_of: Callable[[str], Callable[..., object]]) -> typer.Typer:
    app = typer.Typer(
        name="imgtool",
        cls=Root,
        help="Look into, copy out of, and safely change the disks of guests that are not running.",
        add_completion=one is None,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name, function in COMMANDS.items():
        if one in (None, name):
            cls = WordsCommand if name in WITH_WORDS else Command
            app.command(name, cls=cls)(function_of(function))
    for name, (text, members) in GROUPS.items():
        if one in (None, name):
            group = typer.Typer(cls=Group, help=text, rich_markup_mode=None)
            for member, function in members.items():
                group.command(member, cls=Command)(function_of(function))
            app.add_typer(group, name=name)
    return app
