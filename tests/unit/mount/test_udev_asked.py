"""udev that is busy: what it did not answer is asked again, and no error for ever."""

from __future__ import annotations

import pytest

from imgtool.host.process import ProgramFailed, TimedOut
from imgtool.mount.steps import udev


@pytest.mark.parametrize(("failures", "asked"), [(0, 1), (1, 2), (9, 3)])
def test_a_closed_connection_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, failures: int, asked: int
) -> None:
    calls = []

    def run(words: list[str], **_: object) -> None:
        calls.append(words)
        if len(calls) <= failures:
            raise ProgramFailed(words, 1, "Failed to wait for daemon to reply: Broken pipe")

    monkeypatch.setattr(udev, "run", run)
    monkeypatch.setattr(udev, "running", lambda: True)
    udev.settle()
    assert calls == [["udevadm", "settle", "--timeout=10"]] * asked


def test_an_udev_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(words: list[str], **_: object) -> None:
        calls.append(words)
        raise TimedOut("udevadm took longer than 60 s and was stopped")

    monkeypatch.setattr(udev, "run", run)
    monkeypatch.setattr(udev, "running", lambda: True)
    udev.settle()
    assert len(calls) == 1
