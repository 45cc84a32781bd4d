"""inject asks for a password on a terminal: the real command, on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool import open_guest
from imgtool.host.process import run
from imgtool.inject import crypt
from tests.support.guests import guest

pytestmark = pytest.mark.appliance

PASSWORD = "Zażółć 7"
ECHO = 3  # termios.tcgetattr: the local modes


class Terminal:
    """What a command that runs on a terminal shows, and what is typed."""

    def __init__(self, process: int, descriptor: int) -> None:
        self.process = process
        self.descriptor = descriptor
        self.shown = b""
        self._seen = 0

    def _more(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.descriptor], [], [], seconds)
        assert ready, f"nothing more was shown after: {self.shown.decode()}"
        chunk = b""
        with contextlib.suppress(OSError):  # the other end is closed
            chunk = os.read(self.descriptor, 4096)
        self.shown += chunk
        return bool(chunk)

    def wait_for(self, text: str) -> None:
        while (at := self.shown.find(text.encode(), self._seen)) < 0:
            assert self._more(60), f"it ended after: {self.shown.decode()}"
        self._seen = at + len(text.encode())

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.descriptor)[ECHO] & termios.ECHO)

    def type(self, text: str) -> None:
        """Once the terminal is not echoing any more, as somebody who reads the prompt would."""
        end = time.monotonic() + 10
        while self.echoes and time.monotonic() < end:
            time.sleep(0.01)
        assert not self.echoes
        os.write(self.descriptor, text.encode())

    def status(self) -> int:
        while self._more(180):
            pass
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def on_a_terminal(*words: str | Path) -> Iterator[Terminal]:
    """imgtool with these words."""
    process, descriptor = pty.fork()
    if process == 0:
        with contextlib.suppress(OSError):
            command = [sys.executable, "-m", "imgtool", *map(str, words)]
            os.execv(command[0], command)
        os._exit(127)
    try:
        yield Terminal(process, descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    copy = tmp_path / "web.raw"
    run(["cp", "--sparse=always", guest("plain"), copy])
    return copy


def test_a_password_is_asked_for_twice_and_not_shown(image: Path):
    with on_a_terminal("inject", image, "--password", "root:prompt") as terminal:
        terminal.wait_for("Password of root: ")
        terminal.type(f"{PASSWORD}\n")
        terminal.wait_for("Once more: ")
        terminal.type(f"{PASSWORD}\n")
        status = terminal.status()
    shown = terminal.shown.decode()
    assert status == 0, shown
    assert PASSWORD not in shown
    assert "changed" in shown
    with open_guest(image, engine="direct") as opened:
        shadow = opened.read_bytes("/etc/shadow").decode()
    (line,) = (line for line in shadow.splitlines() if line.startswith("root:"))
    assert crypt.verifies(PASSWORD.encode(), line.split(":")[1])


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (PASSWORD, "another", "the two are not the same (root)"),
        ("", "", "a password is one line of 1 to 511 bytes; this is not (root)"),
    ],
)
def test_password_typed_differently_or_not_changes_nothing(image, first, second, said):
    before = image.stat()
    with on_a_terminal("inject", image, "--password", "root:prompt") as terminal:
        terminal.wait_for("Password of root: ")
        terminal.type(f"{first}\n")
        terminal.wait_for("Once more: ")
        terminal.type(f"{second}\n")
        status = terminal.status()
    shown = terminal.shown.decode()
    assert status == 2
    assert said in " ".join(shown.split())
    assert "another" not in shown and PASSWORD not in shown
    after = image.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_ctrl_c_ends_the_prompt_and_gives_the_terminal_back(image: Path):
    with on_a_terminal("inject", image, "--password", "root:prompt") as terminal:
        terminal.wait_for("Password of root: ")
        terminal.type("\x03")
        assert terminal.status() == 130
        assert terminal.echoes
    assert "Traceback" not in terminal.shown.decode()
