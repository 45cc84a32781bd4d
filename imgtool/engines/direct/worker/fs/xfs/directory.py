"""XFS directories: the names in the inode itself, and those in directory blocks.

Names are taken as the bytes they are. Hash and free-space indexes are not needed to list a
directory, so only the blocks with entries are read. Source: "XFS Algorithms & Data Structures",
and Linux 6.1, fs/xfs/libxfs/xfs_da_format.h and xfs_dir2_data.c (__xfs_dir3_data_check).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.fs.xfs.superblock import Superblock, checksum_holds

# Entries lie below this offset of the directory; the indexes above it.
ENTRIES_END = 32 << 30

_FILE_TYPES = 9


def inline_names(superblock: Superblock, number: int, fork: bytes) -> list[tuple[bytes, int]]:
    """The entries of a directory kept in its inode; `fork` is exactly its size."""
    damaged = ReadFailed(f"directory {number} is damaged")
    if len(fork) < 6:
        raise damaged
    count, wide = fork[0], fork[1]
    width = 8 if wide else 4
    extra = 1 if superblock.has_file_types else 0
    at = 2 + width
    found = []
    for _ in range(count):
        if at + 3 > len(fork):
            raise damaged
        length = fork[at]
        name = fork[at + 3 : at + 3 + length]
        end = at + 3 + length + extra + width
        if end > len(fork) or not _may_be_a_name(name) or name in (b".", b".."):
            raise damaged
        found.append((name, int.from_bytes(fork[end - width : end], "big")))
        at = end
    if at != len(fork):
        raise damaged
    return found


def block_names(
    superblock: Superblock, number: int, block: bytes, offset: int, single: bool
) -> Iterator[tuple[bytes, int]]:
    """The entries of one directory block without `.` and `..`.

    `offset` is where its first bytes lie in the volume; `single` says that it is the directory's
    only block, and ends in its index. The whole block is checked before anything is given.
    """
    damaged = ReadFailed(f"directory {number} is damaged")
    end = len(block)
    if superblock.version == 5:
        at = 64
        place, uuid, owner = struct.unpack_from(">Q8x16sQ", block, 8)
        if block[:4] != (b"XDB3" if single else b"XDD3"):
            raise damaged
        if place * 512 != offset or uuid != superblock.uuid or owner != number:
            raise damaged
        if not checksum_holds(block, 4):
            raise ReadFailed(f"directory {number} has a wrong checksum")
    else:
        at = 16
        if block[:4] != (b"XD2B" if single else b"XD2D"):
            raise damaged
    if single:
        leaves = int.from_bytes(block[-8:-4], "big")
        end -= 8 + leaves * 8
        if end < at:
            raise damaged
    extra = 3 if superblock.has_file_types else 2
    found = []
    while at < end:
        if at + 8 > end:
            raise damaged
        if block[at : at + 2] == b"\xff\xff":
            size = block[at + 2] << 8 | block[at + 3]
            if not size or size % 8:
                raise damaged
        else:
            length = block[at + 8] if at + 9 <= end else 0
            size = (9 + length + extra + 7) & ~7
            name = block[at + 9 : at + 9 + length]
            if extra == 3 and at + 9 + length < end and block[at + 9 + length] >= _FILE_TYPES:
                raise damaged
            if not _may_be_a_name(name):
                raise damaged
            if name not in (b".", b".."):
                found.append((name, int.from_bytes(block[at : at + 8], "big")))
        tag = block[at + size - 2 : at + size]
        if at + size > end or int.from_bytes(tag, "big") != at:
            raise damaged
        at += size
    return iter(found)


def _may_be_a_name(name: bytes) -> bool:
    return bool(name) and b"/" not in name and b"\0" not in name
