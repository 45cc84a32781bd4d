"""The command line: it parses, calls the library, and renders. `main()` is the entry point."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from imgtool import __version__, interrupt
from imgtool.cli import (
    chain_checks,
    chains,
    copying,
    diffing,
    editing,
    images,
    injecting,
    inspecting,
    listing,
    mounting,
    overlaying,
    render,
    single,
    snapshotting,
    space,
)
from imgtool.errors import ExitStatus, ImgtoolError

app = typer.Typer(
    name="imgtool",
    help="Look into, copy out of, and safely change the disks of guests that are not running.",
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"imgtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Say which version."),
    ] = False,
) -> None:
    pass


for command in (
    space.df,
    space.filesystems,
    space.partitions,
    listing.ls,
    listing.cat,
    copying.copy_out,
    copying.copy_in,
    editing.edit,
    injecting.inject,
    mounting.mount,
    mounting.umount,
    mounting.mounts,
    mounting.cleanup,
    images.info,
    single.check,
    single.create,
    single.convert,
    single.resize,
    overlaying.compact,
    single.recover,
    diffing.diff,
    inspecting.inspect,
    inspecting.doctor,
):
    app.command()(command)

chains.app.command()(chain_checks.check)

for group, name in (
    (chains.app, "chain"),
    (snapshotting.app, "snapshot"),
    (overlaying.app, "overlay"),
):
    app.add_typer(group, name=name)


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    command = typer.main.get_command(app)
    if not arguments and "_IMGTOOL_COMPLETE" not in os.environ:
        command.main(["--help"], prog_name="imgtool", standalone_mode=False)
        return ExitStatus.USAGE
    try:
        result = command.main(arguments, prog_name="imgtool", standalone_mode=False)
    except typer.TyperException as error:
        render.message("error", error.format_message().rstrip("."))
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "imgtool"
        render.hint(f"'{where} --help' lists the arguments and options")
        return ExitStatus.USAGE
    except ImgtoolError as error:
        if debug:
            traceback.print_exception(error)
        if not interrupt.pending():  # else the error is only what the interruption looked like
            render.message("error", str(error))
            if error.hint:
                render.hint(error.hint)
        return error.status
    except (KeyboardInterrupt, typer.Abort):
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has enough. Nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.FAILED
    except Exception as error:  # the last resort: a defect of imgtool, told as one
        if debug:
            raise
        render.message("error", f"internal error: {type(error).__name__}: {error}")
        render.hint("run it again with --debug and report what it prints")
        return ExitStatus.FAILED
    return result if isinstance(result, int) else ExitStatus.DONE


def main() -> None:
    """The console script: run the command, say what went wrong, exit with its status."""
    with interrupt.watch():
        try:
            status = _run(sys.argv[1:])
            sys.stdout.flush()
        except KeyboardInterrupt:  # before the command itself, or after it
            status = ExitStatus.INTERRUPTED
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else ExitStatus.FAILED
        if status == ExitStatus.INTERRUPTED or (interrupt.pending() and status != ExitStatus.DONE):
            render.message("error", "interrupted")
            status = ExitStatus.INTERRUPTED
    sys.exit(int(status))
