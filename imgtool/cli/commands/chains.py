"""`chain show`, `chain tree` and `chain check`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import plain_command
from imgtool.cli.output import Output
from imgtool.cli.session import Common, Failures, warning
from imgtool.errors import ImageError, ImgtoolError, RefusedError

if TYPE_CHECKING:
    from imgtool.image.chain.info import ImageInfo
    from imgtool.image.checks.forest import Tree

SHOW_FIELDS = (
    "path",
    "format",
    "virtual_size",
    "actual_size",
    "snapshots",
    "backing",
    "backing_format",
    "in_use",
    "problems",
)
TREE_FIELDS = (
    "path",
    "depth",
    "format",
    "virtual_size",
    "actual_size",
    "snapshots",
    "backing",
    "backing_format",
    "base",
    "overlays",
    "in_use",
    "problem",
)
_COLUMNS = ("path", "format", "virtual_size", "actual_size", "snapshots", "in_use")
_TITLES = {"path": "image", "virtual_size": "size", "actual_size": "on disk", "in_use": "in use"}
_DEEPEST = 100  # links that are indented


class TreeOutput(StrEnum):
    """How `chain tree` writes the forest."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    dot = "dot"


def name(key: str, value: str | Path | None) -> dict[str, str | None]:
    """A name for JSON, as `render.name_fields` gives it."""
    return {key: None} if value is None else {**render.name_fields(key, os.fsencode(value))}


def _text(name: str | Path) -> str:
    """A name where its exact bytes are told elsewhere."""
    return os.fsencode(name).decode("utf-8", "replace")


def _indent(depth: int, arrow: str, path: str | Path) -> str:
    return ("  " * (min(depth, _DEEPEST) - 1) + arrow + " " if depth else "") + str(path)


def _size(value: int | None, human: bool) -> str | int | None:
    return render.human(value) if human and value is not None else value


def _held(path: Path) -> list[str]:
    from imgtool.image.locking.locks import holders

    try:
        return [_text(str(holder)) for holder in holders(path)]
    except OSError:  # gone since it was opened
        return []


def _problems(link: ImageInfo, below: ImageInfo | None) -> list[str]:
    """What is wrong with a link, and with the way it stands on the one below."""
    from imgtool.image.checks.doubts import wrong_entries
    from imgtool.image.checks.findings import pair_findings
    from imgtool.image.intent.intent_state import line_on
    from imgtool.text import printable

    found = [*link.problems, *filter(None, [line_on(link.path)])]
    if wrong := wrong_entries(link):
        found.append(f"{printable(link.path)}: {wrong} entries or more of its tables are wrong")
    if below is not None:
        findings = pair_findings(link, below, link.backing_format)
        path = printable(link.path)
        found += [f"{path}: {one.means}" for one in findings if one.severity != "note"]
    return found


@plain_command("format", "backing_dirs")
def show(
    common: Common,
    image: options.Image,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
) -> None:
    """Show every link of an image's chain, down to the base.

    Where a link is missing or cannot be read, those above it are shown, and then what is wrong.

    \b
    Examples:
      imgtool chain show tuesday.qcow2
      imgtool chain show -o json tuesday.qcow2
    """
    from imgtool.image.chain.chain import follow_chain, open_chain

    links: list[ImageInfo] = []
    failure: ImgtoolError | None = None
    try:
        links += open_chain(image, format=common.format, backing_dirs=common.backing_dirs).links
    except (ImageError, RefusedError) as error:
        failure = error
        try:
            for link, _ in follow_chain(
                image, format=common.format, backing_dirs=common.backing_dirs
            ):
                links.append(link)
        except (ImageError, RefusedError):
            pass  # the same again
    problems_of = [
        _problems(link, below) for link, below in zip(links, [*links, None][1:], strict=True)
    ]
    rows: list[dict[str, object]] = [
        {
            **name("path", link.path),
            "format": link.format,
            "virtual_size": link.virtual_size,
            "actual_size": link.actual_size,
            "snapshots": [snapshot.name for snapshot in link.snapshots],
            **name("backing", link.backing),
            "backing_format": link.backing_format,
            "in_use": _held(link.path),
            "problems": told,
        }
        for link, told in zip(links, problems_of, strict=True)
    ]
    problems = [problem for told in problems_of for problem in told]
    if failure is not None and problems_of:
        problems_of[-1].append(_text(str(failure)))
    shown = [
        {
            **row,
            "path": _indent(number, "->", link.path),
            "virtual_size": _size(link.virtual_size, human),
            "actual_size": _size(link.actual_size, human),
        }
        for number, (row, link) in enumerate(zip(rows, links, strict=True))
    ]
    if rows or output is not Output.table:
        render.emit(rows, SHOW_FIELDS, output, columns=_COLUMNS, shown=shown, titles=_TITLES)
    for problem in problems:
        warning(problem)
    if failure is not None:
        raise failure


