"""Which further files a VMDK makes QEMU open, its extents, and which one it stands on.

Layout: "Virtual Disk Format 5.0" by VMware; which lines count is QEMU's block/vmdk.c. Where QEMU
reads a line loosely, this reads it more loosely: naming a file too many is harmless here.
"""

from __future__ import annotations

import os
import re
import struct
from typing import BinaryIO

SPARSE_MAGIC = b"KDMV"
_DESCRIPTOR_LIMIT = 1 << 20
_PARENT_LIMIT = 64 << 10  # QEMU reads 10 KiB
_PARENT = re.compile(rb'^\s*parentFileNameHint\s*=\s*"([^\n\r"]+)"', re.MULTILINE)
_EXTENT = re.compile(rb'(?:FLAT|SPARSE|VMFS|ZERO)\s*"([^\n\r"]+)')


def _embedded_descriptor(start: bytes) -> int | None:
    """Where a sparse extent without a capacity of its own keeps the descriptor used instead."""
    if not start.startswith(SPARSE_MAGIC) or len(start) < 36:
        return None
    capacity, _, descriptor_sector = struct.unpack_from("<QQQ", start, 12)
    return descriptor_sector * 512 if capacity == 0 and descriptor_sector else None


def looks_like_descriptor(start: bytes) -> bool:
    """Whether QEMU may take a file with these first bytes as a VMDK descriptor."""
    return start[:1] in (b"#", b" ", b"v") and b"version=" in start


def has_descriptor_inside(file: BinaryIO) -> bool:
    """Whether an extent would make QEMU read a further descriptor out of it."""
    file.seek(0)
    return _embedded_descriptor(file.read(512)) is not None


def extent_names(file: BinaryIO) -> tuple[bytes, ...]:
    """The names, as written, of the files that hold the data; none if this file holds it itself."""
    file.seek(0)
    start = file.read(512)
    at = 0
    if start.startswith((SPARSE_MAGIC, b"COWD")):
        embedded = _embedded_descriptor(start)
        if embedded is None or embedded >= 1 << 63:
            return ()
        at = embedded
    file.seek(at)
    return tuple(dict.fromkeys(_EXTENT.findall(file.read(_DESCRIPTOR_LIMIT))))


def parent_name(file: BinaryIO) -> str | None:
    """The name, as written, of the file that this one stands on; None if there is none."""
    file.seek(0)
    start = file.read(512)
    at, length = 0, _PARENT_LIMIT
    if start.startswith(SPARSE_MAGIC):
        if len(start) < 44:
            return None
        sector, sectors = struct.unpack_from("<QQ", start, 28)
        at, length = sector * 512, min(sectors * 512, length)
        if not sector or not sectors or at >= 1 << 62:
            return None
    elif not looks_like_descriptor(start):
        return None
    file.seek(at)
    found = _PARENT.search(file.read(length))
    return os.fsdecode(found[1]) if found else None
