"""Whether a machine can mount: asked without changing it, or with its modules loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgtool.errors import HostError
from imgtool.mount.mechanisms import available


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
    assert said == "qemu-storage-daemon is not installed (sudo apt-get install qemu-system-common)"
    monkeypatch.setattr(available, "find", lambda program: str(Path("/usr/bin", program)))
    assert available.no_program("kpartx") is None
