"""`stat`, `head` and `tail`."""

from __future__ import annotations

import os
import stat as modes
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.commands.listing import FIELDS, row
from imgtool.cli.guest_command import READ, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request
from imgtool.errors import EngineError, UsageError

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest
    from imgtool.guest.model import DiskExtent, Entry

STAT_FIELDS = (
    *FIELDS,
    *("inode", "links", "allocated", "rdev", "filesystem", "mountpoint"),
    *("xattrs", "extents"),
)
_SHOWN_EXTENTS = 8


Extents = Sequence["DiskExtent"] | None


def _stat_row(guest: Guest, entry: Entry, extents: Extents, output: Output) -> dict[str, object]:
    place = max(
        (
            mount
            for mount in guest.layout.mounts
            if (entry.path + b"/").startswith(mount.mountpoint.rstrip("/").encode() + b"/")
        ),
        key=lambda mount: len(mount.mountpoint),
        default=None,
    )
    return {
        **row(entry, guest.owners()),
        "inode": entry.inode,
        "links": entry.nlink,
        "allocated": entry.blocks * 512,
        "rdev": f"{os.major(entry.rdev)}:{os.minor(entry.rdev)}" if entry.rdev else None,
        "filesystem": place and place.source,
        "mountpoint": place and place.mountpoint,
        "xattrs": render.attributes(entry.xattrs, output),
        "extents": None
        if extents is None
        else [
            {
                "offset": extent.offset,
                "length": extent.length,
                "disk": extent.disk,
                "position": extent.position,
            }
            for extent in extents
        ],
    }


def _stat_lines(entry: Entry, found: dict[str, object], extents: Extents) -> Iterator[str]:
    target = "" if entry.target is None else f" -> {render.escape(entry.target)}"
    yield f"path        {render.escape(entry.path)}{target}"
    yield f"type        {found['type']}"
    yield f"mode        {found['mode']} ({modes.filemode(entry.mode)})"
    for name, number in (("user", entry.uid), ("group", entry.gid)):
        yield f"{name:<12}{render.plain(str(found[name] or '-'))} ({number})"
    yield f"size        {entry.size} bytes, {found['allocated']} allocated"
    yield f"mtime       {found['mtime']}"
    yield f"links       {entry.nlink}"
    yield f"inode       {entry.inode}"
    if found["rdev"]:
        yield f"rdev        {found['rdev']}"
    place = f"{found['filesystem'] or '-'} at {found['mountpoint'] or '-'}"
    yield f"filesystem  {render.plain(place)}"
    for pair in entry.xattrs or ():
        yield f"xattr       {render.attribute(*pair)}"
    extents = extents or ()
    for extent in extents[:_SHOWN_EXTENTS]:
        yield (
            f"extent      {extent.length} bytes at {extent.offset} of the file:"
            f" disk {extent.disk + 1}, byte {extent.position}"
        )
    if len(extents) > _SHOWN_EXTENTS:
        yield f"extent      {len(extents) - _SHOWN_EXTENTS} more: -o json"


@guest_command(*READ)
def stat(
    request: Request, paths: options.GuestPaths, output: options.OutputOption = Output.table
) -> None:
    """Show all that is known of a file, and where on disk it lies.

    A link is shown itself, not what it leads to.

    \b
    Examples:
      imgtool stat guest.qcow2 /etc/shadow
      imgtool stat -o json guest.qcow2 '/boot/vmlinuz*'
    """
    from imgtool.guest.globbing import expand

    failures = Failures(request.debug)
    with request.opened() as guest:

        def found() -> Iterator[tuple[Entry, dict[str, object], Extents]]:
            for typed in paths:
                with failures.caught():
                    for path in expand(guest, typed):
                        with failures.caught():
                            entry = guest.with_xattrs(guest.lstat(path), failures.problem)
                            file = entry.type == "file"
                            extents = guest.extents(entry.path) if file else None
                            yield entry, _stat_row(guest, entry, extents, output), extents

        if output is Output.table:
            for number, known in enumerate(found()):
                render.text("\n" * bool(number) + "\n".join(_stat_lines(*known)) + "\n")
        else:
            render.emit((fields for _, fields, _ in found()), STAT_FIELDS, output)
    sys.stdout.flush()
    failures.finish()


Lines = Annotated[
    str | None, typer.Option("-n", "--lines", metavar="N", help="So many lines. [10]")
]
Bytes = Annotated[str | None, typer.Option("-c", "--bytes", metavar="N", help="So many bytes.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No names above several files.")]


@guest_command(*READ)
def head(
    request: Request,
    paths: options.GuestPaths,
    lines: Lines = None,
    size: Bytes = None,
    quiet: Quiet = False,
) -> None:
    """Write the beginning of files of a guest to stdout.

    -n -N and -c -N write all but the last N.

    \b
    Examples:
      imgtool head guest.qcow2 /etc/passwd
      imgtool head -c 512 guest.qcow2 '/boot/vmlinuz*'
    """
    from imgtool.search import ends

    _write_parts(request, paths, lines, size, quiet, ends.head, skips="-")


@guest_command(*READ)
def tail(
    request: Request,
    paths: options.GuestPaths,
    lines: Lines = None,
    size: Bytes = None,
    quiet: Quiet = False,
) -> None:
    """Write the end of files of a guest to stdout.

    No more of them is read than that. -n +N and -c +N write from line or byte N on.

    \b
    Examples:
      imgtool tail -n 100 guest.qcow2 /etc/services
      imgtool tail guest.qcow2 '/etc/*.conf'
    """
    from imgtool.search import ends

    _write_parts(request, paths, lines, size, quiet, ends.tail, skips="+")


def _write_parts(
    request: Request,
    paths: list[str],
    lines: str | None,
    size: str | None,
    quiet: bool,
    part: Callable[..., Iterator[bytes]],
    *,
    skips: str,
) -> None:
    from imgtool.guest.globbing import expand
    from imgtool.image.chain.guest_files import GuestFiles
    from imgtool.search import ends

    if lines is not None and size is not None:
        raise UsageError("-n and -c exclude each other")
    amount = ends.parse_amount(size or lines or "10", skips=skips)
    failures = Failures(request.debug)
    out, written = sys.stdout.buffer, 0
    with request.opened() as guest:
        GuestFiles(guest.chains).refuse_output(out)
        meant: list[str] = []
        for typed in paths:
            with failures.caught():
                meant += expand(guest, typed)
        several = len(meant) > 1 or len(paths) > 1
        for path in meant:
            with failures.caught():
                if len(meant) > len(paths) and not _is_file(guest, path):
                    continue  # a pattern means files here, as in `tail *.log`
                blocks = part(guest, path, amount, lines=size is None)
                first = next(blocks, b"")
                if several and not quiet:
                    out.write(b"\n" * bool(written) + f"==> {render.plain(path)} <==\n".encode())
                written += 1
                out.write(first)
                for block in blocks:
                    out.write(block)
            out.flush()
    failures.finish()


def _is_file(guest: Guest, path: str) -> bool:
    try:
        return guest.lstat(guest.resolve(path)).type == "file"
    except EngineError:
        return True  # what is wrong with it is said as it is read
