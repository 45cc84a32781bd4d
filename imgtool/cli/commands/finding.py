"""`find`: what of a guest passes a test, and where in its files a text is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import completing, options, render
from imgtool.cli.commands.listing import FIELDS, long_line, row
from imgtool.cli.guest_command import READ, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request
from imgtool.errors import UsageError
from imgtool.search.search import Search

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest
    from imgtool.search.contents import Match
    from imgtool.search.visiting import Visited

MATCH_FIELDS = (*FIELDS, "line_number", "line")


class _Printed(Search):
    """A search whose actions write to stdout."""

    def __init__(self, guest: Guest, failures: Failures) -> None:
        super().__init__(guest, failures.problem)
        self._safe = sys.stdout.isatty()

    def write(self, content: bytes) -> None:
        """Bytes as they are; on a terminal nothing in them steers it."""
        if self._safe:
            text = content.decode("utf-8", "surrogateescape")
            content = "\n".join(map(render.plain, text.split("\n"))).encode()
        sys.stdout.buffer.write(content)

    def print_name(self, visited: Visited) -> None:
        """The path as `ls` shows it."""
        self.write_line(render.escape(visited.entry.path))

    def print_line(self, visited: Visited) -> None:
        """A line of `ls -l`."""
        self.write_line(long_line(visited.entry, self.owners, visited.entry.path))

    def write_line(self, line: str) -> None:
        """A line in which nothing steers a terminal."""
        sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape") + b"\n")


@guest_command(*READ)
def find(
    request: Request,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH...] [EXPRESSION]",
            help="Where to look, / if not said; then find's own words.",
            autocompletion=completing.guest_paths,
        ),
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option(
            "--grep", metavar="PATTERN", help="The lines of files that a regular expression finds."
        ),
    ] = None,
    ignore_case: Annotated[
        bool, typer.Option("-i", "--ignore-case", help="--grep: capital letters are like small.")
    ] = False,
    names_only: Annotated[
        bool, typer.Option("-l", "--files-with-matches", help="--grep: only the files' names.")
    ] = False,
    checksum: Annotated[
        options.Checksum | None, typer.Option("--checksum", help="Checksums of regular files.")
    ] = None,
    output: options.OutputOption = Output.table,
) -> None:
    """Find files of a guest by name, size, time, owner or content.

    Options stand before IMAGE; from the first word of the expression on, all words are those of
    find(1): -name -iname -path -regex -type -size -mtime -mmin -newer -newermt -user -group -perm
    -empty -links -xdev -maxdepth -mindepth -prune, ! -a -o ( ), -print -print0 -ls -printf. Times
    are UTC.

    \b
    Examples:
      imgtool find guest.qcow2 /etc -name '*.conf' -mtime -1
      imgtool find guest.qcow2 / -xdev -type f -size +100M -ls
      imgtool find --grep 'Failed password' guest.qcow2 /var/log -name 'auth.log*'
    """
    from imgtool.guest.globbing import expand
    from imgtool.search import contents, expression, finding

    paths, asked = expression.split_words(words or ())
    parsed = expression.parse(asked, time.time_ns())
    pattern = None if grep is None else contents.parse_pattern(grep, ignore_case=ignore_case)
    if grep is None and (ignore_case or names_only):
        raise UsageError("-i and -l are for --grep", hint="-iname looks for names of any case")
    if parsed.acts and (output is not Output.table or pattern or checksum):
        raise UsageError(
            "-print, -print0, -ls and -printf are not for -o, --grep and --checksum",
            hint="leave them out: these say themselves what is shown",
        )
    failures = Failures(request.debug)
    with request.opened() as guest:
        search = _Printed(guest, failures)

        def found() -> Iterator[Visited]:
            for typed in paths or ["/"]:
                with failures.caught():
                    for path in expand(guest, typed):
                        follow = parsed.options.follow_start
                        start = finding.start_at(search, path, follow=follow)
                        yield from finding.find(search, start, parsed)
                        if search.over:
                            return

        def matches() -> Iterator[tuple[Visited, contents.Match | None]]:
            for visited in found():
                if pattern is None:
                    yield visited, None
                elif visited.entry.type == "file" and visited.entry.size:
                    with failures.caught(), guest.open(visited.entry.path) as stream:
                        for match in contents.matching_lines(stream, pattern):
                            yield visited, match
                            if names_only:
                                break

        def with_checksum(visited: Visited) -> Visited:
            if checksum is None or visited.entry.type != "file":
                return visited
            entry = guest.with_checksum(visited.entry, checksum.value, failures.problem)
            return type(visited)(entry, visited.depth, visited.start)

        if output is not Output.table:
            rows = (_row(search, with_checksum(visited), match) for visited, match in matches())
            fields = FIELDS if pattern is None else MATCH_FIELDS
            render.emit(rows, fields, output)
        else:
            for visited, match in matches():
                if not parsed.acts:
                    search.write_line(
                        _line(with_checksum(visited), match, checksum is not None, names_only)
                    )
    sys.stdout.flush()
    failures.finish()


def _row(search: Search, visited: Visited, match: Match | None) -> dict[str, object]:
    found = row(visited.entry, search.owners)
    if match is not None:
        line = {"line": None} if match.line is None else render.name_fields("line", match.line)
        found |= {"line_number": match.number, **line}
    return found


def _line(visited: Visited, match: Match | None, checksum: bool, names_only: bool) -> str:
    path = render.escape(visited.entry.path)
    if checksum:
        path = f"{visited.entry.checksum or '-'}  {path}"
    if match is None or names_only:
        return path
    if match.line is None:
        return f"{path}: binary file matches"
    return f"{path}:{match.number}:{render.plain(match.line.decode('utf-8', 'surrogateescape'))}"
