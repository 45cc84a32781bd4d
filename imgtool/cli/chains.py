"""`chain show`, `chain tree` and `chain check`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from imgtool.cli import options, render
from imgtool.cli.options import Output
from imgtool.cli.session import set_up_logging
from imgtool.errors import ExitStatus, ImageError, ImgtoolError, RefusedError

app = typer.Typer(
    help="See what stands on what, and whether it is sound.",
    rich_markup_mode=None,
)

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
CHECK_FIELDS = ("path", "severity", "what", "means", "do")


class TreeOutput(StrEnum):
    """How `chain tree` writes the forest."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    dot = "dot"


def _named(path: Path) -> dict[str, str]:
    return render.named("path", os.fsencode(path))


def _indented(depth: int, arrow: str, path: str) -> str:
    return ("  " * (depth - 1) + arrow + " " if depth else "") + path


@app.command()
def show(
    image: options.Image,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
    format: options.Format = None,
    backing_dir: options.BackingDirs = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Show every link of an image's chain, from the image itself down to the base.

    Where a link is missing or cannot be read, those above it are shown, and then what is wrong.
    """
    from imgtool.image.chain import follow_chain, open_chain
    from imgtool.image.locks import holders

    set_up_logging(verbose=verbose, debug=debug)
    links, failure = [], None
    try:
        for followed in follow_chain(image, format=format, backing_dirs=backing_dir or ()):
            links.append(followed)
        open_chain(image, format=format, backing_dirs=backing_dir or ())
    except (ImageError, RefusedError) as error:
        failure = error
    rows: list[dict[str, Any]] = []
    for link, problems in links:
        held = [str(holder) for holder in holders(link.path)]
        rows.append(
            {
                **_named(link.path),
                "format": link.format,
                "virtual_size": link.virtual_size,
                "actual_size": link.actual_size,
                "snapshots": [snapshot.name for snapshot in link.snapshots],
                "backing": link.backing,
                "backing_format": link.backing_format,
                "in_use": held,
                "problems": list(problems),
            }
        )

    def size(value: int) -> str | int:
        return render.human(value) if human else value

    shown = [
        {
            **row,
            "path": _indented(number, "->", row["path"]),
            "virtual_size": size(row["virtual_size"]),
            "actual_size": size(row["actual_size"]),
        }
        for number, row in enumerate(rows)
    ]
    titles = {"path": "image", "virtual_size": "size", "actual_size": "on disk", "in_use": "in use"}
    columns = ["path", "format", "virtual_size", "actual_size", "snapshots", "in_use"]
    if rows or output is not Output.table:
        render.emit(rows, SHOW_FIELDS, output, columns=columns, shown=shown, titles=titles)
    for _, problems in links:
        for problem in problems:
            render.message("warning", problem)
    if failure is not None:
        raise failure


@app.command()
def tree(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders with images, and all below.")
    ],
    human: options.Human = False,
    output: Annotated[
        TreeOutput, typer.Option("-o", "--output", help="Form of the rows, or dot for Graphviz.")
    ] = TreeOutput.table,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw a picture for a browser.")
    ] = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Show all images below some folders: each base with the overlays that stand on it.

    Only headers are read. Raw images are those that an overlay stands on, or named .raw or .img.
    """
    from imgtool.cli import pictures
    from imgtool.image.forest import forest, users

    set_up_logging(verbose=verbose, debug=debug)
    trees = forest(folders)
    in_use = users(trees)
    if svg is not None:
        try:
            svg.write_text(pictures.svg(trees, in_use))
        except OSError as error:
            raise ImgtoolError(f"cannot be written: {error.strerror}", subject=svg) from error
        return
    if output is TreeOutput.dot:
        render.text(pictures.dot(trees, in_use))
        return
    rows: list[dict[str, Any]] = [
        {
            **_named(found.path),
            "depth": depth,
            "format": found.format,
            "virtual_size": found.header.virtual_size,
            "actual_size": found.header.actual_size,
            "snapshots": found.header.snapshots,
            "backing": found.header.backing,
            "backing_format": found.header.backing_format,
            "base": str(found.base) if found.base else None,
            "overlays": [str(overlay.path) for overlay in found.overlays],
            "in_use": in_use.get(found.path),
            "problem": found.problem,
        }
        for root in trees
        for depth, found in root.walk()
    ]

    def size(value: int | None) -> str | int | None:
        return render.human(value) if human and value is not None else value

    shown = [
        {
            **row,
            "path": _indented(row["depth"], "<-", row["path"]),
            "virtual_size": size(row["virtual_size"]),
            "actual_size": size(row["actual_size"]),
            "snapshots": row["snapshots"] or None,
        }
        for row in rows
    ]
    titles = {"path": "image", "virtual_size": "size", "actual_size": "on disk", "in_use": "in use"}
    columns = ["path", "format", "virtual_size", "actual_size", "snapshots", "in_use", "problem"]
    render.emit(
        rows, TREE_FIELDS, Output(output.value), columns=columns, shown=shown, titles=titles
    )


@app.command()
def check(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|DIR...", help="Images, or folders of them.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Only headers: the tables of the images are not read.")
    ] = False,
    output: options.OutputOption = Output.table,
    format: options.Format = None,
    backing_dir: options.BackingDirs = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Say what is wrong with a chain, what it means and what to do; nothing is changed.

    Status 3 if data is at risk.
    """
    from imgtool.image.checking import Finding, check_chain
    from imgtool.image.forest import forest

    set_up_logging(verbose=verbose, debug=debug)
    findings: list[Finding] = []
    looked_at: set[tuple[int, int]] = set()
    for image in images:
        paths = [image]
        if image.is_dir():
            trees = [found for root in forest([image]) for _, found in root.walk()]
            paths = [found.path for found in trees if not found.overlays or found.problem]
        for path in paths:
            findings += check_chain(
                path,
                format=format,
                backing_dirs=backing_dir or (),
                metadata=not quick,
                done=looked_at,
            )
    unique = list(dict.fromkeys(findings))
    rows = [
        {
            **_named(finding.path),
            "severity": finding.severity,
            "what": finding.what,
            "means": finding.means,
            "do": finding.do,
        }
        for finding in unique
    ]
    if output is Output.table:
        for finding in unique:
            render.text(
                f"{render.plain(str(finding.path))}: {finding.severity}: {finding.what}\n"
                f"    {render.plain(finding.means)}\n    to do: {render.plain(finding.do)}\n"
            )
        if not unique:
            render.text(f"{len(looked_at)} image{'s' if len(looked_at) != 1 else ''}: sound\n")
    else:
        render.emit(rows, CHECK_FIELDS, output)
    if any(finding.severity == "risk" for finding in unique):
        raise SystemExit(int(ExitStatus.IMAGE_UNREADABLE))
