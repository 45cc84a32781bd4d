"""The words of `find`: what they mean at a fixed time, and what is said where they mean nothing."""

from __future__ import annotations

import shlex
import stat
from typing import cast

import pytest

from imgtool.errors import UsageError
from imgtool.guest.guest import Guest
from imgtool.guest.model import Entry
from imgtool.search.expression import parse, split_words
from imgtool.search.modes import parse_mode
from imgtool.search.moments import parse_moment
from imgtool.search.search import Search
from imgtool.search.visiting import Visited

_NS = 1_000_000_000
_NOW = 1_800_000_000 * _NS


class _Silent(Search):
    """A search that prints nothing."""

    def __init__(self) -> None:
        super().__init__(cast(Guest, None), lambda path, line: None)  # no test asks it

    def write(self, content: bytes) -> None:
        raise AssertionError(content)

    def print_name(self, visited: Visited) -> None:
        raise AssertionError(visited)

    def print_line(self, visited: Visited) -> None:
        raise AssertionError(visited)


def _matches(words: str, *, age: float = 0.0, name: str = "file") -> bool:
    entry = Entry(f"/{name}".encode(), stat.S_IFREG | 0o644, 0, 0, 0, _NOW - int(age * _NS))
    return parse(shlex.split(words), _NOW).test(_Silent(), Visited(entry, 1, b"/"))


@pytest.mark.parametrize(
    ("words", "seconds", "matches"),
    [
        ("-mmin 6", 299, False),
        ("-mmin 6", 300, True),
        ("-mmin 6", 359, True),
        ("-mmin 6", 360, False),
        ("-mmin -6", 359, True),
        ("-mmin -6", 360, False),
        ("-mmin +6", 360, False),
        ("-mmin +6", 361, True),
        ("-mtime 1", 86399, False),
        ("-mtime 1", 86400, True),
        ("-mtime +1", 2 * 86400, True),
        ("-mtime +1", 2 * 86400 - 1, False),
        ("-mtime -1", -5, True),
        ("-newermt '1 hour ago'", 3599, True),
        ("-newermt '1 hour ago'", 3600, False),
        ("-newermt @1799999999", 0, True),
        ("-newermt @1799999999", 1, False),
        ("-newermt 2027-01-15T08:00:00", -1, True),
        ("-newermt 2027-01-15T08:00:00", 0, False),
        ("-newermt '2027-01-15 09:00+01:00'", 0, False),
        ("-newermt '2027-01-15 09:00:00.5+01:00'", -1, True),
    ],
)
def test_times_have_their_edges(words: str, seconds: float, matches: bool) -> None:
    assert _matches(words, age=seconds) is matches


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("644", 0o644),
        ("u+s", 0o4000),
        ("/", None),
        ("g=rx,o+w", 0o052),
        ("+t", 0o1000),
        ("8", None),
    ],
)
def test_modes(text: str, mode: int | None) -> None:
    if mode is None:
        with pytest.raises(UsageError, match="not permission bits"):
            parse_mode(text)
    else:
        assert parse_mode(text) == mode


@pytest.mark.parametrize("text", ["", "tomorrow", "2027-13-01", "3 years ago", "@", "noon"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="not a time"):
        parse_moment(text, _NOW)


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ("-nme x", "does not know this word", "did you mean -name?"),
        ("-frobnicate", "does not know this word", "stand before IMAGE"),
        ("-exec rm", "does not have this", "imgtool copy-out"),
        ("-delete", "does not have this", "imgtool rm"),
        ("-atime 1", "does not have this", "-mtime"),
        ("-name", "-name needs a value", ""),
        ("( -name x", "without its '\\)'", "quote both"),
        ("-name x )", "without its '\\('", ""),
        ("-o -name x", "a test is missing", ""),
        ("-name x -o", "a test is missing", ""),
        ("!", "a test is missing", ""),
        ("-name x y", "paths stand before", ""),
        ("-name a -o json", "-o is 'or'", "imgtool find -o json IMAGE"),
        ("-name a/b", "a name has no slash", "-path"),
        ("-mtime x", "-mtime: a number", ""),
        ("-size 5X", "-size: a size", ""),
        ("-type q", "-type: a type is one of", ""),
        ("-regex (", "not a regular expression", ""),
        ("-maxdepth -1", "takes a number of directories", ""),
        ("-printf %q", "%q is not known", "%p"),
        ("-printf %TQ", "%TQ is not known", ""),
        ("-printf \\q", "\\\\q is not known", ""),
        ("-printf %", "ends in the middle", ""),
    ],
)
def test_what_means_nothing_is_said(words: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse(words.split(), _NOW)
    assert hint in (caught.value.hint or "")


def test_paths_end_where_the_expression_begins() -> None:
    assert split_words(["/etc", "/var", "-name", "x"]) == (["/etc", "/var"], ["-name", "x"])
    assert split_words(["/etc", "!", "-empty"]) == (["/etc"], ["!", "-empty"])
    assert split_words(["(", "-empty", ")"]) == ([], ["(", "-empty", ")"])
    assert split_words([]) == ([], [])


def test_names_are_matched_as_a_whole_and_with_any_bytes() -> None:
    assert _matches("-name fi*") and not _matches("-name fi")
    assert _matches("-name 'a*b'", name="a\nb")
    assert _matches(r"-name 'a\*b'", name="a*b") and not _matches(r"-name 'a\*b'", name="axb")
    assert _matches("-iname FILE") and not _matches("-name FILE")
    assert _matches("-regex '/f.*e'") and not _matches("-regex f")
