"""What a VDI says of itself: its kind, what it stands on, and how many blocks it counts.

Layout: VDIHEADER1PLUS in VirtualBox's src/VBox/Storage/VDICore.h, and QEMU's block/vdi.c.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import BinaryIO

SIGNATURE = b"\x7f\x10\xda\xbe"
SIGNATURE_OFFSET = 64
DYNAMIC, STATIC = 1, 2
_SIZE = 512
_KIND_OFFSET = 0x4C
_COUNT_OFFSET = 0x184
_FREE = 0xFFFF_FFFE  # from here on: no block of the file
_PIECE = 1 << 20  # of the block map, read at once
_LARGEST_MAP = 64 << 20


@dataclass(frozen=True)
class Vdi:
    """Offsets and sizes in bytes. `counted` is how many blocks its header says are in use; `id` is
    the image's own, `parent_id` that of what it stands on, empty where it stands on none."""

    kind: int
    map_offset: int
    data_offset: int
    block_size: int
    blocks: int
    counted: int
    id: bytes
    parent_id: bytes

    @property
    def has_parent(self) -> bool:
        """Whether it holds what differs from another image."""
        return self.kind not in (DYNAMIC, STATIC) or bool(self.parent_id)


def read(file: BinaryIO) -> Vdi | None:
    """The header; None where this is no VDI."""
    file.seek(0)
    data = file.read(_SIZE)
    if len(data) < _SIZE or data[SIGNATURE_OFFSET : SIGNATURE_OFFSET + 4] != SIGNATURE:
        return None
    block_size, _, blocks, counted = struct.unpack_from("<IIII", data, 0x178)
    link, parent = data[0x1A8:0x1B8], data[0x1B8:0x1C8]
    return Vdi(
        kind=struct.unpack_from("<I", data, _KIND_OFFSET)[0],
        map_offset=struct.unpack_from("<I", data, 0x154)[0],
        data_offset=struct.unpack_from("<I", data, 0x158)[0],
        block_size=block_size,
        blocks=blocks,
        counted=counted,
        id=data[0x188:0x198],
        parent_id=link if any(link) else parent if any(parent) else b"",
    )


def _places(file: BinaryIO, image: Vdi) -> int:
    """How many places for blocks the map uses: one more than the last place in it."""
    length, last = min(image.blocks * 4, _LARGEST_MAP), -1
    file.seek(image.map_offset)
    for at in range(0, length, _PIECE):
        piece = file.read(min(_PIECE, length - at))
        entries = array("I", piece[: len(piece) // 4 * 4])
        if sys.byteorder == "big":
            entries.byteswap()
        last = max(last, max((entry for entry in entries if entry < _FREE), default=-1))
        if not piece:
            break
    return last + 1


def size_needed(file: BinaryIO, image: Vdi) -> int:
    """How long the file has to be, in bytes, to hold the last block that its map names."""
    places = _places(file, image)
    if not places:
        return image.map_offset + image.blocks * 4
    return image.data_offset + places * image.block_size


def counts_too_few(file: BinaryIO, image: Vdi) -> bool:
    """Whether the next block would be given a place that another one has: QEMU takes the one with
    the number of those that the header counts."""
    return image.kind == DYNAMIC and image.counted < _places(file, image)


def mend_count(file: BinaryIO) -> None:
    """Make the count of blocks in the header what the map has, as VirtualBox and QEMU expect.

    QEMU writes the count before the map: killed between the two, it would leave a gap in the file,
    and with them on the disk in the other order, give one place to two blocks.
    """
    image = read(file)
    if image is None or image.kind != DYNAMIC:
        return
    places = _places(file, image)
    if places != image.counted:
        file.seek(_COUNT_OFFSET)
        file.write(struct.pack("<I", places))
        file.flush()
        os.fsync(file.fileno())
