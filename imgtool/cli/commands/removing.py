"""`rm`: files of a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.guest_command import WRITE, guest_command
from imgtool.cli.session import Failures, Request

if TYPE_CHECKING:
    from imgtool.guest.changes import Changes
    from imgtool.guest.guest import Guest


@guest_command(*WRITE)
def rm(
    request: Request,
    paths: options.GuestPaths,
    recursive: Annotated[
        bool, typer.Option("-r", "-R", "--recursive", help="Directories, with all that is in them.")
    ] = False,
    missing_ok: Annotated[
        bool, typer.Option("-f", "--missing-ok", help="What is not there is no error.")
    ] = False,
) -> None:
    """Remove files of a guest.

    All of it or nothing: until everything is removed, the image is as it was. A link goes itself,
    not what it leads to. A pattern that matches nothing is an error.

    \b
    Examples:
      imgtool rm -f guest.qcow2 /etc/nologin
      imgtool rm -n -r guest.qcow2 '/var/cache/apt/archives/*'
    """
    from imgtool.transfer.removing import count_entries, plan_removal

    request.refuse_direct()
    request.refuse_unwritable_guest()
    failures = Failures(request.debug)

    def plan(guest: Guest) -> Changes:
        return plan_removal(guest, paths, recursive=recursive, missing_ok=missing_ok)

    # What is wrong is said before an appliance is started, where that can be.
    changes = request.ask_directly(plan)
    if changes is not None and not changes:
        render.message("note", "nothing of it is there, nothing was written")
        return
    with request.opened_to_write() as guest:
        changes = plan(guest) if changes is None else changes
        count = count_entries(guest, changes, failures.problem)
        failures.finish()
        guest.apply(changes)
    if not request.dry_run:
        render.message("note", f"removed: {count} {'file' if count == 1 else 'files'}")
