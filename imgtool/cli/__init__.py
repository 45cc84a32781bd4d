"""The command line: it parses, calls the library, and renders. `main()` is the entry point."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from typing import Any, NoReturn

import typer

from imgtool.cli import render
from imgtool.cli.command_table import COMMANDS, GROUPS, app_with, overview
from imgtool.errors import NO_ROOM, ExitStatus, ImgtoolError
from imgtool.host import interrupt


def _meant(command: object, arguments: list[str]) -> str:
    """The command, and those below it, that was meant: not every error of use says which."""
    words = ["imgtool"]
    for argument in arguments:
        below = getattr(command, "commands", {}).get(argument)
        if below is not None:
            command = below
            words.append(argument)
        elif not argument.startswith("-"):
            break
    return " ".join(words)


def _way_to_help(command: object, arguments: list[str], error: typer.TyperException) -> str:
    """Which help lists what an error of use is about."""
    meant = _meant(command, arguments)
    path = getattr(getattr(error, "ctx", None), "command_path", meant)
    # `imgtool help lss`: what is wrong is a name that the command was given.
    if meant in ("imgtool help", "imgtool schema") and path != meant:
        return f"'{path} --help' lists the commands"
    return f"'{meant} --help' lists the arguments and options"


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    completing = "_IMGTOOL_COMPLETE" in os.environ
    first = next((word for word in arguments if word != "--"), None)
    if first in COMMANDS or first in GROUPS:
        app = app_with(first)
    else:
        app = app_with(None) if completing else overview()
    command = typer.main.get_command(app)
    _open_no_file(command)
    helpless = not arguments and not completing
    try:
        result = command.main(
            ["--help"] if helpless else arguments, prog_name="imgtool", standalone_mode=False
        )
        sys.stdout.flush()
    except typer.TyperException as error:
        render.message("error", error.format_message().rstrip("."))
        render.hint(_way_to_help(command, arguments, error))
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
        if isinstance(error, OSError) and error.errno == errno.EBADF and sys.__stdout__ is None:
            render.message("error", "the answer cannot be written: stdout is closed")
            return ExitStatus.FAILED
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            reason = (error.strerror or "").lower()
            where = f" ({error.filename})" if error.filename else ""
            render.message("error", f"what was asked for cannot be written: {reason}{where}")
            render.hint("make room, or write it elsewhere, then repeat the command")
            return ExitStatus.HOST_CANNOT
        render.message("error", f"internal error: {type(error).__name__}: {error}")
        render.hint("run it again with --debug and report what it prints")
        return ExitStatus.FAILED
    if helpless:
        return ExitStatus.USAGE
    return result if isinstance(result, int) else ExitStatus.DONE


def _open_no_file(command: Any) -> None:
    """A file that may not be read is told by whoever reads it, with the status that this has: to
    the parser it would be wrong usage, and would end a command that has other images to look at.
    """
    for parameter in command.params:
        if hasattr(parameter.type, "readable"):
            parameter.type.readable = False
    for member in getattr(command, "commands", {}).values():
        _open_no_file(member)


def _open_streams() -> None:
    """Open the standard streams that whoever started imgtool has closed: else the next file that is
    opened, an image perhaps, would be taken for one of them. To such a stdout nothing can be
    written; what goes to such a stderr is lost.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            os.dup2(opened, number)
            if opened != number:
                os.close(opened)
            os.set_inheritable(number, True)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, errors="surrogateescape"))


def main() -> None:
    """The console script: run the command, say what went wrong, exit with its status."""
    _open_streams()
    with interrupt.watch():
        try:
            status = _run(sys.argv[1:])
        except KeyboardInterrupt:  # before the command itself, or after it
            status = ExitStatus.INTERRUPTED
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else ExitStatus.FAILED
        if status == ExitStatus.INTERRUPTED or (interrupt.pending() and status != ExitStatus.DONE):
            render.message("error", "interrupted")
            status = ExitStatus.INTERRUPTED
    _leave(int(status))


def _leave(status: int) -> NoReturn:
    """End at once: whatever has to be put away is a context manager and was, and to take Python
    apart besides would take longer than to read a small file of a guest.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
