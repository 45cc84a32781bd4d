"""What the commands that work on an image share: show the plan, do it, say how long it took."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.cli import render
from imgtool.cli.session import warning

if TYPE_CHECKING:
    from imgtool.cli.session import Common
    from imgtool.image.change.plan import OnStep, Plan


@contextlib.contextmanager
def _bar() -> Iterator[OnStep | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn

    columns = ("{task.description}", BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=1.0)
        yield lambda name, part: bars.update(task, description=name, completed=part)


def say_of_records(images: Iterable[Path]) -> None:
    """A line for each image beside which a record of interrupted work lies."""
    from imgtool.image.intent.intent_state import line_on

    for image in images:
        if line := line_on(image):
            warning(line)


def run_plan(
    make: Callable[[], Plan],
    *images: Path,
    common: Common,
    below: bool = True,
) -> None:
    """Make a plan, show it, and unless it is a dry run do it.

    Before, what was interrupted on `images` is finished or undone; with `below` also what was to
    be committed into their bases.
    """
    if not common.dry_run:
        from imgtool.image.change.recovery import recover

        for image in images:
            if line := recover(image, backing_dirs=common.backing_dirs, below=below):
                render.message("note", line)
    else:
        say_of_records(images)
    plan = make()
    for line in plan.doubts:
        warning(line)
    for line in plan.lines:
        render.message("would" if common.dry_run else "to do", line)
    if common.dry_run:
        return
    with _bar() as on_step:
        work = plan.run(on_step, warning)
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in work.seconds.items())
    render.message("done", took or "nothing was left to do")
