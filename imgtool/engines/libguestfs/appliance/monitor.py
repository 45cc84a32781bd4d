"""QEMU's machine protocol (QMP): what QEMU is told and what it tells beside libguestfs.

Where the host has no room left for what the guest's kernel writes, QEMU stops the virtual machine
until somebody makes room, and libguestfs waits for ever; where the host's disk fails, only the
kernel in the appliance hears of it, and forgets. `Watch` hears of both.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from typing import IO, Any

from imgtool.errors import HostError

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("iII")  # struct ucred: PID, UID, GID


class Monitor:
    """QMP over two streams. Source: QEMU's docs/interop/qmp-spec."""

    def __init__(self, to_qemu: IO[bytes], from_qemu: IO[bytes]) -> None:
        self._to, self._from = to_qemu, from_qemu
        self.message()  # the greeting
        self.do("qmp_capabilities")

    def do(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """What QEMU answers. Raises `HostError` for an error, `EOFError` when QEMU is gone."""
        words = json.dumps({"execute": command, "arguments": arguments or {}})
        with contextlib.suppress(BrokenPipeError):  # there is no answer either
            self._to.write(words.encode() + b"\n")
            self._to.flush()
        while "return" not in (answer := self.message()):
            if "error" in answer:
                reason = _mapping(answer["error"]).get("desc")
                raise HostError(f"QEMU refuses {command}: {reason}")
        return answer["return"]

    def message(self) -> dict[str, object]:
        """The next answer or event. Raises `EOFError` when QEMU is gone."""
        line = self._from.readline()
        if not line:
            raise EOFError
        return dict(json.loads(line))


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


class Watch:
    """Hears of writes that fail, of one appliance, and stops it then.

    `failed` is why, in the words of the host's system; None as long as all is well.
    """

    def __init__(self, handle: Any, stop: Callable[[], None]) -> None:
        self.failed: str | None = None
        self._stop = stop
        # QEMU connects to a name that no file has: nothing is left behind, whoever is killed.
        self._listening = socket.socket(socket.AF_UNIX)
        name = f"imgtool-{secrets.token_hex(16)}"
        self._listening.bind(f"\0{name}")
        self._listening.listen(16)
        handle.config("-chardev", f"socket,id=imgtool,path={name},abstract=on")
        handle.config("-mon", "chardev=imgtool,mode=control")

    def start(self) -> None:
        """Listen until the appliance has gone."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes up who waits for it
        self._listening.close()

    def _accept(self) -> None:
        # Everybody on the host can see the name and come before QEMU: nobody may keep it out.
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        with (
            contextlib.suppress(OSError, EOFError, ValueError, HostError),
            connection,
            connection.makefile("rb") as heard,
            connection.makefile("wb") as told,
        ):
            facts = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(facts)[1] != os.geteuid():
                return
            monitor = Monitor(told, heard)
            while True:
                self._event(monitor.message())

    def _event(self, event: dict[str, object]) -> None:
        data = _mapping(event.get("data"))
        if event.get("event") == "BLOCK_IO_ERROR" and data.get("operation") == "write":
            if self.failed is None:
                self.failed = str(data.get("reason") or "input/output error")
                log.info("appliance: a write failed: %s", self.failed)
            self._stop()
