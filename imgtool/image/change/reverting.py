"""A revert to an internal snapshot that was cut off: which of the two states is there, and which
one it is brought to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imgtool.image.chain.holdings import bitmaps_in
from imgtool.image.chain.info import probe
from imgtool.image.change.changes import present_is
from imgtool.image.change.mending import on_snapshots, repair_metadata
from imgtool.image.checks.dependants import overlays_on
from imgtool.image.intent.intent_log import Record
from imgtool.image.intent.marks import snapshots_of
from imgtool.text import printable, typed

Dirs = Sequence[str | Path]


def settle_revert(record: Record, *, finish: bool, backing_dirs: Dirs) -> str:
    """Finish or undo a revert where the present state is exactly the one before or the one after
    it; all else was written since, and stays."""
    image, saved, to = record.image, record.text("saved"), record.text("to")
    what = f"an interrupted revert of {printable(image)} was"
    step, temporary = record.facts.get("step"), bool(record.facts.get("temporary"))
    before, after = present_is(image, name=saved), present_is(image, id=to)
    there, applied = before is not None, step == "applied"
    if there:
        known = before or (after and step is not None)
    else:
        known = step is None or applied or (after and temporary)
    done = step is not None and (finish or not there)
    to_apply = done and there and not applied and not after
    to_undo = not done and there and not before
    if (
        not known
        or record.facts.get("others") != snapshots_of(image, but_for=saved)
        or (to_apply and overlays_on(image, backing_dirs))
        # A backup program used it; and QEMU reverts none that has some.
        or ((to_apply or to_undo) and bitmaps_in(probe(image, format="qcow2")))
    ):
        return _left(record, saved if there else None, to)
    repair_metadata(image, format="qcow2")
    if to_apply:
        on_snapshots(image, "-a", to)
    if to_undo:  # by its id: that is what QEMU looks for first
        rows = probe(image, format="qcow2").snapshots
        on_snapshots(image, "-a", next(row.id for row in rows if row.name == saved))
    if there and (temporary or not done):
        on_snapshots(image, "-d", saved)
    repair_metadata(image, format="qcow2")
    return f"{what} {'finished' if done else 'undone'}"


def _left(record: Record, saved: str | None, to: str) -> str:
    shown = printable(record.image)
    state = f"; the state before it is the snapshot '{printable(saved)}'" if saved else ""
    again = f"imgtool snapshot revert {typed(record.image)} {typed(Path(to))} --save-as NAME"
    return (
        f"{shown} was used since a revert of it was interrupted: it stays as it is{state}"
        f" (to go back all the same: {again})"
    )
