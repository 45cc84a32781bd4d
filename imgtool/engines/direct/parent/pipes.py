"""The pipes to the worker and from it, and how long the parent waits at them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time

from imgtool.engines.direct.wire.frames import BadMessage
from imgtool.errors import Interrupted
from imgtool.host import interrupt

_PIPE = 1 << 20
_TURN = 250  # milliseconds until Ctrl-C is looked for again
_LONGEST_TURN = 1.0  # seconds; what is more was spent stopped by Ctrl-Z, and is nobody's fault


class Pipes:
    """Both pipes, neither of which blocks: every turn at them ends with Ctrl-C, and with the time
    that was allowed, however busily the worker writes.
    """

    def __init__(self, requests: int, answers: int) -> None:
        self._requests = requests
        self._answers = answers
        os.set_blocking(requests, False)
        os.set_blocking(answers, False)
        # Fewer, larger parts; a system that allows no more than it gave is slower, not wrong.
        with contextlib.suppress(OSError):
            fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, _PIPE)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(answers, select.POLLIN)
        self._writable.register(requests, select.POLLOUT)
        self._allowed = self._left = 0.0
        self._turned = 0.0

    def allow(self, seconds: float) -> None:
        """What is read and written from now on has to be done in this time."""
        self._allowed = self._left = seconds
        self._turned = time.monotonic()

    def spent(self) -> float:
        """How much of the time that was allowed is over."""
        now = time.monotonic()
        self._left -= min(now - self._turned, _LONGEST_TURN)
        self._turned = now
        return self._allowed - self._left

    def _go_on(self) -> None:
        if interrupt.pending():
            raise Interrupted("interrupted")
        if self.spent() > self._allowed:
            raise TimeoutError

    def read(self, length: int) -> bytes:
        """Exactly `length` bytes, or fewer at the end; `TimeoutError` when the time is over."""
        found = bytearray(length)
        view = memoryview(found)
        done = 0
        while done < length:
            self._go_on()
            try:
                count = os.readv(self._answers, [view[done:]])
            except BlockingIOError:
                self._readable.poll(_TURN)
                continue
            if not count:
                break
            done += count
        view.release()
        del found[done:]
        return found  # type: ignore[return-value]  # as good as bytes, and not copied

    def write(self, data: bytes) -> None:
        """All of `data`; `TimeoutError` when the time is over."""
        view = memoryview(data)
        while view:
            self._go_on()
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                self._writable.poll(_TURN)

    def offer(self, word: bytes) -> bool:
        """Write a word at once; False if there is no room for it."""
        if not self._writable.poll(0):
            return False
        return os.write(self._requests, word) == len(word)  # a pipe takes all of a word, or nothing


class TimeBudget:
    """How long the worker may be waited for in all its answers together.

    The time is used up while the parent waits, and earned by what arrives: an honest worker on a
    slow disk earns more than it uses, one that only keeps the parent waiting does not. `least` is
    how many bytes earn a second, `answer` how many seconds a whole answer earns; never is more in
    stock than there was at the `start`. `most`, if given, is the end of all waiting.
    """

    def __init__(
        self, start: float, *, least: float, answer: float, most: float | None = None
    ) -> None:
        self._start = self._left = start
        self._least = least
        self._answer = answer
        self._most = most

    def spend(self, seconds: float) -> None:
        """The parent has waited; `BadMessage` if it waited too much."""
        self._left -= seconds
        if self._most is not None:
            self._most -= seconds
        if self._left < 0 or (self._most is not None and self._most < 0):
            raise BadMessage("it does not come to an end")

    def credit(self, length: int) -> None:
        """So many bytes of an answer are here."""
        self._left = min(self._left + length / self._least, self._start)

    def credit_answer(self) -> None:
        """An answer is complete."""
        self._left = min(self._left + self._answer, self._start)
