"""The words of `find`, as find(1) of GNU and POSIX have them: tests, operators and actions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from imgtool.errors import UsageError
from imgtool.search import predicates
from imgtool.search.predicates import Test
from imgtool.search.printing import parse_format
from imgtool.search.search import Search
from imgtool.search.visiting import Visited

# What find(1) has and a search through a guest cannot have, and what to do instead.
_REFUSED = {
    **dict.fromkeys(
        ("-exec", "-execdir", "-ok", "-okdir"),
        "nothing is run: use -print0 and xargs with 'imgtool cat', or 'imgtool copy-out'",
    ),
    "-delete": "a search changes nothing: 'imgtool rm' removes files",
    **dict.fromkeys(("-fprint", "-fprint0", "-fprintf", "-fls"), "redirect the output: > FILE"),
    **dict.fromkeys(
        ("-atime", "-amin", "-anewer", "-ctime", "-cmin", "-cnewer", "-used"),
        "only the time of the last change of the content is read: -mtime, -mmin, -newer",
    ),
    **dict.fromkeys(
        ("-depth", "-d"), "a directory always comes before what is in it: sort -r turns it round"
    ),
    **dict.fromkeys(("-L", "-follow"), "links are not followed: name the directory itself, or -H"),
    "-regextype": "expressions are Python's, much like those of grep -E",
    "--output": "options stand before IMAGE: imgtool find -o json IMAGE ...",
    ",": "the comma is not known: use -o, or two searches",
}


@dataclass
class Options:
    """What holds for the whole search, wherever it stands among the words."""

    deepest: int | None = None
    least: int = 0
    one_filesystem: bool = False
    follow_start: bool = False


@dataclass
class Expression:
    """What was asked for: whether an entry is it, with what has to be done for it."""

    test: Test
    options: Options
    acts: bool


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths at which a search begins, and the words of its expression."""
    for number, word in enumerate(words):
        if word in ("(", ")", "!", ",") or (word.startswith("-") and word != "-"):
            return list(words[:number]), list(words[number:])
    return list(words), []


def parse(words: Sequence[str], now_ns: int) -> Expression:
    """Parse an expression, the words after the paths. Raises `UsageError`."""
    return _Parser(words, now_ns).parse()


@dataclass
class _Parser:
    words: Sequence[str]
    now_ns: int
    at: int = 0
    options: Options = field(default_factory=Options)
    acts: bool = False

    def parse(self) -> Expression:
        test = self._alternatives() if self.words else _true
        if self.at < len(self.words):
            raise UsageError("a ')' without its '('", subject=" ".join(self.words[self.at :]))
        return Expression(test, self.options, self.acts)

    def _next(self) -> str | None:
        return self.words[self.at] if self.at < len(self.words) else None

    def _alternatives(self) -> Test:
        tests = [self._conjunction()]
        while self._next() in ("-o", "-or"):
            self.at += 1
            tests.append(self._conjunction())
        return tests[0] if len(tests) == 1 else lambda s, v: any(test(s, v) for test in tests)

    def _conjunction(self) -> Test:
        tests = [self._negation()]
        while (word := self._next()) not in (None, "-o", "-or", ")"):
            if word in ("-a", "-and"):
                self.at += 1
            tests.append(self._negation())
        return tests[0] if len(tests) == 1 else lambda s, v: all(test(s, v) for test in tests)

    def _negation(self) -> Test:
        if self._next() in ("!", "-not"):
            self.at += 1
            test = self._negation()
            return lambda search, visited: not test(search, visited)
        return self._primary()

    def _primary(self) -> Test:
        word = self._next()
        if word is None or word in ("-o", "-or", "-a", "-and", ")"):
            after = f"after {self.words[self.at - 1]}" if self.at else "at the beginning"
            raise UsageError("a test is missing here", subject=after)
        self.at += 1
        if word == "(":
            test = self._alternatives()
            if self._next() != ")":
                raise UsageError("a '(' without its ')'", hint="quote both for the shell: '(' ')'")
            self.at += 1
            return test
        return self._word(word)

    def _word(self, word: str) -> Test:
        if word in _OPTIONS:
            return self._option(word)
        if word in _ACTIONS:
            self.acts = self.acts or word not in ("-prune", "-quit")
            return _ACTIONS[word](self, word)
        if word in predicates.WITHOUT_VALUE:
            return predicates.WITHOUT_VALUE[word]
        if word in predicates.WITH_VALUE:
            value = self._value(word)
            try:
                return predicates.WITH_VALUE[word](value, self.now_ns)
            except re.error as error:
                raise UsageError(f"not a regular expression: {error}", subject=value) from error
            except UsageError as error:
                error.message = f"{word}: {error.message}"
                raise
        if word in _REFUSED:
            raise UsageError(
                "find of imgtool does not have this", subject=word, hint=_REFUSED[word]
            )
        if word in ("table", "json", "jsonl", "csv") and self.words[self.at - 2] == "-o":
            raise UsageError("after IMAGE, -o is 'or'", hint=_REFUSED["--output"])
        if not word.startswith("-"):
            raise UsageError("paths stand before the expression", subject=word)
        near = difflib.get_close_matches(word, KNOWN, 1, 0.6)
        raise UsageError(
            "find does not know this word",
            subject=word,
            hint=f"did you mean {near[0]}?"
            if near
            else "'imgtool help find' lists them; imgtool's own options stand before IMAGE",
        )

    def _value(self, word: str) -> str:
        value = self._next()
        if value is None:
            raise UsageError(f"{word} needs a value", hint="'imgtool help find' says which")
        self.at += 1
        return value

    def _option(self, word: str) -> Test:
        if word in ("-maxdepth", "-mindepth"):
            text = self._value(word)
            if not re.fullmatch(r"\d{1,9}", text):
                raise UsageError(f"{word} takes a number of directories", subject=text)
            if word == "-maxdepth":
                self.options.deepest = int(text)
            else:
                self.options.least = int(text)
        elif word in ("-xdev", "-mount"):
            self.options.one_filesystem = True
        elif word == "-H":
            self.options.follow_start = True
        return _true

    def _printf(self, word: str) -> Test:
        write = parse_format(self._value(word))
        return _action(lambda search, visited: search.write(write(search, visited)))


def _true(search: Search, visited: Visited) -> bool:
    return True


def _action(do: Callable[[Search, Visited], object]) -> Test:
    def act(search: Search, visited: Visited) -> bool:
        do(search, visited)
        return True

    return act


_OPTIONS = ("-maxdepth", "-mindepth", "-xdev", "-mount", "-H", "-P", "-noleaf", "-nowarn")
_ACTIONS: dict[str, Callable[[_Parser, str], Test]] = {
    "-print": lambda parser, word: _action(lambda search, visited: search.print_name(visited)),
    "-print0": lambda parser, word: _action(lambda s, v: s.write(v.entry.path + b"\0")),
    "-ls": lambda parser, word: _action(lambda search, visited: search.print_line(visited)),
    "-printf": _Parser._printf,
    "-prune": lambda parser, word: _action(lambda search, visited: search.prune(visited)),
    "-quit": lambda parser, word: _action(lambda search, visited: search.quit()),
}
KNOWN = (*_OPTIONS, *_ACTIONS, *predicates.WITHOUT_VALUE, *predicates.WITH_VALUE)
