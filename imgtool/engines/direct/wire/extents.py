"""Where the bytes of a file lie on the disks, as the worker has it and tells its parent."""

from __future__ import annotations

from typing import NamedTuple


class Extent(NamedTuple):
    """Bytes of a file, from `start` to `end` in it, that lie together on a disk, from `at` on."""

    start: int
    end: int
    disk: int
    at: int
