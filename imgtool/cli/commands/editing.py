"""`edit`: one file of a guest."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Annotated

import typer

from imgtool.cli import completing, render
from imgtool.cli.guest_command import WRITE, guest_command
from imgtool.cli.session import Request
from imgtool.errors import UsageError


def _note(line: str) -> None:
    render.message("note", line)


@guest_command(*WRITE)
def edit(
    request: Request,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Absolute guest path.", autocompletion=completing.guest_paths
        ),
    ],
    expressions: Annotated[
        list[str] | None,
        typer.Option(
            "-e",
            "--expression",
            metavar="s/RE/TEXT/FLAGS",
            help="Substitute in every line, with Python's regular expressions; flags g and i.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of a file of keys and values."),
    ] = None,
    backup: Annotated[
        str | None,
        typer.Option(
            "-b",
            "--backup",
            metavar="ENDING",
            help="Keep the old file beside it, such as .bak; a file of that name is not replaced.",
        ),
    ] = None,
) -> None:
    """Edit a file of a guest in an editor, or by -e and --set.

    The editor is $VISUAL or $EDITOR; with -e and --set there is none. A symbolic link is followed
    inside the guest. The file keeps its mode, owner, attributes and label. Unchanged content writes
    nothing; what is written is there whole or not at all, and what you wrote in an editor is kept
    if it cannot be. It is always libguestfs that writes.

    \b
    Examples:
      imgtool edit guest.qcow2 /etc/fstab
      imgtool edit -e 's/quiet/quiet nomodeset/' guest.qcow2 /etc/default/grub
      imgtool edit --set PermitRootLogin=no -b .bak guest.qcow2 /etc/ssh/sshd_config
    """
    from imgtool.transfer import edit as text

    request.refuse_direct()
    if backup is not None and (not backup or "/" in backup):
        raise UsageError("not an ending for a name", subject=backup, hint="such as -b .bak")
    changes: list[text.Change] = [text.Substitution.parse(e).apply for e in expressions or ()]
    parsed = [text.Setting.parse(s) for s in settings or ()]
    changes += [setting.apply for setting in parsed]
    in_editor = not changes
    name = re.sub(r"[^\w.-]", "_", path.rpartition("/")[2]) or "file"
    if in_editor:
        if not sys.stdin.isatty():
            raise UsageError(
                "an editor needs a terminal", hint="change the file with -e or --set instead"
            )
        changes = [text.in_editor(name, text.editor_words())]
    request.refuse_doubtful_guest()
    # Read without an appliance where that can be: an editor that opens at once, and no launch at
    # all where nothing is changed.
    with request.opened() as guest:
        # Who has written a text is not told then that it cannot be.
        found, old = text.read_to_edit(guest, path, backup=backup if in_editor else None)
    if parsed:
        text.refuse_settings(found)
    new = text.all_of(changes)(old)
    for setting in parsed:
        if not setting.is_in(old):
            _note(f"no line sets {setting.key} yet: one is added ({render.escape(found)})")
    if new == old:
        render.message("note", f"unchanged, nothing was written ({render.escape(found)})")
        return
    with contextlib.ExitStack() as stack:
        if in_editor:
            stack.enter_context(text.kept_if_refused(name, new, _note))
        guest = stack.enter_context(request.opened_to_write())
        text.write_edited(guest, found, old, new, backup=backup)
