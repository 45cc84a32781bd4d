"""The worker's end of the memory shared with its parent: it fills one slot after another."""

from __future__ import annotations

import mmap
import os

from imgtool.engines.direct.wire.ring import PLACE, SIZE, SLOT, SLOTS
from imgtool.engines.direct.worker.requests import Requests


class Slots:
    """The worker's end, which fills one slot after the other; where one begins is its name."""

    def __init__(self, descriptor: int, requests: Requests) -> None:
        self._requests = requests
        self._view = memoryview(mmap.mmap(descriptor, SIZE))
        os.close(descriptor)  # what is started later does not get it
        self._used = 0

    def again(self) -> None:
        """All slots are free: another request is answered."""
        self._used = 0

    def view(self, slot: int, length: int) -> memoryview:
        """The first bytes of a slot."""
        return self._view[slot : slot + length]

    def place(self, slot: int, length: int) -> bytes:
        """What the parent is told of them."""
        return PLACE.pack(slot, length)

    def next_slot(self) -> int:
        """The next slot, whoever has it: for what the parent is not told of."""
        slot = self._used % SLOTS * SLOT
        self._used += 1
        return slot

    def acquire(self, wait: bool = True) -> int | None:
        """The next slot; None if the parent has not done with it yet and nobody is to wait."""
        self._requests.poll_control()
        while self._used - self._requests.taken >= SLOTS:
            if not wait:
                return None
            self._requests.poll_control(wait=True)
        return self.next_slot()
