"""A libguestfs transfer as a Python stream: the call runs in a thread and fills a pipe."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

from imgtool.errors import EngineError


@contextlib.contextmanager
def open_stream(call: Callable[[str], None], cancel: Callable[[], None]) -> Iterator[BinaryIO]:
    """What `call` writes to the file name that it is given, as a stream to read.

    An error of the call is raised when the stream has been read to its end. Leaving the block early
    calls `cancel` and waits for the call to return.
    """
    reading, writing = os.pipe()
    errors: list[EngineError] = []

    def transfer() -> None:
        try:
            call(f"/dev/fd/{writing}")
        except EngineError as error:
            errors.append(error)
        finally:
            os.close(writing)

    thread = threading.Thread(target=transfer, daemon=True)
    with open(reading, "rb", buffering=1 << 20) as stream:  # noqa: PTH123 - a descriptor
        thread.start()
        finished = False
        try:
            yield stream
            finished = not stream.read(1)
        finally:
            if not finished:
                cancel()
                while stream.read(1 << 20):
                    pass
            thread.join()
    if finished and errors:
        raise errors[0]


def upload(call: Callable[[str], None], produce: Callable[[BinaryIO], None]) -> None:
    """Run `call` on a file name whose content `produce` writes.

    What `produce` raises comes before the call's own error, which only follows from it; a broken
    pipe in `produce` is the other way round.
    """
    reading, writing = os.pipe()
    failures: list[BaseException] = []

    def fill() -> None:
        try:
            with open(writing, "wb", buffering=1 << 20) as stream:  # noqa: PTH123
                produce(stream)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, below
            failures.append(error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    refused: EngineError | None = None
    try:
        call(f"/dev/fd/{reading}")
    except EngineError as error:
        refused = error
    finally:
        os.close(reading)
        thread.join()
    for failure in failures:
        if refused is None or not isinstance(failure, BrokenPipeError):
            raise failure from refused
    if refused is not None:
        raise refused
