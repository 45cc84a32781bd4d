"""Blocks of directories of ext2, ext3 and ext4.

Sources: the kernel's Documentation/filesystems/ext4 (directory); fs/ext4/dir.c
(ext4_check_dir_entry) and fs/ext4/namei.c (directory checksums).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.fs.checksums import crc32c

_ENTRY = struct.Struct("<IHB")
_DAMAGED = "a directory entry is damaged"


def entries(block: bytes, inodes: int) -> Iterator[tuple[bytes, int]]:
    """Names and inodes, of which there are `inodes`; `ReadFailed` after those that are sound."""
    size = len(block)
    damage: ReadFailed | None = None
    at = 0
    while at < size:
        if size - at < 8:
            raise ReadFailed(_DAMAGED)
        child, length, name_length = _ENTRY.unpack_from(block, at)
        end = at + length
        if length < 8 or length & 3 or end > size:
            raise ReadFailed(_DAMAGED)  # where is the next one?
        name = block[at + 8 : at + 8 + name_length]
        at = end
        if (
            length < max(12, name_length + 8)
            or size - 12 < end < size
            or child > inodes
            or (child and (not name or b"/" in name or b"\0" in name))
        ):
            damage = ReadFailed(_DAMAGED)
        elif child and name not in (b".", b".."):
            yield name, child
    if damage is not None:
        raise damage


def is_sound(block: bytes, seed: int, indexed: bool, position: int) -> bool:
    """Whether the checksum of a block is right; `position` is its number in the directory."""
    size = len(block)
    at = 0
    if indexed:
        if struct.unpack_from("<IHB", block) == (0, size, 0):
            at = 8
        elif position == 0 and struct.unpack_from("<HB", block, 16) == (size - 12, 2):
            at = 32
    if not at:
        tail = struct.unpack_from("<IHBB", block, size - 12) == (0, 12, 0, 0xDE)
        return tail and crc32c(seed, block[:-12]) == int.from_bytes(block[-4:], "little")
    limit, count = struct.unpack_from("<HH", block, at)
    tail_at = at + 8 * limit
    if count > limit or tail_at + 8 > size:
        return False
    found = crc32c(seed, block[: at + 8 * count] + block[tail_at : tail_at + 4] + bytes(4))
    return found == int.from_bytes(block[tail_at + 4 : tail_at + 8], "little")