def _tree_row(depth: int, tree: Tree, users: Sequence[str]) -> dict[str, object]:
    header = tree.header
    return {
        **name("path", tree.path),
        "depth": depth,
        "format": tree.format,
        "virtual_size": header.virtual_size,
        "actual_size": header.actual_size,
        "snapshots": header.snapshots,
        **name("backing", header.backing),
        "backing_format": header.backing_format,
        "base": None if tree.base is None else _text(tree.base),
        "overlays": [_text(overlay.path) for overlay in tree.overlays],
        "in_use": [_text(user) for user in users],
        "problem": tree.problem,
    }


@plain_command("backing_dirs")
def tree(
    common: Common,
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders with images, and all below.")
    ],
    human: options.Human = False,
    output: Annotated[
        TreeOutput | None,
        typer.Option("-o", "--output", help="Form of the rows, or dot for Graphviz."),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", metavar="FILE", help="Draw a picture for a browser; - is stdout."),
    ] = None,
) -> None:
    """Show all images below some folders, each base with its overlays.

    Only headers are read. Raw images are those that an overlay stands on, or named .raw or .img.
    A picture is drawn instead of the table, or beside it where -o is given.

    \b
    Examples:
      imgtool chain tree /srv
      imgtool chain tree --svg chains.svg /srv
    """
    from imgtool.cli.commands import pictures
    from imgtool.image.checks.forest import forest, users
    from imgtool.image.intent.intent_state import line_on

    failures = Failures(debug=common.debug)
    trees = forest(
        folders,
        backing_dirs=common.backing_dirs,
        on_error=lambda path, error: failures.add(not_read(path, error)),
    )
    in_use = users(trees)
    if svg is not None:
        if str(svg) == "-":
            render.text(pictures.svg(trees, in_use))
        else:
            pictures.write(svg, pictures.svg(trees, in_use))
            count = sum(1 for root in trees for _ in root.walk())
            render.message("note", f"drawn: {image_count(count)} ({svg})")
    if output is TreeOutput.dot:
        render.text(pictures.dot(trees, in_use))
    elif output is not None or svg is None:
        rows, shown = [], []
        for root in trees:
            for depth, found in root.walk():
                row = _tree_row(depth, found, in_use.get(found.path, ()))
                rows.append(row)
                shown.append(
                    {
                        **row,
                        "path": _indent(depth, "<-", found.path),
                        "virtual_size": _size(found.header.virtual_size, human),
                        "actual_size": _size(found.header.actual_size, human),
                        "snapshots": row["snapshots"] or None,
                    }
                )
        form = Output((output or TreeOutput.table).value)
        columns = [*_COLUMNS, "problem"]
        if rows or form is not Output.table:
            render.emit(rows, TREE_FIELDS, form, columns=columns, shown=shown, titles=_TITLES)
    for found in (found for root in trees for _, found in root.walk()):
        if line := line_on(found.path):
            warning(line)
    if not trees:
        warning(f"no images below {', '.join(map(_text, folders))}")
    failures.finish()


def not_read(path: Path, error: OSError) -> ImgtoolError:
    """A file or folder that was passed over."""
    return ImgtoolError((error.strerror or "cannot be read").lower(), subject=_text(path))


def image_count(count: int) -> str:
    """How many images."""
    return f"{count} image{'' if count == 1 else 's'}"
