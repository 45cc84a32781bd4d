"""`ls` and `cat`."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import READ, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request
from imgtool.errors import EngineError, NotInGuestError, UsageError
from imgtool.guest.globbing import expand
from imgtool.guest.model import Entry

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest, Owners

FIELDS = (
    "path",
    "type",
    "mode",
    "uid",
    "gid",
    "user",
    "group",
    "size",
    "mtime",
    "target",
    "checksum",
)


def row(entry: Entry, owners: Owners) -> dict[str, object]:
    """The row of an entry for JSON and CSV."""
    target = (
        {"target": None} if entry.target is None else render.name_fields("target", entry.target)
    )
    return {
        **render.name_fields("path", entry.path),
        "type": entry.type,
        "mode": f"{stat.S_IMODE(entry.mode):04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "user": owners.users.get(entry.uid),
        "group": owners.groups.get(entry.gid),
        "size": entry.size,
        "mtime": render.timestamp(entry.mtime_ns),
        **target,
        "checksum": entry.checksum,
    }


def long_line(
    entry: Entry, owners: Owners, name: bytes, human: bool = False, checksum: bool = False
) -> str:
    """A line of `ls -l`."""
    user = render.plain(owners.users.get(entry.uid, str(entry.uid)))
    group = render.plain(owners.groups.get(entry.gid, str(entry.gid)))
    if entry.type in ("char", "block"):
        size = f"{os.major(entry.rdev)},{os.minor(entry.rdev)}"
    else:
        size = render.human(entry.size) if human else str(entry.size)
    moment = render.timestamp(entry.mtime_ns)[:19].replace("T", " ")
    target = "" if entry.target is None else f" -> {render.escape(entry.target)}"
    summed = f"{entry.checksum or '-'}  " if checksum else ""
    return (
        f"{stat.filemode(entry.mode)} {entry.nlink:>3} {user:<8} {group:<8} {size:>10} {moment} "
        f"{summed}{render.escape(name)}{target}"
    )


@guest_command(*READ)
def ls(
    request: Request,
    paths: options.GuestPathsOrRoot = None,
    long: Annotated[bool, typer.Option("-l", help="Mode, owner, size, time, target.")] = False,
    recursive: Annotated[bool, typer.Option("-R", help="Everything below.")] = False,
    human: options.Human = False,
    hidden: Annotated[
        bool, typer.Option("-a", "--all", help="Names with a dot too: always shown.")
    ] = False,
    by_time: Annotated[bool, typer.Option("-t", help="The newest first.")] = False,
    by_size: Annotated[bool, typer.Option("-S", help="The largest first.")] = False,
    reverse: Annotated[bool, typer.Option("-r", help="The other way round.")] = False,
    single: Annotated[bool, typer.Option("-1", help="One name a line, as always.")] = False,
    inodes: Annotated[bool, typer.Option("-i", "--inode", help="The inode number first.")] = False,
    directory: Annotated[
        bool, typer.Option("--directory", help="Directories themselves, not what is in them.")
    ] = False,
    checksum: Annotated[
        options.Checksum | None, typer.Option("--checksum", help="Checksums of regular files.")
    ] = None,
    xattrs: Annotated[
        bool, typer.Option("--xattrs", help="Extended attributes, ACLs among them.")
    ] = False,
    output: options.OutputOption = Output.table,
) -> None:
    """List files of a guest.

    Without PATH it is /. In a PATH `*`, `?` and `[a-z]` are expanded in the guest: quote it.

    \b
    Examples:
      imgtool ls guest.qcow2 /etc
      imgtool ls -lht guest.qcow2 '/etc/*.conf'
      imgtool ls -R --checksum sha256 -o jsonl guest.qcow2 /etc
    """
    if by_time and by_size:
        raise UsageError("-t and -S exclude each other")
    failures = Failures(request.debug)
    kind = checksum.value if checksum else None
    with request.opened() as guest:
        lister = _Lister(guest, failures, recursive and not directory, directory, kind, xattrs)
        order = _order(by_time=by_time, by_size=by_size, reverse=reverse)
        owners = guest.owners() if long or output is not Output.table else None
        typed = paths or ["/"]
        if output is not Output.table:
            assert owners is not None
            every = (
                row(entry, owners)
                | ({"inode": entry.inode} if inodes else {})
                | ({"xattrs": render.attributes(entry.xattrs, output)} if xattrs else {})
                for listing in lister.listings(typed)
                for entry in order(listing.entries)
            )
            fields = (*FIELDS, *(["inode"] * inodes), *(["xattrs"] * xattrs))
            render.emit(every, fields, output)
        else:
            begun = False
            for listing in lister.listings(typed):
                if listing.title is not None:
                    print("\n" * begun + listing.title)
                begun = True
                for entry in order(listing.entries):
                    name = listing.name(entry)
                    number = f"{entry.inode:>10} " if inodes else ""
                    if owners is not None:
                        line = long_line(entry, owners, name, human, checksum is not None)
                    elif checksum is not None:
                        line = f"{entry.checksum or '-'}  {render.escape(name)}"
                    else:
                        line = render.escape(name)
                    print(number + line)
                    for pair in entry.xattrs or ():
                        print(f"    {render.attribute(*pair)}")
    sys.stdout.flush()
    failures.finish()


Order = Callable[[Iterator[Entry]], Iterable[Entry]]


def _order(*, by_time: bool, by_size: bool, reverse: bool) -> Order:
    """What puts entries into the order that was asked for; by name they come as they are read."""

    def sort(entries: Iterator[Entry]) -> Iterable[Entry]:
        if by_time:
            return sorted(entries, key=lambda entry: entry.mtime_ns, reverse=not reverse)
        if by_size:
            return sorted(entries, key=lambda entry: entry.size, reverse=not reverse)
        return reversed(list(entries)) if reverse else entries

    return sort


@dataclass
class _Listing:
    """What is listed together: files that were named, or what is in a directory; with what is
    above it, if anything, and how an entry is called."""

    title: str | None
    entries: Iterator[Entry]
    name: Callable[[Entry], bytes]


@dataclass
class _Lister:
    """How `ls` goes through what was named."""

    guest: Guest
    failures: Failures
    recursive: bool
    directory: bool
    checksum: str | None
    xattrs: bool

    def listings(self, typed: Sequence[str]) -> Iterator[_Listing]:
        """As in ls: first the files, together, then each directory below its name where there are
        several. What is below a directory has the path that was typed.
        """
        files: list[tuple[str, Entry]] = []
        directories: list[tuple[str, Entry]] = []
        missed = False
        for one in typed:
            before = len(self.failures.statuses)
            with self.failures.caught():
                for path in expand(self.guest, one):
                    entry = self._top(path)
                    where = files if self.directory or entry.type != "directory" else directories
                    where.append((path, entry))
            missed = missed or len(self.failures.statuses) > before
        if files:
            names = {entry.path: path for path, entry in files}
            yield _Listing(
                None,
                (self._complete(entry) for _, entry in files),
                lambda entry: os.fsencode(names[entry.path]),
            )
        titled = bool(files) or len(directories) > 1 or missed
        for path, entry in directories:
            title = f"{render.plain(path)}:" if titled and not self.recursive else None
            yield _Listing(title, self._caught(self._inside(entry)), self._names(path, entry))

    def _names(self, typed: str, directory: Entry) -> Callable[[Entry], bytes]:
        if not self.recursive:
            return lambda entry: entry.name
        # What a link leads to keeps the link's name.
        above = self.guest.path(typed).rstrip(b"/")
        length = len(directory.path.rstrip(b"/"))
        return lambda entry: above + entry.path[length:]

    def _top(self, path: str) -> Entry:
        """What the path names; of a link to a directory, the directory."""
        entry = self.guest.lstat(path)
        if entry.type == "symlink" and not self.directory:
            with contextlib.suppress(NotInGuestError, EngineError):
                resolved = self.guest.lstat(self.guest.resolve(path))
                if resolved.type == "directory":
                    return resolved
        return entry

    def _caught(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        with self.failures.caught():
            yield from entries

    def _complete(self, entry: Entry) -> Entry:
        """The entry of a file that was named, with what else was asked for."""
        problem = self.failures.problem
        if self.xattrs:
            entry = self.guest.with_xattrs(entry, problem)
        if self.checksum is not None and entry.type == "file":
            return self.guest.with_checksum(entry, self.checksum, problem)
        return entry

    def _inside(self, directory: Entry) -> Iterator[Entry]:
        problem = self.failures.problem
        if self.recursive:
            yield from self.guest.walk(
                directory.path, checksum=self.checksum, xattrs=self.xattrs, on_problem=problem
            )
            return
        for child in self.guest.entries(directory.path, xattrs=self.xattrs, on_problem=problem):
            summed = self.checksum is not None and child.type == "file"
            yield self.guest.with_checksum(child, str(self.checksum), problem) if summed else child


@guest_command(*READ)
def cat(
    request: Request,
    paths: options.GuestPaths,
) -> None:
    """Write files of a guest to stdout, untouched.

    \b
    Examples:
      imgtool cat guest.qcow2 /etc/fstab
      imgtool cat guest.qcow2 /var/log/dpkg.log | tail
    """
    from imgtool.image.chain.guest_files import GuestFiles

    failures = Failures(request.debug)
    with request.opened() as guest:
        GuestFiles(guest.chains).refuse_output(sys.stdout.buffer)
        for typed in paths:
            with failures.caught():
                for path in expand(guest, typed):
                    with failures.caught(), guest.open(path) as stream:
                        while block := stream.read(1 << 20):
                            sys.stdout.buffer.write(block)
                    sys.stdout.buffer.flush()
    failures.finish()
