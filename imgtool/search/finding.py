"""A search, as find(1) goes about it."""

from __future__ import annotations

from collections.abc import Iterator

from imgtool.guest.model import Entry
from imgtool.search.expression import Expression
from imgtool.search.search import Search
from imgtool.search.visiting import Visit, Visited


def start_at(search: Search, path: str, *, follow: bool) -> Entry:
    """The entry at which a search begins; a link is one, unless it is to be followed.

    Raises `NotInGuestError`.
    """
    return search.guest.lstat(search.guest.resolve(path) if follow else path)


def find(search: Search, start: Entry, expression: Expression) -> Iterator[Visited]:
    """What is at a path and below it, and passes the tests; actions are done on the way."""
    options = expression.options
    visit = Visit(
        search.guest,
        start,
        deepest=options.deepest,
        one_filesystem=options.one_filesystem,
        on_problem=search.on_problem,
    )
    search.visit = visit
    for visited in visit.entries():
        if visited.depth >= options.least and expression.test(search, visited):
            yield visited
        if search.over:
            return
