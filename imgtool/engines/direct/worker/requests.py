"""What the worker hears: requests, and two words while it answers one of them."""

from __future__ import annotations

import os
import select

from imgtool.engines.direct.wire import requests
from imgtool.engines.direct.wire.frames import RELEASE, STOP


class Stopped(Exception):
    """The parent does not want the rest of an answer."""


class Requests:
    """The worker's standard input. Nothing of it is read before its time, so that poll(2) tells
    whether there is more.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._asked = select.poll()
        self._asked.register(descriptor, select.POLLIN)
        self.taken = 0  # slots of the ring that the parent has done with in this answer

    def next(self) -> requests.Request | None:
        """The next request; None when there are no more. `BadMessage` for what is none."""
        while (word := self._exactly(4)) in (STOP, RELEASE):
            pass  # for an answer that had come to its end
        self.taken = 0
        body = self._exactly(int.from_bytes(word, "big")) if word else b""
        return requests.decode(body) if body else None

    def poll_control(self, *, wait: bool = False) -> None:
        """Take in what the parent says of the answer on its way; `Stopped` if it wants no more."""
        while self._asked.poll(None if wait else 0):
            if self._exactly(4) != RELEASE:
                raise Stopped
            self.taken += 1
            wait = False

    def _exactly(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self._descriptor, length)
            if not part:
                return b""
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
