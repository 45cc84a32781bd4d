"""inject: which engine the steps are planned with, and when the appliance takes over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from imgtool.engines.direct.parent.client import WorkerFailed
from imgtool.engines.direct.wire.refusals import NoSandbox, NotInstalled, Unsupported
from imgtool.engines.fallback import FATAL_VARIABLE, ChosenGuest
from imgtool.errors import EngineError
from imgtool.guest.changes import Changes
from imgtool.guest.model import Entry, Layout
from imgtool.inject.planner import LocatedStep, Result, inject
from imgtool.inject.steps.files import AppendLine, MakeFolder
from tests.support.inject_root import Root

REFUSED = "/etc/hosts"
REFUSALS = (
    Unsupported("a file compressed in a way of its own"),
    NotInstalled("google-crc32c is missing"),
    NoSandbox("no second sandbox"),
    WorkerFailed("the worker died"),
)
STEPS = [
    LocatedStep(MakeFolder("/srv/new"), "SPEC.yaml:2"),
    LocatedStep(AppendLine(REFUSED, line="10.0.0.1 db"), "SPEC.yaml:3"),
    LocatedStep(MakeFolder("/srv/other"), "SPEC.yaml:4"),
]


class Direct(Root):
    """A guest as the direct engine reads it, which raises `error` for the content of one file."""

    engine = "direct"
    layout = Layout((), os_type="linux")

    def __init__(self, guest: Root, error: Exception | None, *, late: bool = False) -> None:
        self.folder, self.owners = guest.folder, guest.owners
        self.error, self.late = error, late

    def entries(self, path: str | bytes, **options: Any) -> Iterator[Entry]:
        return super().entries(path)

    @contextlib.contextmanager
    def open_range(
        self, path: str | bytes, offset: int, length: int
    ) -> Iterator[BinaryIO | _Breaking]:
        error = self.error if self.host(path) == self.host(REFUSED) else None
        with self.open(path) as stream:
            if error is not None and not self.late:
                raise error
            yield stream if error is None else _Breaking(error)


class _Breaking:
    """A stream that cannot be read to its end."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self, size: int) -> bytes:
        raise self.error


class Appliance(Root):
    """The same guest as the appliance has it: it is written to."""

    def apply(self, changes: Changes) -> bool:
        self.carry_out(changes)
        return False


class Case:
    """A guest that is injected into as with `--engine auto`."""

    def __init__(self, folder: Path) -> None:
        self.guest = Appliance(folder)
        self.launches = 0

    def inject(self, direct: Any) -> Result:
        @contextlib.contextmanager
        def engine() -> Iterator[Any]:
            if isinstance(direct, Exception):
                raise direct
            yield direct

        @contextlib.contextmanager
        def opened() -> Iterator[Any]:
            with contextlib.ExitStack() as stack:
                yield ChosenGuest(stack, engine, None, image="disk")

        @contextlib.contextmanager
        def opened_to_write() -> Iterator[Any]:
            self.launches += 1
            yield self.guest

        return inject(opened, opened_to_write, STEPS, {})

    def made(self) -> bool:
        """Whether everything that the steps ask for is there."""
        folders = all(self.guest.host(f"/srv/{name}").is_dir() for name in ("new", "other"))
        return folders and "10.0.0.1 db" in self.guest.text(REFUSED)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.delenv(FATAL_VARIABLE, raising=False)
    return Case(tmp_path / "root")


def test_what_is_read_directly_is_planned_so(case: Case) -> None:
    result = case.inject(Direct(case.guest, None))
    assert [outcome.status for outcome in result.outcomes] == ["changed"] * 3
    assert (case.launches, case.made()) == (1, True)


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "while it is read"])
def test_step_the_direct_engine_refuses_uses_the_appliance(
    case: Case, error: Exception, late: bool
) -> None:
    result = case.inject(Direct(case.guest, error, late=late))
    assert [str(found) for found in result.errors] == []
    assert [outcome.status for outcome in result.outcomes] == ["changed"] * 3
    assert (result.committed, case.launches, case.made()) == (True, 1, True)


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_guest_the_direct_engine_refuses_uses_the_appliance(case: Case, error: Exception) -> None:
    result = case.inject(error)
    assert (result.committed, case.launches, case.made()) == (True, 1, True)


def test_what_no_engine_could_read_is_a_step_that_failed(case: Case) -> None:
    """An error of the guest is no refusal: the appliance is not asked for the same once more."""
    result = case.inject(Direct(case.guest, EngineError("Input/output error", subject=REFUSED)))
    assert [outcome.status for outcome in result.outcomes] == ["changed", "failed", "changed"]
    (error,) = result.errors
    assert str(error) == f"SPEC.yaml:3: Input/output error ({REFUSED})"
    assert (result.committed, case.launches, case.made()) == (False, 0, False)
