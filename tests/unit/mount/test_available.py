"""Whether a machine can mount: asked without changing it, or with its modules loaded."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from imgtool.cli.commands.mounting import Via
from imgtool.errors import HostError
from imgtool.mount.mechanisms import available
from imgtool.mount.mechanisms import mechanisms as module
from imgtool.mount.mechanisms.registry import AUTO, MECHANISMS, VIA, mechanisms


@pytest.fixture
def modprobe(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What modprobe is called with; it knows a module of the name `there` and no other."""
    called: list[list[str]] = []

    def run(argv: list[str], **options: object) -> None:
        called.append(argv)
        if argv[-1] != "there":
            raise HostError("no such module")

    monkeypatch.setattr(available, "run", run)
    return called


def test_what_is_there_is_not_looked_for(modprobe: list[list[str]]) -> None:
    for load in (True, False):
        assert available._no_module("there", "thing", lambda: True, load) is None
    assert modprobe == []


@pytest.mark.parametrize(
    ("module", "missing"), [("there", None), ("none", "the kernel has no thing (modprobe none)")]
)
def test_a_module_is_only_looked_for_unless_it_is_to_be_loaded(
    modprobe: list[list[str]], module: str, missing: str | None
) -> None:
    assert available._no_module(module, "thing", lambda: False, False) == missing
    assert all("--dry-run" in words for words in modprobe)


def test_a_module_that_was_loaded_has_to_show(modprobe: list[list[str]]) -> None:
    shown = iter([False, True])
    assert available._no_module("there", "thing", lambda: next(shown), True) is None
    assert available._no_module("there", "thing", lambda: False, True) is not None
    assert not any("--dry-run" in words for words in modprobe)


def test_a_missing_program_comes_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find", lambda program: None)
    said = available.no_program("qemu-storage-daemon")
    packages = "qemu-utils qemu-system-common"
    assert said == f"qemu-storage-daemon is not installed (sudo apt-get install {packages})"
    monkeypatch.setattr(available, "find", lambda program: str(Path("/usr/bin", program)))
    assert available.no_program("kpartx") is None


def test_each_mechanism_is_registered_and_says_what_it_needs() -> None:
    classes = {
        one
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, module.Mechanism) and hasattr(one, "needs")
    }
    registered = dict(mechanisms())
    assert set(registered.values()) == classes
    assert list(registered) == list(MECHANISMS)
    assert all(mechanism.needs for mechanism in classes)


def test_the_values_of_via_are_the_mechanisms() -> None:
    assert tuple(one.value for one in Via) == VIA == (AUTO, *MECHANISMS)
    for name in MECHANISMS:
        assert [found for found, _ in mechanisms(name)] == [name]


def test_first_missing_need_is_told_and_none_after_it_is_asked() -> None:
    asked: list[tuple[str, bool]] = []

    def need(name: str, reason: str | None) -> available.Need:
        def ask(*, load: bool) -> str | None:
            asked.append((name, load))
            return reason

        return ask

    class Probe(module.Mechanism):
        needs = (need("a", None), need("b", "no b"), need("c", "no c"))

    assert Probe.missing(load=False) == "no b"
    assert Probe.missing() == "no b"
    assert asked == [("a", False), ("b", False), ("a", True), ("b", True)]
