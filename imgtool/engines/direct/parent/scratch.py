"""Memory that a worker may fill up to a size, where it has no folder of a limited size."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

LIMIT = 256 << 20  # bytes; of the folder too, where there is one
_INTERVAL = 0.1  # seconds between two looks at its size


class Scratch:
    """A descriptor of memory, and whether there is more in it than there may be."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def is_overfull(self) -> bool:
        return os.fstat(self.descriptor).st_blocks * 512 > LIMIT

    @contextlib.contextmanager
    def limit(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Until the block ends a process is killed that puts too much into it.

        A thread looks, since the parent does not always wait for the worker: its own reader may
        not take the answers. No limit of the system fits: that of a file's size counts holes.
        """
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_INTERVAL):
                if self.is_overfull:
                    process.kill()
                    return

        thread = threading.Thread(target=watch, name="scratch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextlib.contextmanager
def scratch_memory() -> Iterator[Scratch]:
    """Such memory, until the block ends."""
    descriptor = os.memfd_create("imgtool", os.MFD_CLOEXEC)
    try:
        yield Scratch(descriptor)
    finally:
        os.close(descriptor)
