"""A Sphinx extension: how pages look as plain text, which packages have.

A link is followed by the file that it leads to, beside the page. Packages, which are built with
the tag `package`, have no pages for developers.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

# A line that does nothing but lead to a page for developers.
_TO_DEVELOPERS = re.compile(
    r"^(\[[^\]]*\]\(development/[^)]*\)\.?|development/\w+)\n", re.MULTILINE
)
_WIDEST = 80  # a table, where its words allow
_MANUAL_PAGE = re.compile(r"[a-z-]+\(\d\)")


def without_developers(source: str) -> str:
    """A page without its lines that lead to pages for developers."""
    return _TO_DEVELOPERS.sub("", source)


def shown_address(text: str, address: str) -> str:
    """What stands after a link: where it leads, unless the text says so, or that is its page."""
    file = address.partition("#")[0]
    if not file or _MANUAL_PAGE.fullmatch(text) or text in (address, file):
        return ""
    is_file = PurePosixPath(file).suffix == ".txt"
    return f" ({file})" if is_file else f" <{address}>"


def _length(entry: Any) -> int:
    """How long the text of a cell is, with the signs and addresses that come to it."""
    from docutils import nodes

    links = [(node.astext(), node.get("refuri", "")) for node in entry.findall(nodes.reference)]
    signs = 2 * len([*entry.findall(nodes.literal)]) + 4 * len([*entry.findall(nodes.strong)])
    return len(entry.astext()) + signs + sum(len(shown_address(*link)) for link in links)


def column_widths(natural: list[int], least: list[int], most: int = _WIDEST) -> list[int]:
    """How wide the columns of a table are, so that all of it has at most `most` characters, with
    its lines and spaces: what is widest wraps, but no column gets narrower than `least`."""
    widths = list(natural)
    while sum(widths) + 3 * len(widths) + 1 > most:
        slack = [(width, at) for at, width in enumerate(widths) if width > least[at]]
        if not slack:
            break
        widths[max(slack)[1]] -= 1
    return widths


def _read(app: Any, _page: str, source: list[str]) -> None:
    if app.tags.has("package"):
        source[0] = without_developers(source[0])


def setup(app: Any) -> dict[str, bool]:
    from docutils import nodes
    from sphinx.builders.text import TextBuilder  # tests do without Sphinx
    from sphinx.writers.text import TextTranslator, TextWrapper

    class Builder(TextBuilder):
        """One that knows in which file a page is."""

        def get_target_uri(self, docname: str, typ: str | None = None) -> str:
            return docname + self.out_suffix

    class Text(TextTranslator):
        """With the files of links; and with the signs around code that no command has."""

        def depart_reference(self, node: Any) -> None:
            own = PurePosixPath(self.builder.current_docname or "").name + self.builder.out_suffix
            address = node.get("refuri", "")
            if address.partition("#")[0] != own:
                self.add_text(shown_address(node.astext(), address))

        def visit_table(self, node: Any) -> None:
            super().visit_table(node)
            rows = [list(row.findall(nodes.entry)) for row in node.findall(nodes.row)]
            columns = list(zip(*rows, strict=True))
            natural = [max(map(_length, column)) for column in columns]
            words = [[w for entry in column for w in entry.astext().split()] for column in columns]
            least = [
                min(len(max(w, key=len, default="")) + 2, n)
                for w, n in zip(words, natural, strict=True)
            ]
            self._widths = column_widths(natural, least)

        def visit_colspec(self, node: Any) -> None:
            node["colwidth"] = self._widths[len(self.table.colwidth)]
            super().visit_colspec(node)

        def visit_literal(self, node: Any) -> None:
            self.add_text("`")

        def depart_literal(self, node: Any) -> None:
            self.add_text("`")

    # What is to be typed, and names of files, are not cut at their hyphens.
    TextWrapper.wordsep_re = re.compile(r"(\s+)")
    app.add_builder(Builder, override=True)
    app.set_translator("text", Text, override=True)
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
