"""Who listens to the appliance's QEMU is not made deaf by those who come before it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from imgtool.engines.libguestfs.appliance.monitor import Watch

CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + sys.argv[1])"
EVENT = {"event": "BLOCK_IO_ERROR", "data": {"operation": "write", "reason": "No space left"}}


class Handle:
    """What a handle is told about QEMU."""

    name = ""

    def config(self, option: str, value: str) -> None:
        if option == "-chardev":
            self.name = value.partition("path=")[2].partition(",")[0]


@pytest.fixture
def watch() -> Iterator[tuple[Watch, str, threading.Event]]:
    stopped = threading.Event()
    handle = Handle()
    watch = Watch(handle, stopped.set)
    yield watch, handle.name, stopped
    watch.close()


def qemu(name: str) -> socket.socket:
    """QEMU, as far as it says that it cannot write."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(f"\0{name}")
    stream = connection.makefile("rw")

    def say(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    say({"QMP": {}})
    assert json.loads(stream.readline())["execute"] == "qmp_capabilities"
    say({"return": {}})
    say(EVENT)
    return connection


def test_silent_first_client_does_not_keep_qemu_out(watch):
    listens, name, stopped = watch
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(f"\0{name}")
        listens.start()
        with qemu(name):
            assert stopped.wait(10)
    assert listens.failed == "No space left"


def test_one_that_is_another_user_is_sent_away(watch):
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    listens, name, stopped = watch
    words = [sys.executable, "-c", f"{CONNECT}; sys.exit(s.recv(1) != b'')", name]
    listens.start()
    subprocess.run(words, user=65534, group=65534, check=True, timeout=20)
    with qemu(name):
        assert stopped.wait(10)
