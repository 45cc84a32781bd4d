"""The bytes of a disk, by the cheapest way: the file itself if it is raw, else QEMU over NBD."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from imgtool.image.chain.chain import Chain


@contextlib.contextmanager
def open_contents(
    chain: Chain, *, snapshot: str | None = None
) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """`read(offset, length)`, giving fewer bytes past the end, and the size of the disk in bytes.

    Raises what `serve` raises; reading is for as long as the `with` block lasts.
    """
    active = chain.active
    if active.format != "raw" or snapshot is not None:
        from imgtool.image.qemu.nbd import serve

        with serve(chain, snapshot=snapshot) as server:
            yield server.read, server.size
        return
    with chain.open_file(active.path) as file:
        descriptor = file.fileno()

        def read(offset: int, length: int) -> bytes:
            return os.pread(descriptor, max(length, 0), offset)

        yield read, file.seek(0, os.SEEK_END)
