"""What `find` can ask of an entry."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable

from imgtool.errors import EngineError, NotInGuestError, UsageError
from imgtool.guest.globbing import matcher
from imgtool.search.modes import parse_mode
from imgtool.search.moments import parse_moment
from imgtool.search.search import Search
from imgtool.search.visiting import Visited

Test = Callable[[Search, Visited], bool]
# A test that takes a value: it is made of that, and of what time it is.
MakeTest = Callable[[str, int], Test]

_NS = 1_000_000_000
_TYPES = {
    "f": "file",
    "d": "directory",
    "l": "symlink",
    "c": "char",
    "b": "block",
    "p": "fifo",
    "s": "socket",
}
_UNITS = {"c": 1, "w": 2, "b": 512, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _compare(text: str) -> tuple[Callable[[int, int], bool], str]:
    """How a number is compared, and the rest: `+N` for more, `-N` for less, `N` for just that."""
    if text.startswith("+"):
        return int.__gt__, text[1:]
    if text.startswith("-"):
        return int.__lt__, text[1:]
    return int.__eq__, text


def _number(text: str) -> Callable[[int], bool]:
    compare, digits = _compare(text)
    if not re.fullmatch(r"\d{1,18}", digits):
        raise UsageError("a number: N, +N for more, -N for less", subject=text)
    limit = int(digits)
    return lambda value: compare(value, limit)


def _name(ignore_case: bool) -> MakeTest:
    def make(pattern: str, now_ns: int) -> Test:
        if "/" in pattern and pattern != "/":
            raise UsageError(
                "a name has no slash", subject=pattern, hint="-path matches the whole path"
            )
        match = matcher(pattern, ignore_case=ignore_case).match
        return lambda search, visited: match(os.fsdecode(visited.entry.name or b"/")) is not None

    return make


def _path(ignore_case: bool) -> MakeTest:
    def make(pattern: str, now_ns: int) -> Test:
        match = matcher(pattern, ignore_case=ignore_case).match
        return lambda search, visited: match(os.fsdecode(visited.entry.path)) is not None

    return make


def _target(ignore_case: bool) -> MakeTest:
    def make(pattern: str, now_ns: int) -> Test:
        match = matcher(pattern, ignore_case=ignore_case).match

        def test(search: Search, visited: Visited) -> bool:
            target = visited.entry.target
            return target is not None and match(os.fsdecode(target)) is not None

        return test

    return make


def _regex(ignore_case: bool) -> MakeTest:
    def make(pattern: str, now_ns: int) -> Test:
        match = re.compile(os.fsencode(pattern), re.IGNORECASE if ignore_case else 0).fullmatch
        return lambda search, visited: match(visited.entry.path) is not None

    return make


def _type(text: str, now_ns: int) -> Test:
    letters = text.split(",")
    if not all(letter in _TYPES for letter in letters):
        raise UsageError("a type is one of f d l c b p s, or several: f,l", subject=text)
    wanted = {_TYPES[letter] for letter in letters}
    return lambda search, visited: visited.entry.type in wanted


def _size(text: str, now_ns: int) -> Test:
    compare, rest = _compare(text)
    found = re.fullmatch(r"(\d{1,18})([cwbkMGT]?)", rest)
    if not found:
        raise UsageError(
            "a size: N, +N or -N with c (bytes), k, M, G, T; without, units of 512 bytes",
            subject=text,
        )
    limit, unit = int(found[1]), _UNITS[found[2] or "b"]
    return lambda search, visited: compare(-(-visited.entry.size // unit), limit)


def _days(text: str, now_ns: int) -> Test:
    """The age in whole days, of which one that is begun does not count."""
    compare = _number(text)
    return lambda search, visited: compare((now_ns - visited.entry.mtime_ns) // (86400 * _NS))


def _minutes(text: str, now_ns: int) -> Test:
    """More, or less, than just so many minutes ago; or within the last of them."""
    compare, _ = _compare(text)
    _number(text)
    limit = int(text.lstrip("+-")) * 60 * _NS
    if compare is int.__eq__:
        return lambda search, visited: limit - 60 * _NS <= now_ns - visited.entry.mtime_ns < limit
    return lambda search, visited: compare(now_ns - visited.entry.mtime_ns, limit)


def _newer(path: str, now_ns: int) -> Test:
    return lambda search, visited: visited.entry.mtime_ns > search.time_of_change(path)


def _newer_than(text: str, now_ns: int) -> Test:
    moment = parse_moment(text, now_ns)
    return lambda search, visited: visited.entry.mtime_ns > moment


def _owner(group: bool) -> MakeTest:
    def make(name: str, now_ns: int) -> Test:
        def test(search: Search, visited: Visited) -> bool:
            number = visited.entry.gid if group else visited.entry.uid
            return number == search.number_of(name, group=group)

        return test

    return make


def _of_number(value: Callable[[Visited], int]) -> MakeTest:
    def make(text: str, now_ns: int) -> Test:
        compare = _number(text)
        return lambda search, visited: compare(value(visited))

    return make


def _perm(text: str, now_ns: int) -> Test:
    how = text[:1] if text[:1] in "-/" else ""
    mode = parse_mode(text.removeprefix(how))
    if how == "-":
        return lambda search, visited: stat.S_IMODE(visited.entry.mode) & mode == mode
    if how == "/":
        return lambda search, visited: not mode or stat.S_IMODE(visited.entry.mode) & mode != 0
    return lambda search, visited: stat.S_IMODE(visited.entry.mode) == mode


def _empty(search: Search, visited: Visited) -> bool:
    entry = visited.entry
    if entry.type == "file":
        return entry.size == 0
    if entry.type != "directory":
        return False
    try:
        return next(iter(search.guest.entries(entry.path)), None) is None
    except (EngineError, NotInGuestError) as error:
        search.on_problem(entry.path, error.message)
        return False


def _unknown(group: bool) -> Test:
    def test(search: Search, visited: Visited) -> bool:
        names = search.owners.groups if group else search.owners.users
        return (visited.entry.gid if group else visited.entry.uid) not in names

    return test


WITHOUT_VALUE: dict[str, Test] = {
    "-empty": _empty,
    "-nouser": _unknown(group=False),
    "-nogroup": _unknown(group=True),
    "-true": lambda search, visited: True,
    "-false": lambda search, visited: False,
}
WITH_VALUE: dict[str, MakeTest] = {
    "-name": _name(ignore_case=False),
    "-iname": _name(ignore_case=True),
    "-path": _path(ignore_case=False),
    "-wholename": _path(ignore_case=False),
    "-ipath": _path(ignore_case=True),
    "-iwholename": _path(ignore_case=True),
    "-lname": _target(ignore_case=False),
    "-ilname": _target(ignore_case=True),
    "-regex": _regex(ignore_case=False),
    "-iregex": _regex(ignore_case=True),
    "-type": _type,
    "-size": _size,
    "-mtime": _days,
    "-mmin": _minutes,
    "-newer": _newer,
    "-newermm": _newer,
    "-newermt": _newer_than,
    "-user": _owner(group=False),
    "-group": _owner(group=True),
    "-uid": _of_number(lambda visited: visited.entry.uid),
    "-gid": _of_number(lambda visited: visited.entry.gid),
    "-perm": _perm,
    "-links": _of_number(lambda visited: visited.entry.nlink),
    "-inum": _of_number(lambda visited: visited.entry.inode),
}
