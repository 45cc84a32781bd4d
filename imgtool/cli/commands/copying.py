"""`copy-out` and `copy-in`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import READ, WRITE, guest_command
from imgtool.cli.progress import progress
from imgtool.cli.session import Failures, Request
from imgtool.errors import UsageError

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest


def _split(paths: list[str]) -> tuple[list[str], str]:
    if len(paths) < 2:
        raise UsageError("a source and a destination are needed", hint="IMAGE SRC... DEST")
    return paths[:-1], paths[-1]


def _left_out(path: bytes, line: str) -> None:
    render.message("warning", f"{line} ({render.escape(path)})")


@guest_command(*READ)
def copy_out(
    request: Request,
    paths: options.OutwardPaths,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist; merge directories.")
    ] = False,
    keep_partial: Annotated[
        bool,
        typer.Option("--keep-partial", help="Keep what could be read of a damaged file."),
    ] = False,
    xattrs: Annotated[
        options.Kept,
        typer.Option("--xattrs", help="Keep user attributes and ACLs, or all: security, trusted."),
    ] = options.Kept.user,
) -> None:
    """Copy files and directories out of a guest.

    DEST `-` writes SRC to stdout as tar.

    \b
    Examples:
      imgtool copy-out --overwrite guest.qcow2 /etc/fstab /etc/hostname .
      imgtool copy-out guest.qcow2 '/boot/vmlinuz*' '/etc/*.conf' rescued
      imgtool copy-out guest.qcow2 /etc - | tar -t
    """
    from imgtool.guest.globbing import expand_all, is_pattern
    from imgtool.transfer import copy_out as outward
    from imgtool.transfer.keeping import Keeping

    sources, dest = _split(paths)
    failures = Failures(request.debug)
    if dest == "-":
        if len(sources) != 1:
            raise UsageError("a tar stream has one source")
        if sys.stdout.isatty():
            raise UsageError("a tar stream is not written to a terminal")
        with request.opened() as guest:
            outward.tar_out(guest, sources[0], sys.stdout.buffer, failures.problem)
        failures.finish()
        return
    outward.check_destination(sources, dest, overwrite=overwrite)
    with request.opened() as guest, progress("copy-out") as bar:
        if any(map(is_pattern, sources)):
            sources = expand_all(guest, sources)
            outward.check_destination(sources, dest, overwrite=overwrite)
        outward.refuse_guest_files(guest, sources, dest)
        keeping = Keeping(everything=xattrs is options.Kept.all)
        report = outward.Report(failures.problem, _left_out, bar, keeping)
        for source in sources:
            with failures.caught():
                outward.copy_out(
                    guest,
                    source,
                    Path(dest),
                    report,
                    overwrite=overwrite,
                    keep_partial=keep_partial,
                )
    for line in keeping.lines():
        render.message("warning", line)
    failures.finish()


def _mode(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-7]{1,4}", text):
        raise UsageError("--mode takes octal digits, such as 0644", subject=text)
    return int(text, 8)


@guest_command(*WRITE)
def copy_in(
    request: Request,
    paths: options.InwardPaths,
    owner: Annotated[
        str | None,
        typer.Option(
            "--owner", metavar="USER[:GROUP]", help="Owner: a name that the guest has, or a number."
        ),
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="GROUP", help="Group, likewise.")
    ] = None,
    preserve_owner: Annotated[
        bool, typer.Option("--preserve-owner", help="Keep the host's numeric owners.")
    ] = False,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="MODE", help="Mode of the files, octal.")
    ] = None,
) -> None:
    """Copy host files and directories into a guest.

    All of it or nothing: until everything is written, the image is as it was. A file that replaces
    another has its owner and mode, a new one belongs to root. SRC `-` unpacks a tar stream from
    stdin, whose owners are kept.

    \b
    Examples:
      imgtool copy-in guest.qcow2 motd /etc/motd
      imgtool copy-in -n guest.qcow2 site /srv
      tar -c site | imgtool copy-in --owner www-data:www-data guest.qcow2 - /srv
    """
    from imgtool.transfer import copy_in as inward

    request.refuse_direct()
    sources, dest = _split(paths)
    named = inward.split_owner(owner, group)
    if any(named) and preserve_owner:
        raise UsageError("--owner and --group exclude --preserve-owner")
    bits = _mode(mode)
    stream = "-" in sources
    if stream and len(sources) != 1:
        raise UsageError("a tar stream is the only source")
    plan = None if stream else inward.plan_sources([Path(os.fsdecode(one)) for one in sources])
    request.refuse_unwritable_guest()

    def look(guest: Guest) -> inward.Ownership:
        inward.destination(guest, dest, single=len(sources) == 1 and not stream)
        if any(named):
            return inward.find_ownership(guest, *named)
        return inward.Ownership(of_source=preserve_owner or stream)

    # What is wrong is said before an appliance is started, where that can be.
    numbers = request.ask_directly(look)
    if plan is None:
        with request.opened_to_write() as guest:
            numbers = numbers or look(guest)
            inward.tar_in(
                guest, sys.stdin.buffer, dest, owner=numbers, mode=bits, on_skipped=_left_out
            )
        return
    with request.opened_to_write() as guest, progress("copy-in") as bar:
        numbers = numbers or look(guest)
        inward.copy_in(
            guest,
            plan,
            dest,
            owner=numbers,
            mode=bits,
            on_skipped=_left_out,
            on_progress=bar,
        )
