"""What `inject` did, as rows and lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.cli import render
from imgtool.errors import ImgtoolError

if TYPE_CHECKING:
    from imgtool.inject.planner import Outcome, Result

FIELDS = ("image", "step", "where", "kind", "subject", "status", "committed", "error")


def row(image: Path, number: int, outcome: Outcome, committed: bool) -> dict[str, object]:
    """The row of a step."""
    return {
        "image": str(image),
        "step": number,
        "where": outcome.placed.where,
        "kind": outcome.placed.step.kind,
        "subject": outcome.subject,
        "status": outcome.status,
        "committed": committed,
        "error": str(outcome.error) if outcome.error else None,
    }


def unopened_row(image: Path, error: ImgtoolError) -> dict[str, object]:
    """The row of an image in which no step could be tried."""
    known = {"image": str(image), "status": "failed", "committed": False, "error": str(error)}
    return {name: known.get(name) for name in FIELDS}


def say(image: Path, result: Result, *, dry_run: bool, is_clone: bool) -> None:
    """One line on stderr about what was done to an image."""
    steps = len(result.outcomes)
    changed = sum(outcome.status == "changed" for outcome in result.outcomes)
    if result.errors:
        line = "a step failed; nothing was written"
    elif dry_run:
        line = f"{changed} of {steps} steps would change it; nothing was written"
    elif not changed:
        line = "everything was so already; "
        line += "it is the same as its base" if is_clone else "nothing was written"
    else:
        line = f"{changed} of {steps} steps changed it"
    render.message("note", f"{line} ({image})")
    sys.stderr.flush()
