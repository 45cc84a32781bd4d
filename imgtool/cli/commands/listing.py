"""`ls` and `cat`."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import READ, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest, Owners
    from imgtool.guest.model import Entry

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
    paths: options.GuestPaths,
    long: Annotated[bool, typer.Option("-l", help="Mode, owner, size, time, target.")] = False,
    recursive: Annotated[bool, typer.Option("-R", help="Everything below.")] = False,
    human: options.Human = False,
    checksum: Annotated[
        options.Checksum | None, typer.Option("--checksum", help="Checksums of regular files.")
    ] = None,
    xattrs: Annotated[
        bool, typer.Option("--xattrs", help="Extended attributes, ACLs among them.")
    ] = False,
    output: options.OutputOption = Output.table,
) -> None:
    """List files of a guest.

    \b
    Examples:
      imgtool ls guest.qcow2 /etc
      imgtool ls -lh guest.qcow2 /var/log
      imgtool ls -R --checksum sha256 -o jsonl guest.qcow2 /etc
    """
    failures = Failures(request.debug)
    with request.opened() as guest:
        owners = guest.owners() if long or output is not Output.table else None

        begun = False

        def listed(path: str, title: str | None = None) -> Iterator[Entry]:
            nonlocal begun
            with failures.caught():
                top = _top(guest, path)
                if title is not None:
                    print("\n" * begun + title)
                    begun = True
                kind = checksum.value if checksum else None
                yield from _entries(guest, top, recursive, kind, xattrs, failures)

        if output is not Output.table:
            assert owners is not None
            every = (
                row(entry, owners)
                | ({"xattrs": render.attributes(entry.xattrs, output)} if xattrs else {})
                for path in paths
                for entry in listed(path)
            )
            render.emit(every, (*FIELDS, "xattrs") if xattrs else FIELDS, output)
        else:
            titles = len(paths) > 1 and not recursive
            for path in paths:
                for entry in listed(path, f"{render.plain(path)}:" if titles else None):
                    name = entry.path if recursive else entry.name or b"/"
                    if owners is not None:
                        print(long_line(entry, owners, name, human, checksum is not None))
                    elif checksum is not None:
                        print(f"{entry.checksum or '-'}  {render.escape(name)}")
                    else:
                        print(render.escape(name))
                    for pair in entry.xattrs or ():
                        print(f"    {render.attribute(*pair)}")
    sys.stdout.flush()
    failures.finish()


def _top(guest: Guest, path: str) -> Entry:
    """What the path names; of a link to a directory, the directory."""
    entry = guest.lstat(path)
    if entry.type == "symlink":
        resolved = guest.resolve(path)
        if guest.lstat(resolved).type == "directory":
            return guest.lstat(resolved)
    return entry


def _entries(
    guest: Guest,
    entry: Entry,
    recursive: bool,
    checksum: str | None,
    xattrs: bool,
    failures: Failures,
) -> Iterator[Entry]:
    """What `ls PATH` lists: a directory's content, or the one thing that the path names."""
    if entry.type != "directory":
        entry = guest.with_xattrs(entry, failures.problem) if xattrs else entry
        summed = checksum is not None and entry.type == "file"
        yield guest.with_checksum(entry, str(checksum), failures.problem) if summed else entry
    elif recursive:
        yield from guest.walk(
            entry.path, checksum=checksum, xattrs=xattrs, on_problem=failures.problem
        )
    else:
        for child in guest.entries(entry.path, xattrs=xattrs, on_problem=failures.problem):
            summed = checksum is not None and child.type == "file"
            yield guest.with_checksum(child, str(checksum), failures.problem) if summed else child


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
        for path in paths:
            with failures.caught(), guest.open(path) as stream:
                while block := stream.read(1 << 20):
                    sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
    failures.finish()
