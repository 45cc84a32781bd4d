"""The parent's end of the memory that it shares with the worker: it only reads."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator

from imgtool.engines.direct.wire.frames import BadMessage
from imgtool.engines.direct.wire.ring import PLACE, SEALS, SIZE, SLOT


class Ring:
    """The parent's end, which only reads. `descriptor` is what the worker gets."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._view = memoryview(mmap.mmap(descriptor, SIZE, prot=mmap.PROT_READ))

    def lent(self, payload: bytes) -> memoryview:
        """The bytes that a frame tells of, good until the worker hears that they were taken."""
        if len(payload) != PLACE.size:
            raise BadMessage("no place in the shared memory")
        offset, length = PLACE.unpack(payload)
        if not 0 < length <= SLOT or offset + length > SIZE:
            raise BadMessage("a place outside of the shared memory")
        return self._view[offset : offset + length]


@contextlib.contextmanager
def ring() -> Iterator[Ring]:
    """A new ring, of a size that nobody can change."""
    descriptor = os.memfd_create("imgtool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, SIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        yield Ring(descriptor)
    finally:
        os.close(descriptor)
