"""Taking steps in a guest: planned without an appliance where that can be, written in one go."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.errors import ImageError, ImgtoolError, NotReadDirectly, UsageError
from imgtool.guest.changes import Changes
from imgtool.guest.guest import Guest
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.step import Step, StepContext
from imgtool.inject.steps.system import Relabel

if TYPE_CHECKING:
    from imgtool.guest.writable import WritableGuest

log = logging.getLogger(__name__)

Opened = Callable[[], AbstractContextManager[Guest]]
OpenedToWrite = Callable[[], "AbstractContextManager[WritableGuest]"]


@dataclass(frozen=True)
class LocatedStep:
    """A step, and where it was asked for: `SPEC.yaml:LINE` or an option."""

    step: Step
    where: str


@dataclass(frozen=True)
class Outcome:
    """What became of one step, which is about `subject`: changed, unchanged or failed."""

    placed: LocatedStep
    subject: str
    status: str
    error: ImgtoolError | None = None


@dataclass(frozen=True)
class Result:
    """What became of all steps; `committed` if the guest has them."""

    outcomes: tuple[Outcome, ...]
    committed: bool

    @property
    def errors(self) -> list[ImgtoolError]:
        """What went wrong, in the order of the steps."""
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]


def check(steps: Sequence[LocatedStep], variables: Mapping[str, str]) -> list[ImgtoolError]:
    """What is wrong with the steps, as far as that can be told without a guest."""
    errors = []
    for placed in steps:
        try:
            placed.step.check(variables)
        except ImgtoolError as error:
            found = error
            if type(found) is ImgtoolError:  # what the spec names cannot be used: its own fault
                found = UsageError(error.message, subject=error.subject, hint=error.hint)
                found.__cause__ = error
            errors.append(found.add_context(placed.where))
    return errors


def image_variables(image: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of one image: `image` is its name without the ending."""
    return {"image": image.name.partition(".")[0], **variables}


def plan(
    guest: Guest, steps: Sequence[LocatedStep], variables: Mapping[str, str]
) -> tuple[tuple[Outcome, ...], Changes]:
    """Take the steps in a view of the guest: what became of each, and what is to be written.

    Raises `NotReadDirectly` where the engine, not the guest, is why a step could not be taken.
    """
    if guest.windows:
        raise ImgtoolError(
            "steps are for guests with Linux, and this is Windows",
            hint="'imgtool copy-in' puts files into it",
        )
    view = GuestOverlay(guest)
    site = StepContext(view, variables)
    outcomes, touched = [], []
    for placed in steps:
        view.touched = set()
        subject = placed.step.subject_in(variables)
        try:
            status = "changed" if placed.step.apply(site) else "unchanged"
            outcomes.append(Outcome(placed, subject, status))
        except NotReadDirectly:
            raise
        except ImgtoolError as error:
            outcomes.append(Outcome(placed, subject, "failed", error.add_context(placed.where)))
        touched.append(view.touched)
    changes = view.changes()
    # What a later step puts back has not changed: a file that is written and then added to.
    return tuple(
        dataclasses.replace(outcome, status="unchanged")
        if outcome.status == "changed" and not changes.touch(paths)
        else outcome
        for outcome, paths in zip(outcomes, touched, strict=True)
    ), changes


def inject(
    opened: Opened | None,
    opened_to_write: OpenedToWrite,
    steps: Sequence[LocatedStep],
    variables: Mapping[str, str],
    *,
    commits: bool = True,
    clones: bool = False,
) -> Result:
    """Take steps in a guest: all of them, or none.

    `opened` reads the guest without an appliance. Where that cannot be, from the beginning or in
    the middle of a step (`NotReadDirectly`), the steps are planned in the appliance. Where nothing
    is to be changed, or a step fails, none is started; but a clone (`clones`) is made also of a
    guest that is as it should be.
    """
    planned = None
    if opened is not None:
        try:
            with opened() as guest:
                planned = plan(guest, steps, variables)
        except NotReadDirectly as error:
            log.info("steps are planned in the appliance: %s", error.message)
        except ImageError:
            pass  # if it is the image's fault, it will be said again
    if planned is not None and (_failed(planned[0]) or not (planned[1] or clones)):
        return Result(planned[0], commits and not _failed(planned[0]))
    try:
        with opened_to_write() as guest_to_write:
            if planned is None:
                planned = plan(guest_to_write, steps, variables)
                if _failed(planned[0]) or not (planned[1] or clones):
                    raise _NothingToWrite
            mislabelled = guest_to_write.apply(planned[1])
    except _NothingToWrite:
        assert planned is not None
        return Result(planned[0], commits and not _failed(planned[0]))
    return Result(_with_labels(planned[0], mislabelled), commits)


class _NothingToWrite(Exception):
    """Ends a transaction without a commit."""


def _failed(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.status == "failed" for outcome in outcomes)


def _with_labels(outcomes: tuple[Outcome, ...], mislabelled: bool) -> tuple[Outcome, ...]:
    """The outcomes, once it is known whether relabelling changed something."""
    return tuple(
        dataclasses.replace(outcome, status="changed")
        if mislabelled and isinstance(outcome.placed.step, Relabel)
        else outcome
        for outcome in outcomes
    )
