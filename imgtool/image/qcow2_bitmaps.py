"""The dirty bitmaps of a qcow2 image, read without QEMU: by them backup programs know what has
been written since their last backup.

Layout: docs/interop/qcow2.txt in QEMU's sources, "Bitmaps extension".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from imgtool.image.qcow2 import Qcow2Header

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_IN_USE, _AUTO = 1 << 0, 1 << 1
# QEMU's limits.
_MOST, _MOST_EXTRA, _LARGEST_DIRECTORY = 65535, 0, 65535 * 1024


@dataclass(frozen=True)
class Bitmap:
    """A bitmap: its name as it stands there, and how many bytes of the disk one bit stands for.

    `auto`: it notes every write. `in_use`: whoever wrote last was killed, so it holds no more.
    """

    name: bytes
    granularity: int
    auto: bool
    in_use: bool


def read_bitmaps(file: BinaryIO, header: Qcow2Header) -> tuple[Bitmap, ...] | None:
    """The bitmaps in the directory's order; None where that is not as it should be."""
    if header.bitmaps is None:
        return ()
    if len(header.bitmaps) < _EXTENSION.size:
        return None
    count, _, size, offset = _EXTENSION.unpack_from(header.bitmaps)
    if count > _MOST or size > _LARGEST_DIRECTORY or offset >= 1 << 62:
        return None
    file.seek(offset)
    directory = file.read(size)
    found = []
    at = 0
    for _ in range(count):
        if len(directory) < at + _ENTRY.size:
            return None
        _, _, flags, _, shift, name_length, extra = _ENTRY.unpack_from(directory, at)
        start = at + _ENTRY.size + extra
        name = directory[start : start + name_length]
        if extra > _MOST_EXTRA or len(name) < name_length or shift > 31:
            return None
        found.append(
            Bitmap(
                name=name,
                granularity=1 << shift,
                auto=bool(flags & _AUTO),
                in_use=bool(flags & _IN_USE),
            )
        )
        at = (start + name_length + 7) // 8 * 8
    return tuple(found)
