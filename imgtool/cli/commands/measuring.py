"""`du`: what fills a guest."""

from __future__ import annotations

import contextlib
import heapq
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool import __version__
from imgtool.cli import options, render
from imgtool.cli.guest_command import READ, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request
from imgtool.errors import EngineError, HostError, NotInGuestError, UsageError

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest
    from imgtool.guest.model import Entry
    from imgtool.search.disk_usage import Usage

FIELDS = ("path", "type", "allocated", "apparent", "files", "depth")
_BAR = 20  # columns


@guest_command(*READ)
def du(
    request: Request,
    paths: options.GuestPathsOrRoot = None,
    depth: Annotated[
        int | None,
        typer.Option("--depth", metavar="N", min=0, help="Directories so deep, no deeper. [1]"),
    ] = None,
    summarize: Annotated[
        bool, typer.Option("-s", "--summarize", help="Each path in one line, as --depth 0.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Files too.")] = False,
    top: Annotated[
        int | None, typer.Option("--top", metavar="N", min=1, help="The N largest, however deep.")
    ] = None,
    one_filesystem: Annotated[
        bool, typer.Option("-x", "--one-file-system", help="Stay on the path's filesystem.")
    ] = False,
    apparent: Annotated[
        bool, typer.Option("--apparent-size", help="By the sizes that ls shows.")
    ] = False,
    human: options.Human = False,
    ncdu: Annotated[
        Path | None,
        typer.Option(
            "--ncdu", metavar="FILE", help="Write what 'ncdu -f FILE' opens; - is stdout."
        ),
    ] = None,
    output: options.OutputOption = Output.table,
) -> None:
    """Show what fills a guest: the largest directories first.

    Sizes are what is allocated, in KiB; files with several names count once.

    \b
    Examples:
      imgtool du -h --top 20 --all guest.qcow2
      imgtool du -sh guest.qcow2 '/home/*'
      imgtool du --ncdu usage.json guest.qcow2
    """
    from imgtool.guest.globbing import expand
    from imgtool.search.disk_usage import measure

    if ncdu is not None and (top or depth is not None or everything or summarize):
        raise UsageError("--ncdu writes all: --depth, --top and --all are not for it")
    if summarize and (depth or top or everything):
        raise UsageError("-s is one line for each path: --depth, --top and --all are not for it")
    deepest = 0 if summarize else depth if depth is not None else None if top else 1
    failures = Failures(request.debug)
    with request.opened() as guest:
        starts = []
        for typed in paths or ["/"]:
            with failures.caught():
                starts += [_start(guest, path) for path in expand(guest, typed)]
        if ncdu is not None:
            failures.finish()
            if len(starts) != 1:
                raise UsageError("--ncdu takes one path")
            _export(guest, starts[0], ncdu, failures)
            failures.finish()
            return

        def usages() -> Iterator[Usage]:
            for start in starts:
                with failures.caught():
                    yield from measure(
                        guest,
                        start,
                        one_filesystem=one_filesystem,
                        on_problem=failures.problem,
                    )

        def size(usage: Usage) -> int:
            return usage.apparent if apparent else usage.allocated

        shown = (
            usage
            for usage in usages()
            if usage.depth == 0
            or (
                (everything or usage.entry.type == "directory")
                and (deepest is None or usage.depth <= deepest)
            )
        )
        largest = (
            heapq.nlargest(top, shown, key=size) if top else sorted(shown, key=size, reverse=True)
        )
    if output is Output.table:
        for line in _lines(largest, size, human):
            print(line)
    else:
        render.emit(map(_row, largest), FIELDS, output)
    sys.stdout.flush()
    failures.finish()


def _start(guest: Guest, path: str) -> Entry:
    """What a path names; of a link to a directory, the directory."""
    entry = guest.lstat(path)
    if entry.type == "symlink":
        with contextlib.suppress(NotInGuestError, EngineError):
            real = guest.lstat(guest.resolve(path))
            return real if real.type == "directory" else entry
    return entry


def _row(usage: Usage) -> dict[str, object]:
    return {
        **render.name_fields("path", usage.entry.path),
        "type": usage.entry.type,
        "allocated": usage.allocated,
        "apparent": usage.apparent,
        "files": usage.files,
        "depth": usage.depth,
    }


def _lines(usages: list[Usage], size: Callable[[Usage], int], human: bool) -> Iterator[str]:
    most = max((size(usage) for usage in usages), default=0)
    bars = sys.stdout.isatty()
    for usage in usages:
        value = size(usage)
        number = render.human(value) if human else str(-(-value // 1024))
        bar = ""
        if bars:
            filled = round(_BAR * value / most) if most else 0
            bar = f"{'#' * filled:<{_BAR}}  "
        yield f"{number:>10}  {bar}{render.escape(usage.entry.path)}"


def _export(guest: Guest, top: Entry, file: Path, failures: Failures) -> None:
    from imgtool.search.ncdu import export

    pieces: Iterable[str] = export(
        top,
        guest.walk(top.path, on_problem=failures.problem) if top.type == "directory" else (),
        program="imgtool",
        version=__version__,
        moment=int(time.time()),
    )
    if str(file) == "-":
        for piece in pieces:
            sys.stdout.write(piece)
        return
    try:
        with file.open("x") as out:
            out.writelines(pieces)
    except FileExistsError as error:
        raise UsageError("it exists already", subject=str(file)) from error
    except OSError as error:
        raise HostError(
            f"the file cannot be written: {error.strerror}", subject=str(file)
        ) from error
