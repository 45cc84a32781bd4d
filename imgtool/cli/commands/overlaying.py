"""`overlay create`, `overlay commit`, `overlay rebase`, `overlay flatten` and `compact`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imgtool.cli import options
from imgtool.cli.commands import working
from imgtool.cli.guest_command import plain_command
from imgtool.cli.session import Common

Base = Annotated[Path, typer.Argument(metavar="BASE", help="The image that it stands on.")]
New = Annotated[Path, typer.Argument(metavar="NEW", help="The new image; no file yet.")]
Overlay = Annotated[Path, typer.Argument(metavar="OVERLAY", help="The overlay.")]
BaseFormat = Annotated[
    str | None, typer.Option("--base-format", metavar="FMT", help="Take the base as this format.")
]


@plain_command("dry_run", "force", "backing_dirs")
def create(
    common: Common,
    base: Base,
    new: New,
    base_format: BaseFormat = None,
    protect_base: Annotated[
        bool, typer.Option("--protect-base", help="Make the base's file read-only.")
    ] = False,
) -> None:
    """Make an overlay on an image: a linked clone.

    It holds only what is written to it. The base must not be written to from then on; imgtool
    refuses to.

    \b
    Examples:
      imgtool overlay create -n guest.qcow2 new.qcow2
      imgtool overlay create --protect-base guest.qcow2 new.qcow2
    """
    from imgtool.image.change import overlays

    working.run_plan(
        lambda: overlays.plan_create(
            base,
            new,
            base_format=base_format,
            protect_base=protect_base,
            force=common.force,
            backing_dirs=common.backing_dirs,
        ),
        base,
        new,
        common=common,
    )


@plain_command("dry_run", "force", "format", "backing_dirs")
def commit(
    common: Common,
    overlay: Overlay,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the overlay once its content is proved.")
    ] = False,
) -> None:
    """Merge an overlay into its base.

    What it holds is written there, and it is proved that both are then the same. If it is
    interrupted, the overlay has everything; the same command again finishes it.

    \b
    Examples:
      imgtool overlay commit -n tuesday.qcow2
      imgtool overlay commit --remove tuesday.qcow2
    """
    from imgtool.image.change import overlays

    working.run_plan(
        lambda: overlays.plan_commit(
            overlay,
            format=common.format,
            remove=remove,
            force=common.force,
            backing_dirs=common.backing_dirs,
        ),
        overlay,
        common=common,
        below=False,  # repeating it is what finishes it
    )


@plain_command("dry_run", "force", "format", "backing_dirs")
def rebase(
    common: Common,
    overlay: Overlay,
    base: Annotated[Path, typer.Argument(metavar="NEWBASE", help="What it is to stand on.")],
    base_format: BaseFormat = None,
    unsafe: Annotated[
        bool,
        typer.Option("--unsafe", help="Only write the name and format of the base into it."),
    ] = False,
) -> None:
    """Put an overlay on another base; the guest sees the same.

    With --unsafe nothing is copied: for a base that was moved, or whose format is not written.

    \b
    Examples:
      imgtool overlay rebase tuesday.qcow2 other.qcow2
      imgtool overlay rebase --unsafe tuesday.qcow2 moved/guest.qcow2
    """
    from imgtool.image.change import overlays

    working.run_plan(
        lambda: overlays.plan_rebase(
            overlay,
            base,
            format=common.format,
            base_format=base_format,
            unsafe=unsafe,
            force=common.force,
            backing_dirs=common.backing_dirs,
        ),
        overlay,
        base,
        common=common,
    )


@plain_command("dry_run", "force", "format", "backing_dirs")
def flatten(
    common: Common,
    overlay: Overlay,
) -> None:
    """Make an overlay an image that stands alone.

    All that it stood on is then in it.

    \b
    Examples:
      imgtool overlay flatten -n tuesday.qcow2
      imgtool overlay flatten tuesday.qcow2
    """
    from imgtool.image.change import overlays

    working.run_plan(
        lambda: overlays.plan_flatten(
            overlay, format=common.format, force=common.force, backing_dirs=common.backing_dirs
        ),
        overlay,
        common=common,
    )


@plain_command("dry_run", "force", "format", "backing_dirs")
def compact(
    common: Common,
    image: options.Image,
) -> None:
    """Give the space back that an image's file takes for nothing.

    Snapshots are kept. The result is written beside the image, proved to have the same content, and
    swapped in.

    \b
    Examples:
      imgtool compact -n guest.qcow2
      imgtool compact guest.qcow2
    """
    from imgtool.image.change.compacting import plan_compact

    working.run_plan(
        lambda: plan_compact(
            image, format=common.format, force=common.force, backing_dirs=common.backing_dirs
        ),
        image,
        common=common,
    )
