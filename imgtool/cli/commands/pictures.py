"""A forest of images as a picture: for Graphviz, or drawn as SVG for a browser."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from imgtool.cli import render
from imgtool.errors import ImgtoolError, RefusedError, host_file_error
from imgtool.image.checks.forest import Tree

_START = "<svg "
_WIDTH, _HEIGHT, _INDENT, _GAP, _MARGIN = 340, 44, 48, 14, 16
_STYLE = (
    "text{font:13px sans-serif}.more{font-size:11px;fill:#555}"
    "rect{fill:#eef3f8;stroke:#4a6785}.problem{fill:#fbe3e0;stroke:#b03a2e}"
    ".use{fill:#e3f4e1;stroke:#3d7d3a}path{fill:none;stroke:#4a6785}"
)


def _shown(path: Path) -> str:
    return render.plain(os.fsencode(path).decode("utf-8", "surrogateescape"))


def _facts(tree: Tree, users: Sequence[str]) -> str:
    facts = [tree.format]
    if tree.header.virtual_size is not None:
        facts.append(render.human(tree.header.virtual_size))
    facts.append(f"{render.human(tree.header.actual_size)} on disk")
    if tree.header.snapshots:
        facts.append(f"snapshots: {tree.header.snapshots}")
    facts += [f"in use by {user}" for user in users]
    if tree.problem:
        facts.append(tree.problem)
    return render.plain(", ".join(facts))


def dot(trees: Sequence[Tree], users: Mapping[Path, Sequence[str]]) -> str:
    """The forest in Graphviz's language, an arrow from each overlay to its base."""

    def quoted(text: str) -> str:
        # In a label Graphviz reads XML's entities, and backslashes of its own.
        text = text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')
        return '"' + text.replace("\n", "\\n") + '"'

    everyone = [tree for root in trees for _, tree in root.walk()]
    drawn = {tree.path for tree in everyone}
    lines = ["digraph chains {", "  rankdir=BT;", "  node [shape=box];"]
    for tree in everyone:
        node = quoted(_shown(tree.path))
        label = quoted(f"{_shown(tree.path)}\n{_facts(tree, users.get(tree.path, ()))}")
        color = ", color=red" if tree.problem else ""
        lines.append(f"  {node} [label={label}{color}];")
        if tree.base is not None and tree.base in drawn:
            lines.append(f"  {node} -> {quoted(_shown(tree.base))};")
    return "\n".join([*lines, "}", ""])


def svg(trees: Sequence[Tree], users: Mapping[Path, Sequence[str]]) -> str:
    """The forest as an SVG document: a box an image, overlays below and right of their base."""
    parts: list[str] = []
    row = deepest = 0
    places: dict[int, int] = {}  # the row of the last box at each depth
    for root in trees:
        for depth, tree in root.walk():
            x, y = _MARGIN + depth * _INDENT, _MARGIN + row * (_HEIGHT + _GAP)
            by = users.get(tree.path, ())
            kind = "problem" if tree.problem else "use" if by else "image"
            if depth:
                start = _MARGIN + places[depth - 1] * (_HEIGHT + _GAP) + _HEIGHT
                left = x - _INDENT + 16
                parts.append(f'<path d="M{left} {start}V{y + _HEIGHT // 2}H{x}"/>')
            facts, name = _facts(tree, by), _shown(tree.path)
            parts.append(
                f"<g><title>{escape(name)}\n{escape(facts)}</title>"
                f'<rect class="{kind}" x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4"/>'
                f'<text x="{x + 10}" y="{y + 18}">{escape(_shorten(Path(name).name, 46))}</text>'
                f'<text class="more" x="{x + 10}" y="{y + 35}">'
                f"{escape(_shorten(facts, 56))}</text></g>"
            )
            places[depth] = row
            deepest = max(deepest, depth)
            row += 1
    width = 2 * _MARGIN + deepest * _INDENT + _WIDTH
    height = 2 * _MARGIN + max(row, 1) * (_HEIGHT + _GAP)
    return (
        f'{_START}xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def write(path: Path, picture: str) -> None:
    """Write a picture to a file, whole or not at all.

    Raises `RefusedError` where another file than a picture is there, which may be an image.
    """
    try:
        kind = path.stat().st_mode if path.exists() else None
        if kind is not None and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            path.write_text(picture, encoding="utf-8")  # a pipe, or a terminal
            return
        if kind is not None and stat.S_ISREG(kind) and not _is_picture(path):
            raise RefusedError(
                "would overwrite a file that is no picture",
                subject=path,
                hint="name another file, or remove this one",
            )
        _replace(path.resolve(), picture)
    except RefusedError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError):
            raise host_file_error("cannot be written", error, subject=path) from error
        raise ImgtoolError("cannot be written: not a path", subject=path) from error


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(len(_START))
    return start in (b"", _START.encode())


def _replace(path: Path, text: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(21, "is a directory")
    descriptor, beside = tempfile.mkstemp(prefix=".", suffix=".svg", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        Path(beside).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(beside).unlink()
        raise
