"""`snapshot create`, `snapshot list`, `snapshot revert` and `snapshot delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.commands import working
from imgtool.cli.guest_command import plain_command
from imgtool.cli.output import Output
from imgtool.cli.session import Common

FIELDS = ("id", "name", "time", "vm_state_size", "vm_clock", "present")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The snapshot, by its name or id.")]


@plain_command("dry_run", "force", "format", "backing_dirs")
def create(
    common: Common,
    image: options.Image,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
) -> None:
    """Keep the present state of an image under a name, inside it.

    \b
    Examples:
      imgtool snapshot create -n guest.qcow2 before-update
      imgtool snapshot create guest.qcow2 before-update
    """
    from imgtool.image.change import snapshots

    working.run_plan(
        lambda: snapshots.plan_create(
            image, name, format=common.format, force=common.force, backing_dirs=common.backing_dirs
        ),
        image,
        common=common,
    )


@plain_command("format", "backing_dirs")
def list_(
    common: Common,
    image: options.Image,
    human: options.Human = False,
    output: options.OutputOption = Output.table,
) -> None:
    """List the internal snapshots, and which of them is the present.

    \b
    Examples:
      imgtool snapshot list guest.qcow2
      imgtool snapshot list -o json guest.qcow2
    """
    from imgtool.image.change import snapshots
    from imgtool.image.checks.doubts import doubts_of

    chain = snapshots.with_snapshots(image, format=common.format, backing_dirs=common.backing_dirs)
    working.say_of_records(link.path for link in chain.links)
    for doubt in doubts_of(chain):
        render.message("warning", doubt)
    present = snapshots.present_in(chain)
    rows = [
        {
            "id": snapshot.id,
            "name": snapshot.name,
            "time": render.timestamp(snapshot.time),
            "vm_state_size": snapshot.vm_state_size,
            "vm_clock": snapshot.vm_clock,
            "present": snapshot == present,
        }
        for snapshot in chain.active.snapshots
    ]
    shown = [
        {**row, "vm_state_size": render.human(snapshot.vm_state_size)} if human else row
        for row, snapshot in zip(rows, chain.active.snapshots, strict=True)
    ]
    columns = ["id", "name", "time", "vm_state_size", "present"]
    titles = {"vm_state_size": "vm state"}
    render.emit(rows, FIELDS, output, columns=columns, shown=shown, titles=titles)


@plain_command("dry_run", "force", "format", "backing_dirs")
def revert(
    common: Common,
    image: options.Image,
    name: Name,
    discard: Annotated[bool, typer.Option("--discard", help="Give the present state up.")] = False,
    save_as: Annotated[
        str | None,
        typer.Option("--save-as", metavar="NAME", help="Keep the present state under this name."),
    ] = None,
) -> None:
    """Go back to a snapshot.

    A present state that is in no snapshot is not thrown away unasked.

    \b
    Examples:
      imgtool snapshot revert --save-as now guest.qcow2 before-update
      imgtool snapshot revert --discard guest.qcow2 before-update
    """
    from imgtool.image.change import snapshots

    working.run_plan(
        lambda: snapshots.plan_revert(
            image,
            name,
            format=common.format,
            discard=discard,
            save_as=save_as,
            force=common.force,
            backing_dirs=common.backing_dirs,
        ),
        image,
        common=common,
    )


@plain_command("dry_run", "force", "format", "backing_dirs")
def delete(
    common: Common,
    image: options.Image,
    name: Name,
) -> None:
    """Delete a snapshot.

    The file does not shrink; 'imgtool compact' gives the space back.

    \b
    Examples:
      imgtool snapshot delete -n guest.qcow2 before-update
      imgtool snapshot delete guest.qcow2 before-update
    """
    from imgtool.image.change import snapshots

    working.run_plan(
        lambda: snapshots.plan_delete(
            image, name, format=common.format, force=common.force, backing_dirs=common.backing_dirs
        ),
        image,
        common=common,
    )
    if not common.dry_run:
        space = render.human(snapshots.space_to_give_back(image))
        render.message(
            "note", f"the file stays as long; 'imgtool compact' would give back about {space}"
        )
