"""Ctrl-C while a library call is under way.

Python runs signal handlers between its own instructions, so a call into libguestfs that takes a
minute would not notice Ctrl-C for a minute. `watch()` makes a thread hear of the signal at once
and run the callbacks that are registered at that moment (cancel this transfer, kill that launch);
the call then returns with an error, and `pending()` tells why.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_callbacks: list[Callable[[], None]] = []
_lock = threading.Lock()
_seen = threading.Event()
_holding = 0  # how many blocks of `whole` the main thread is in
_held_back = False

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def pending() -> bool:
    """Whether the user, or the system, asked imgtool to stop."""
    return _seen.is_set()


@contextlib.contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Run `callback`, in another thread, if an interrupt comes while the block runs."""
    with _lock:
        _callbacks.append(callback)
    try:
        if pending():
            callback()
        yield
    finally:
        with _lock:
            _callbacks.remove(callback)


@contextlib.contextmanager
def defer_interrupts(*, last: bool = False) -> Iterator[None]:
    """A short block that is not cut in two: an interrupt that comes in it is raised at its end.

    With the `last` one, all that was asked for is done: what comes in it comes too late, and is
    not raised. Where the block fails it is.
    """
    global _holding, _held_back
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts no other
        return
    _holding += 1
    done = False
    try:
        yield
        done = True
    finally:
        _holding -= 1
        if _held_back and not _holding:
            _held_back = False
            if not (last and done):
                raise KeyboardInterrupt


def _stop(signum: int, frame: FrameType | None) -> None:
    global _held_back
    if _holding:
        _held_back = True
    else:
        raise KeyboardInterrupt


def _listen(reading: socket.socket) -> None:
    while received := reading.recv(1):
        if received[0] in SIGNALS:
            _seen.set()
            with _lock:
                current = list(_callbacks)
            for callback in current:
                callback()


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Hear SIGINT, SIGTERM and SIGHUP while the block runs; each raises KeyboardInterrupt."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    previous = {number: signal.signal(number, _stop) for number in SIGNALS}
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reading,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in previous.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            os.write(writing.fileno(), b"\0")
        writing.close()
        thread.join(1)
        reading.close()
