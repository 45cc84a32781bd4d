"""Guests that stay open for the whole run: a launch costs ten seconds and more."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import imgtool.opening
from imgtool.engines.fallback import FATAL_VARIABLE
from tests.support.commands import Result, run_here

# A command that is found only where the environment is on the PATH is not tested: all start
# `python -m imgtool` with the Python that runs the tests.
_INSTALLED = str(Path(sys.executable).parent)
os.environ["PATH"] = os.pathsep.join(
    folder for folder in os.environ["PATH"].split(os.pathsep) if folder != _INSTALLED
)

# Where records of work have what proves them; the user's own is left alone. Its name is not one
# that `imgtool cleanup` takes for a folder that was left behind.
_STATE = tempfile.TemporaryDirectory(prefix="state-of-imgtool-tests-")
os.environ["IMGTOOL_STATE_DIR"] = _STATE.name

# A worker that fails is a defect, which the appliance would hide; also of the commands that tests
# start as programs.
os.environ[FATAL_VARIABLE] = "1"


# Commands on whose images a guest may stay open for the next one
READING = frozenset(
    (
        *("cat", "copy-out", "df", "diff", "du", "filesystems", "find", "head", "info"),
        *("inspect", "ls", "partitions", "stat", "tail"),
    )
)


class OpenGuests:
    """Open guests by image and options; reading commands in one process share them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        # What a guest is read from ends with the thread that has opened it, and `df` has its own.
        self._opener = stack.enter_context(ThreadPoolExecutor(1))
        self._open: dict[tuple[Any, ...], Any] = {}
        self._really_open = imgtool.opening.open_guest

    @contextlib.contextmanager
    def shared(self, image: str | Path, **options: Any) -> Iterator[Any]:
        if options.get("engine") == "direct":  # it keeps the image from who would write to it
            with self._really_open(image, **options) as guest:
                yield guest
            return
        notice = options.pop("notice", None)
        if options.get("engine", "auto") == "auto":
            options["engine"] = "libguestfs"  # these tests are about the appliance
        key = (str(image), repr(sorted(options.items(), key=lambda item: item[0])))
        if key not in self._open:
            if len(self._open) >= 8:  # each appliance takes most of a gigabyte
                self._open.pop(next(iter(self._open)))[0].close()
            stack = contextlib.ExitStack()
            lines: list[str] = []
            opened = self._really_open(image, notice=lines.append, **options)
            guest = self._opener.submit(stack.enter_context, opened).result()
            self._stack.callback(stack.close)
            self._open[key] = (stack, guest, lines)
        _, guest, lines = self._open[key]
        try:
            yield guest
        finally:
            for line in lines if notice else ():
                notice(line)

    def forget(self, names: Iterable[str]) -> None:
        """Close the guests of these images: whoever writes to one may not find it in use."""
        known = set(names)
        for image, options in list(self._open):
            if image in known or any(name in options for name in known if name.startswith("/")):
                self._open.pop((image, options))[0].close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long form of a suite, which takes minutes, runs where it is asked for."""
    if "long" in str(config.option.markexpr):
        return
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with -m long"))


@pytest.fixture
def worker_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that have the direct engine's worker fail, and see what is made of it."""
    monkeypatch.delenv(FATAL_VARIABLE)


@pytest.fixture(scope="session")
def open_guests() -> Iterator[OpenGuests]:
    with contextlib.ExitStack() as stack:
        yield OpenGuests(stack)


@pytest.fixture
def imgtool_cli(open_guests, monkeypatch):
    """Run a command line in this process, on guests that are shared with other tests."""
    monkeypatch.setattr(imgtool.opening, "open_guest", open_guests.shared)

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        if arguments[0] not in READING:
            open_guests.forget(map(str, arguments))
        return run_here(*arguments, stdin=stdin)

    return run
