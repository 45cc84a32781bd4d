"""What every error of imgtool can do, however it was made."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import imgtool
from imgtool.engines.libguestfs.guest.calls import CallFailed
from imgtool.errors import ExitStatus, ImgtoolError, Reason, RefusedError
from imgtool.guest.layout import Locked
from imgtool.host.process import ProgramFailed
from imgtool.image.chain.ends import Truncated, Unseen
from imgtool.inject.planner import LocatedStep, check, plan
from imgtool.mount.mechanisms.appliance import ApplianceFailed
from tests.support.inject_root import Root

# How those are made that do not take a message, a subject and a hint.
OWN_WAY: dict[type[ImgtoolError], Callable[[], ImgtoolError]] = {
    CallFailed: lambda: CallFailed("Input/output error", 5, b"/etc/hosts"),
    ProgramFailed: lambda: ProgramFailed(["qemu-img"], -9, "said\n"),
    ApplianceFailed: lambda: ApplianceFailed({"message": "gone", "hint": "wait", "status": 6}),
    Locked: lambda: Locked(["/dev/sda1"], ["/dev/sda2"]),
    Truncated: lambda: Truncated(Path("/x/disk.qcow2"), Unseen("cut", "cut off", "copy it", 2, 1)),
}


def every_type() -> list[type[ImgtoolError]]:
    """All types of errors in all modules of the package."""
    for module in pkgutil.walk_packages(imgtool.__path__, "imgtool."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type[ImgtoolError]) -> Iterator[type[ImgtoolError]]:
        yield kind
        for one in kind.__subclasses__():
            yield from below(one)

    found = {one for one in below(ImgtoolError) if one.__module__.startswith("imgtool.")}
    return sorted(found, key=lambda one: (one.__module__, one.__name__))


def made(kind: type[ImgtoolError]) -> ImgtoolError:
    if kind in OWN_WAY:
        return OWN_WAY[kind]()
    return kind("it failed", subject="disk.img", hint="mend it")


@pytest.mark.parametrize("kind", every_type(), ids=lambda kind: kind.__name__)
def test_error_takes_in_its_place_and_stays_what_it_is(kind):
    error = made(kind)
    before = {name: getattr(error, name) for name in vars(error) if name != "message"}
    message, subject, errno = error.message, error.subject, getattr(error, "errno", None)
    assert error.add_context("SPEC.yaml:3") is error
    assert error.message == f"SPEC.yaml:3: {message}"
    assert str(error) == error.message + ("" if subject is None else f" ({subject})")
    assert error.args[0] == error.message
    assert {name: getattr(error, name) for name in before} == before
    assert getattr(error, "errno", None) == errno
    assert type(error) is kind


def test_a_refusal_keeps_the_guard_that_it_names():
    error = RefusedError("in use", hint="stop it", reason=Reason.IN_USE).add_context("here")
    assert error.reason is Reason.IN_USE
    assert error.hint == "stop it; to do it all the same: --force in-use"
    assert error.status == ExitStatus.REFUSED


@pytest.mark.parametrize("kind", [CallFailed, ProgramFailed, ApplianceFailed])
def test_step_that_a_failing_guest_ends_has_failed_and_says_why(
    kind: type[ImgtoolError], tmp_path: Path
):
    class Failing:
        def check(self, variables: object) -> None:
            raise made(kind)

        def apply(self, site: object) -> bool:
            raise made(kind)

        def subject_in(self, variables: object) -> str:
            return "/etc/hosts"

    step = LocatedStep(Failing(), "SPEC.yaml:3")  # type: ignore[arg-type]
    (outcome,), _ = plan(Root(tmp_path), [step], {})  # type: ignore[arg-type]
    for error in (outcome.error, *check([step], {})):
        assert isinstance(error, kind) and type(error) is kind
        assert error.message == f"SPEC.yaml:3: {made(kind).message}"
