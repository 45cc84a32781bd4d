"""A forest of images as a picture: for Graphviz, or drawn as SVG for a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from imgtool.cli import render
from imgtool.image.forest import Tree

_WIDTH, _HEIGHT, _INDENT, _GAP, _MARGIN = 340, 44, 48, 14, 16
_STYLE = (
    "text{font:13px sans-serif}.more{font-size:11px;fill:#555}"
    "rect{fill:#eef3f8;stroke:#4a6785}.problem{fill:#fbe3e0;stroke:#b03a2e}"
    ".use{fill:#e3f4e1;stroke:#3d7d3a}path{fill:none;stroke:#4a6785}"
)


def _shown(path: Path) -> str:
    return render.plain(os.fsencode(path).decode("utf-8", "surrogateescape"))


def _facts(tree: Tree, user: str | None) -> str:
    facts = [tree.format]
    if tree.header.virtual_size is not None:
        facts.append(render.human(tree.header.virtual_size))
    facts.append(f"{render.human(tree.header.actual_size)} on disk")
    if tree.header.snapshots:
        facts.append(f"snapshots: {tree.header.snapshots}")
    if user:
        facts.append(f"in use by {user}")
    if tree.problem:
        facts.append(tree.problem)
    return render.plain(", ".join(facts))


def dot(trees: Sequence[Tree], users: Mapping[Path, str]) -> str:
    """The forest in Graphviz's language, an arrow from each overlay to its base."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = ["digraph chains {", "  rankdir=BT;", "  node [shape=box];"]
    for root in trees:
        for _, tree in root.walk():
            label = f"{_shown(tree.path)}\n{_facts(tree, users.get(tree.path))}"
            text = quoted(label).replace("\n", "\\n")
            color = ", color=red" if tree.problem else ""
            lines.append(f"  {quoted(str(tree.header.identity))} [label={text}{color}];")
            lines += [
                f"  {quoted(str(overlay.header.identity))} -> {quoted(str(tree.header.identity))};"
                for overlay in tree.overlays
            ]
    return "\n".join([*lines, "}", ""])


def svg(trees: Sequence[Tree], users: Mapping[Path, str]) -> str:
    """The forest as an SVG document: a box an image, overlays below and right of their base."""
    parts: list[str] = []
    row = deepest = 0
    places: dict[int, int] = {}  # the row of the last box at each depth
    for root in trees:
        for depth, tree in root.walk():
            x, y = _MARGIN + depth * _INDENT, _MARGIN + row * (_HEIGHT + _GAP)
            user = users.get(tree.path)
            kind = "problem" if tree.problem else "use" if user else "image"
            if depth:
                start = _MARGIN + places[depth - 1] * (_HEIGHT + _GAP) + _HEIGHT
                left = x - _INDENT + 16
                parts.append(f'<path d="M{left} {start}V{y + _HEIGHT // 2}H{x}"/>')
            facts, name = _facts(tree, user), _shown(tree.path)
            parts.append(
                f"<g><title>{escape(name)}\n{escape(facts)}</title>"
                f'<rect class="{kind}" x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4"/>'
                f'<text x="{x + 10}" y="{y + 18}">{escape(_shortened(Path(name).name, 46))}</text>'
                f'<text class="more" x="{x + 10}" y="{y + 35}">'
                f"{escape(_shortened(facts, 56))}</text></g>"
            )
            places[depth] = row
            deepest = max(deepest, depth)
            row += 1
    width = 2 * _MARGIN + deepest * _INDENT + _WIDTH
    height = 2 * _MARGIN + max(row, 1) * (_HEIGHT + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
