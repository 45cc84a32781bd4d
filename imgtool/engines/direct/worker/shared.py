"""Which files lie wholly in parts of the disks that another guest has in common with this one."""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Sequence

from imgtool.engines.direct.worker.tree import Found, Tree
from imgtool.engines.direct.worker.volumes import DiskRange, Volumes, on_disks

_RUN = struct.Struct("<4Q")


class Shared:
    """What of the disks is in common: all but the `written` stretches (start, end) of each disk,
    nothing of a disk for which they are None.
    """

    def __init__(
        self, volumes: Volumes, tree: Tree, written: Sequence[Sequence[Sequence[int]] | None]
    ) -> None:
        self._volumes = volumes
        self._tree = tree
        self._places: dict[int, tuple[DiskRange, ...]] = {}
        self._written = [
            None if row is None else ([start for start, _ in row], [end for _, end in row])
            for row in written
        ]

    def extent_digest(self, found: Found) -> str | None:
        """Stands for where a regular file's data are; None unless all of it is in common.

        Two files of one size and place in two guests have the same bytes.
        """
        filesystem = self._tree.filesystem(found.place)
        runs = filesystem.runs(found.place.inode)
        if runs is None:
            return None
        places = self._places.get(found.place.mount)
        if places is None:
            places = self._places[found.place.mount] = self._volumes.places(filesystem)
        digest = hashlib.sha256()
        for offset, at, length in runs:
            for disk, start, size in on_disks(places, at, length):
                if not self._in_common(disk, start, start + size):
                    return None
                digest.update(_RUN.pack(offset, disk, start, size))
                offset += size
                length -= size
            if length:
                return None  # it ends past the end of the volume: whoever reads it will say so
        return digest.hexdigest()

    def _in_common(self, disk: int, start: int, end: int) -> bool:
        written = self._written[disk]
        if written is None:
            return False
        starts, ends = written
        first = bisect_right(ends, start)
        return first == len(starts) or starts[first] >= end
