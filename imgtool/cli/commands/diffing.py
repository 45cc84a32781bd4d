"""`diff`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import completing, differences, options, render
from imgtool.cli.guest_command import READ, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request
from imgtool.errors import ExitStatus, ImgtoolError, UsageError

if TYPE_CHECKING:
    from imgtool.compare.differences import Difference
    from imgtool.compare.points import Point
    from imgtool.guest.guest import Guest
    from imgtool.guest.model import Entry

_OF_EACH = ("type", "mode", "uid", "gid", "size", "mtime", "target", "rdev", "checksum")
XATTRS = ("xattrs_a", "xattrs_b")
FIELDS = ("change", "path", "fields", *(f"{name}_{side}" for name in _OF_EACH for side in "ab"))


def _side(entry: Entry | None, side: str) -> dict[str, object]:
    """One side of a row; every field None where the path is not there."""
    if entry is None:
        return {f"{name}_{side}": None for name in _OF_EACH}
    target = f"target_{side}"
    values = {
        "type": entry.type,
        "mode": f"{stat.S_IMODE(entry.mode):04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "mtime": render.timestamp(entry.mtime_ns),
        "target": None,
        "rdev": differences.device_numbers(entry),
        "checksum": entry.checksum,
    }
    row = {f"{name}_{side}": value for name, value in values.items()}
    return row if entry.target is None else {**row, **render.name_fields(target, entry.target)}


def row(difference: Difference, output: Output, *, xattrs: bool = False) -> dict[str, object]:
    """The row of a difference for JSON and CSV: `_a` is what was before, `_b` what is after."""
    sides = {**_side(difference.before, "a"), **_side(difference.after, "b")}
    return {
        "change": difference.change,
        **render.name_fields("path", difference.path),
        "fields": list(difference.fields),
        **{name: sides.pop(name) for name in FIELDS if name in sides},
        **sides,  # names that are not UTF-8
        **(_attributes(difference, output) if xattrs else {}),
    }


def _attributes(difference: Difference, output: Output) -> dict[str, object]:
    sides = zip(XATTRS, (difference.before, difference.after), strict=True)
    return {name: entry and render.attributes(entry.xattrs, output) for name, entry in sides}


def _write_text(text: bytes) -> None:
    """A diff, byte for byte; on a terminal with nothing in it that steers one."""
    sys.stdout.flush()
    if sys.stdout.isatty():
        for line in text.decode("utf-8", "surrogateescape").split("\n")[:-1]:
            # Backslashes and tabs are as in the file: this is to be read.
            print("".join(c if c.isprintable() or c == "\t" else render.plain(c) for c in line))
    else:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


@guest_command(*READ)
def diff(
    request: Request,
    image: Annotated[Path, typer.Argument(metavar="A", help="The image before.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="The image after; A itself if left out.")
    ] = None,
    path: Annotated[
        str,
        typer.Option(
            "--path",
            metavar="PATH",
            help="Compare what is at this guest path and below.",
            autocompletion=completing.guest_paths,
        ),
    ] = "/",
    checksum: Annotated[
        options.Checksum | None,
        typer.Option("--checksum", help="Compare contents too; blocks in common are not read."),
    ] = None,
    xattrs: Annotated[
        bool, typer.Option("--xattrs", help="Compare extended attributes too, ACLs among them.")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="A unified diff of each changed text file.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also sizes and times of directories.")
    ] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit status 1 if there are differences.")
    ] = False,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", metavar="NAME", help="A as at this snapshot.")
    ] = None,
    snapshot_b: Annotated[
        str | None, typer.Option("--snapshot-b", metavar="NAME", help="B as at this snapshot.")
    ] = None,
    base: Annotated[
        bool,
        typer.Option("--against-base", help="Compare A with its backing image, which is before."),
    ] = False,
    add: Annotated[
        list[Path] | None,
        typer.Option("-A", "--add", metavar="IMAGE", help="A further disk of A."),
    ] = None,
    add_b: Annotated[
        list[Path] | None, typer.Option("--add-b", metavar="IMAGE", help="A further disk of B.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", metavar="FMT", help="Take A as this format.")
    ] = None,
    format_b: Annotated[
        str | None, typer.Option("--format-b", metavar="FMT", help="Take B as this format.")
    ] = None,
) -> int:
    """Compare the files of two guests, or of two points of one.

    Of A and B; of A at --snapshot and at --snapshot-b, the one left out being now; or, with
    --against-base, of the backing image of A and of A. Files of one size and time count as the
    same without --checksum. A directory whose own size or time changed is listed with --all.

    \b
    Examples:
      imgtool diff guest.qcow2 tuesday.qcow2
      imgtool diff --against-base --text --path /etc tuesday.qcow2
      imgtool diff --snapshot before-update guest.qcow2

    Exit status: with --exit-code, 1 if there are differences.
    """
    if text and output is not Output.table:
        raise UsageError("--text is a form of its own", hint="leave -o out")
    before, after = _points(
        request,
        image,
        other,
        snapshots=(snapshot, snapshot_b),
        add=(add, add_b),
        formats=(format, format_b),
        base=base,
    )
    from imgtool.compare.comparing import compare_trees, open_pair
    from imgtool.compare.points import links_apart

    failures = Failures(request.debug)

    def problem(point: Point) -> Callable[[bytes, str], None]:
        return lambda at, line: failures.problem(at, f"{point}: {line}")

    second = _at(request, after).opened if other is None else _opened_second(request, after)
    with open_pair(_at(request, before).opened, second) as pair:
        found = compare_trees(
            pair,
            path,
            checksum=checksum.value if checksum else None,
            xattrs=xattrs,
            everything=everything,
            links=links_apart(before, after) if checksum else None,
            on_problem=(problem(before), problem(after)),
        )
        first = next(found, None)
        every: Iterable[Difference] = () if first is None else itertools.chain([first], found)
        if output is not Output.table:
            rows = (row(difference, output, xattrs=xattrs) for difference in every)
            render.emit(rows, (*FIELDS, *XATTRS) if xattrs else FIELDS, output)
        else:
            for difference in every:
                print(differences.line(difference, human=human))
                if text:
                    with failures.caught():
                        from imgtool.compare.text import text_difference

                        _write_text(
                            text_difference(
                                pair.before, pair.after, difference, summed=checksum is not None
                            )
                        )
    sys.stdout.flush()
    failures.finish()
    return ExitStatus.FAILED if exit_code and first is not None else ExitStatus.DONE


def _points(
    request: Request,
    image: Path,
    other: Path | None,
    *,
    snapshots: tuple[str | None, str | None],
    add: tuple[Sequence[Path] | None, Sequence[Path] | None],
    formats: tuple[str | None, str | None],
    base: bool,
) -> tuple[Point, Point]:
    """What is compared; of each pair the first is that of A, the second that of B."""
    from imgtool.compare.points import Point, against_base, two_points

    either = Point(image, **request.keywords())
    before = dataclasses.replace(either, add=add[0] or (), format=formats[0], snapshot=snapshots[0])
    if other is None and (add[1] or formats[1]):
        raise UsageError("--add-b and --format-b belong to a second image, and there is none")
    if base:
        if other is not None or any(name is not None for name in snapshots):
            raise UsageError(
                "--against-base compares one image as it is now with its backing image",
                hint="leave out the second image and the snapshots",
            )
        return against_base(before)
    after = None
    if other is not None:
        after = dataclasses.replace(either, image=other, add=add[1] or (), format=formats[1])
    return two_points(before, after, snapshot_after=snapshots[1])


def _opened_second(request: Request, point: Point) -> Callable[[], AbstractContextManager[Guest]]:
    """How the second of two images is opened, whose format has an option of its own."""

    @contextlib.contextmanager
    def open_it() -> Iterator[Guest]:
        with contextlib.ExitStack() as stack:
            try:
                guest = stack.enter_context(_at(request, point).opened())
            except ImgtoolError as error:
                error.rename_option("--format", "--format-b")
                raise
            yield guest

    return open_it


def _at(request: Request, point: Point) -> Request:
    return dataclasses.replace(request, image=point.image, **point.keywords())
