"""`overlay create`, `overlay commit`, `overlay rebase`, `overlay flatten` and `compact`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imgtool.cli import options
from imgtool.cli.commands import working
from imgtool.cli.session import set_up_logging

Base = Annotated[Path, typer.Argument(metavar="BASE", help="The image that it stands on.")]
New = Annotated[Path, typer.Argument(metavar="NEW", help="The new image; no file yet.")]
Overlay = Annotated[Path, typer.Argument(metavar="OVERLAY", help="The overlay.")]
BaseFormat = Annotated[
    str | None, typer.Option("--base-format", metavar="FMT", help="Take the base as this format.")
]


def create(
    base: Base,
    new: New,
    base_format: BaseFormat = None,
    protect_base: Annotated[
        bool, typer.Option("--protect-base", help="Make the base's file read-only.")
    ] = False,
    dry_run: options.DryRun = False,
    force: options.Force = None,
    backing_dir: options.BackingDirs = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
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

    set_up_logging(verbose=verbose, debug=debug)
    working.run_plan(
        lambda: overlays.plan_create(
            base,
            new,
            base_format=base_format,
            protect_base=protect_base,
            force=force or (),
            backing_dirs=backing_dir or (),
        ),
        base,
        new,
        dry_run=dry_run,
        backing_dirs=backing_dir,
    )


def commit(
    overlay: Overlay,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the overlay once its content is proved.")
    ] = False,
    dry_run: options.DryRun = False,
    force: options.Force = None,
    backing_dir: options.BackingDirs = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Write what an overlay holds into its base.

    It is proved that both are then the same. If it is interrupted, the overlay has everything; the
    same command again finishes it.

    \b
    Examples:
      imgtool overlay commit -n tuesday.qcow2
      imgtool overlay commit --remove tuesday.qcow2
    """
    from imgtool.image.change import overlays

    set_up_logging(verbose=verbose, debug=debug)
    working.run_plan(
        lambda: overlays.plan_commit(
            overlay, remove=remove, force=force or (), backing_dirs=backing_dir or ()
        ),
        overlay,
        dry_run=dry_run,
        below=False,  # repeating it is what finishes it
        backing_dirs=backing_dir,
    )


def rebase(
    overlay: Overlay,
    base: Annotated[Path, typer.Argument(metavar="NEWBASE", help="What it is to stand on.")],
    base_format: BaseFormat = None,
    unsafe: Annotated[
        bool,
        typer.Option("--unsafe", help="Only write the name and format of the base into it."),
    ] = False,
    dry_run: options.DryRun = False,
    force: options.Force = None,
    backing_dir: options.BackingDirs = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Put an overlay on another base; the guest sees the same.

    With --unsafe nothing is copied: for a base that was moved, or whose format is not written.

    \b
    Examples:
      imgtool overlay rebase tuesday.qcow2 other.qcow2
      imgtool overlay rebase --unsafe tuesday.qcow2 moved/guest.qcow2
    """
    from imgtool.image.change import overlays

    set_up_logging(verbose=verbose, debug=debug)
    working.run_plan(
        lambda: overlays.plan_rebase(
            overlay,
            base,
            base_format=base_format,
            unsafe=unsafe,
            force=force or (),
            backing_dirs=backing_dir or (),
        ),
        overlay,
        base,
        dry_run=dry_run,
        backing_dirs=backing_dir,
    )


def flatten(
    overlay: Overlay,
    dry_run: options.DryRun = False,
    force: options.Force = None,
    backing_dir: options.BackingDirs = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Make an overlay an image that stands alone.

    All that it stood on is then in it.

    \b
    Examples:
      imgtool overlay flatten -n tuesday.qcow2
      imgtool overlay flatten tuesday.qcow2
    """
    from imgtool.image.change import overlays

    set_up_logging(verbose=verbose, debug=debug)
    working.run_plan(
        lambda: overlays.plan_flatten(overlay, force=force or (), backing_dirs=backing_dir or ()),
        overlay,
        dry_run=dry_run,
        backing_dirs=backing_dir,
    )


def compact(
    image: options.Image,
    dry_run: options.DryRun = False,
    force: options.Force = None,
    format: options.Format = None,
    backing_dir: options.BackingDirs = None,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
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

    set_up_logging(verbose=verbose, debug=debug)
    working.run_plan(
        lambda: plan_compact(
            image, format=format, force=force or (), backing_dirs=backing_dir or ()
        ),
        image,
        dry_run=dry_run,
        backing_dirs=backing_dir,
    )
