"""`-printf`: what its directives give, as in find(1)."""

from __future__ import annotations

import datetime
import os
import re
import stat
from collections.abc import Callable

from imgtool.errors import UsageError
from imgtool.search.search import Search
from imgtool.search.visiting import Visited

Write = Callable[[Search, Visited], bytes]

_PIECE = re.compile(
    r"%(?P<flags>[-0]*)(?P<width>\d{0,4})(?P<name>[Tt][@+\w]?|.)"
    r"|\\(?P<escape>[0-7]{1,3}|.)|(?P<text>[^%\\]+)",
    re.DOTALL,
)
_ESCAPES = {
    **{"a": b"\a", "b": b"\b", "f": b"\f", "n": b"\n", "r": b"\r", "t": b"\t", "v": b"\v"},
    "\\": b"\\",
}
_LETTERS = {
    **{"file": "f", "directory": "d", "symlink": "l", "char": "c", "block": "b"},
    **{"fifo": "p", "socket": "s"},
}
_NUMBERS = ("d", "m")  # all else is text, which no zeros fill
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def parse_format(text: str) -> Write:
    """What writes a format for an entry. Raises `UsageError` for what it does not know."""
    pieces: list[Write] = []
    at = 0
    while at < len(text):
        found = _PIECE.match(text, at)
        if found is None:
            raise UsageError("-printf: the format ends in the middle", subject=text)
        at = found.end()
        if found["text"]:
            pieces.append(_constant(os.fsencode(found["text"])))
        elif found["escape"]:
            pieces.append(_escape(found["escape"], text))
        else:
            pieces.append(_directive(found["name"], found["flags"], found["width"], text))
    return lambda search, visited: b"".join(piece(search, visited) for piece in pieces)


def _constant(content: bytes) -> Write:
    return lambda search, visited: content


def _escape(letter: str, text: str) -> Write:
    if letter[0] in "01234567":
        return _constant(bytes([int(letter, 8) & 0xFF]))
    if letter not in _ESCAPES:
        raise UsageError(f"-printf: \\{letter} is not known", subject=text)
    return _constant(_ESCAPES[letter])


def _directive(name: str, flags: str, width: str, text: str) -> Write:
    if name == "%":
        return _constant(b"%")
    value = _DIRECTIVES.get(name)
    if value is None and name[0] == "T" and len(name) == 2:
        value = _time_part(name[1], text)
    if value is None:
        raise UsageError(
            f"-printf: %{name} is not known",
            subject=text,
            hint=f"known: {' '.join(f'%{one}' for one in _DIRECTIVES)} %T@ %T+ %TY ...",
        )
    if not width:
        return value
    columns = int(width)
    if "-" in flags:
        return lambda search, visited: value(search, visited).ljust(columns)
    fill = b"0" if "0" in flags and name in _NUMBERS else b" "
    return lambda search, visited: value(search, visited).rjust(columns, fill)


def _moment(visited: Visited) -> datetime.datetime:
    try:
        return _EPOCH + datetime.timedelta(seconds=visited.entry.mtime_ns // 1_000_000_000)
    except OverflowError:  # a hostile or damaged inode
        return datetime.datetime.max.replace(tzinfo=datetime.UTC)


def _time_part(letter: str, text: str) -> Write:
    """A part of the time of the last change of the content, in UTC."""

    def nanoseconds(visited: Visited) -> str:
        return f"{visited.entry.mtime_ns % 1_000_000_000:09d}"

    if letter == "@":
        return lambda s, v: (
            b"%d.%s0"
            % (
                v.entry.mtime_ns // 1_000_000_000,
                nanoseconds(v).encode(),
            )
        )
    if letter == "+":
        return lambda s, v: f"{_moment(v):%Y-%m-%d+%H:%M:%S}.{nanoseconds(v)}0".encode()
    if letter == "S":
        return lambda s, v: f"{_moment(v):%S}.{nanoseconds(v)}0".encode()
    if letter == "T":
        return lambda s, v: f"{_moment(v):%H:%M:%S}.{nanoseconds(v)}0".encode()
    if letter not in "aAbBdDFHIjmMpyYZ":
        raise UsageError(f"-printf: %T{letter} is not known", subject=text)
    part = f"%{letter}"
    return lambda s, v: _moment(v).strftime(part).encode()


def _text(value: Callable[[Search, Visited], object]) -> Write:
    return lambda search, visited: str(value(search, visited)).encode("utf-8", "surrogateescape")


def _below_start(search: Search, visited: Visited) -> bytes:
    return visited.entry.path[len(visited.start.rstrip(b"/")) :].lstrip(b"/")


def _parent(search: Search, visited: Visited) -> bytes:
    return visited.entry.path.rpartition(b"/")[0] if visited.entry.path != b"/" else b""


def _time(search: Search, visited: Visited) -> bytes:
    fraction = f"{visited.entry.mtime_ns % 1_000_000_000:09d}0"
    return f"{_moment(visited):%a %b %e %H:%M:%S}.{fraction} {_moment(visited):%Y}".encode()


_DIRECTIVES: dict[str, Write] = {
    "p": lambda search, visited: visited.entry.path,
    "P": _below_start,
    "f": lambda search, visited: visited.entry.name or b"/",
    "h": _parent,
    "H": lambda search, visited: visited.start,
    "l": lambda search, visited: visited.entry.target or b"",
    "s": _text(lambda search, visited: visited.entry.size),
    "b": _text(lambda search, visited: visited.entry.blocks),
    "k": _text(lambda search, visited: -(-visited.entry.blocks // 2)),
    "m": _text(lambda search, visited: f"{stat.S_IMODE(visited.entry.mode):o}"),
    "M": _text(lambda search, visited: stat.filemode(visited.entry.mode)),
    "u": _text(lambda s, v: s.owners.users.get(v.entry.uid, v.entry.uid)),
    "g": _text(lambda s, v: s.owners.groups.get(v.entry.gid, v.entry.gid)),
    "U": _text(lambda search, visited: visited.entry.uid),
    "G": _text(lambda search, visited: visited.entry.gid),
    "y": _text(lambda search, visited: _LETTERS[visited.entry.type]),
    "i": _text(lambda search, visited: visited.entry.inode),
    "n": _text(lambda search, visited: visited.entry.nlink),
    "d": _text(lambda search, visited: visited.depth),
    "t": _time,
}
