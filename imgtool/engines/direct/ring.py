"""Memory that the worker and its parent share, for the bytes of large files: slots that the worker
fills, tells of, and fills again when the parent has said that it is done with them.

The worker may write into it whatever and whenever it likes: what is in there is the content of a
guest's file, no more. It can neither shrink nor grow, so that no page that the parent looks at can
go away.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

from imgtool.engines.direct.protocol import BadMessage
from imgtool.engines.direct.requests import Requests

SLOT = 2 << 20
_SLOTS = 8
_SIZE = SLOT * _SLOTS
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PLACE = struct.Struct(">II")


class Ring:
    """The parent's end, which only reads. `descriptor` is what the worker gets."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._view = memoryview(mmap.mmap(descriptor, _SIZE, prot=mmap.PROT_READ))

    def lent(self, payload: bytes) -> memoryview:
        """The bytes that a frame tells of, good until the worker hears that they were taken."""
        if len(payload) != _PLACE.size:
            raise BadMessage("no place in the shared memory")
        offset, length = _PLACE.unpack(payload)
        if not 0 < length <= SLOT or offset + length > _SIZE:
            raise BadMessage("a place outside of the shared memory")
        return self._view[offset : offset + length]


@contextlib.contextmanager
def ring() -> Iterator[Ring]:
    """A new ring, of a size that nobody can change."""
    descriptor = os.memfd_create("imgtool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, _SIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        yield Ring(descriptor)
    finally:
        os.close(descriptor)


class Slots:
    """The worker's end, which fills one slot after the other; where one begins is its name."""

    def __init__(self, descriptor: int, requests: Requests) -> None:
        self._requests = requests
        self._view = memoryview(mmap.mmap(descriptor, _SIZE))
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
        return _PLACE.pack(slot, length)

    def turn(self) -> int:
        """The next slot, whoever has it: for what the parent is not told of."""
        slot = self._used % _SLOTS * SLOT
        self._used += 1
        return slot

    def take(self, wait: bool = True) -> int | None:
        """The next slot; None if the parent has not done with it yet and nobody is to wait."""
        self._requests.heard()
        while self._used - self._requests.taken >= _SLOTS:
            if not wait:
                return None
            self._requests.heard(wait=True)
        return self.turn()
