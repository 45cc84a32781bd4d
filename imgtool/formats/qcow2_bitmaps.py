"""The dirty bitmaps of a qcow2 image, read without QEMU: by them backup programs know what has
been written since their last backup.

Layout: docs/interop/qcow2.txt in QEMU's sources, "Bitmaps extension".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from imgtool.formats.qcow2 import Qcow2Header

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_IN_USE, _AUTO = 1 << 0, 1 << 1
# QEMU's limits: block/qcow2-bitmap.c. It knows of no extra data.
_MOST = 65535
_LARGEST_DIRECTORY = 1024 * _MOST
_LONGEST_NAME, _LARGEST_SHIFT = 1023, 31


@dataclass(frozen=True)
class Bitmap:
    """A bitmap: its name as it stands there, and how many bytes of the disk one bit stands for.

    `auto`: it notes every write. `in_use`: whoever wrote last was killed, so it holds no more.
    """

    name: bytes
    granularity: int
    auto: bool
    in_use: bool


def count_bitmaps(header: Qcow2Header) -> int:
    """How many bitmaps the header says that there are, whether they can be read or not."""
    if header.bitmaps is None or len(header.bitmaps) < _EXTENSION.size:
        return 0
    return int(_EXTENSION.unpack_from(header.bitmaps)[0])


def read_bitmaps(file: BinaryIO, header: Qcow2Header) -> tuple[Bitmap, ...] | None:
    """The bitmaps in the directory's order; None where that is not as it should be."""
    if header.bitmaps is None:
        return ()
    if len(header.bitmaps) < _EXTENSION.size:
        return None
    count, reserved, size, offset = _EXTENSION.unpack_from(header.bitmaps)
    if reserved or not 0 < count <= _MOST or size > _LARGEST_DIRECTORY:
        return None
    if offset % header.cluster_size or offset >= 1 << 62:
        return None
    found = []
    at = 0
    for _ in range(count):
        file.seek(offset + at)
        fixed = file.read(_ENTRY.size)
        if len(fixed) < _ENTRY.size:
            return None
        _, _, flags, _, shift, name_length, extra = _ENTRY.unpack(fixed)
        end = at + _ENTRY.size + name_length
        if extra or name_length > _LONGEST_NAME or shift > _LARGEST_SHIFT or end > size:
            return None
        name = file.read(name_length)
        if len(name) < name_length:
            return None
        found.append(
            Bitmap(
                name=name,
                granularity=1 << shift,
                auto=bool(flags & _AUTO),
                in_use=bool(flags & _IN_USE),
            )
        )
        at = (end + 7) // 8 * 8
    return tuple(found) if at == size else None
