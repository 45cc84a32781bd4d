"""Extended attributes of ext2, ext3 and ext4: in the inode, in a block, in an inode of their own.

Sources: the kernel's Documentation/filesystems/ext4 (attributes); fs/ext4/xattr.c
(ext4_xattr_check_entries, ext4_xattr_block_csum, ext4_xattr_inode_get) and fs/ext4/acl.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from imgtool.engines.direct.worker.fs.base import MOST_XATTRS, ReadFailed
from imgtool.engines.direct.worker.fs.checksums import crc32c
from imgtool.engines.direct.worker.fs.ext.superblock import EA_INODE, Superblock
from imgtool.formats import xattrs
from imgtool.formats.xattrs import ACL_ACCESS, ACL_DEFAULT

_MAGIC = struct.pack("<I", 0xEA020000)
_ENTRY = struct.Struct("<BBHIII")
_HEADER = 32  # of a block
_LARGEST_VALUE = 65536  # more is not given by getxattr(2)
_PREFIXES = {1: b"user.", 4: b"trusted.", 6: b"security.", 10: b"gnu."}
_ACLS = {2: ACL_ACCESS, 3: ACL_DEFAULT}
_ACL_VERSION = 1
_WITHOUT_ID = {xattrs.USER_OBJ, xattrs.GROUP_OBJ, xattrs.MASK, xattrs.OTHER}
_WITH_ID = {xattrs.USER, xattrs.GROUP}
_DAMAGED = "its extended attributes are damaged"

# The value in an inode: its number, its size.
ValueReader = Callable[[int, int], bytes]


def in_inode(
    raw: bytes, superblock: Superblock, value_of: ValueReader
) -> list[tuple[bytes, bytes]]:
    """What lies behind the fields of an inode."""
    if len(raw) <= 128:
        return []
    extra = int.from_bytes(raw[128:130], "little")
    start = 128 + extra
    if not extra or raw[start : start + 4] != _MAGIC:
        return []
    return list(_entries(raw[start + 4 :], 0, superblock, value_of))


def in_block(
    block: bytes, number: int, superblock: Superblock, value_of: ValueReader
) -> list[tuple[bytes, bytes]]:
    """What lies in a block of its own, which several inodes may have."""
    magic, blocks, checksum = struct.unpack_from("<4s4xI4xI", block)
    if magic != _MAGIC or blocks != 1:
        raise ReadFailed(_DAMAGED)
    if superblock.has_checksums:
        found = crc32c(superblock.seed, struct.pack("<Q", number))
        if crc32c(found, block[:16] + bytes(4) + block[20:]) != checksum:
            raise ReadFailed("a block of extended attributes has a wrong checksum")
    return list(_entries(block, _HEADER, superblock, value_of))


def _entries(
    data: bytes, first: int, superblock: Superblock, value_of: ValueReader
) -> Iterator[tuple[bytes, bytes]]:
    """The attributes whose names begin at `first`; their values lie in `data`, after all names."""
    found, end = _names(data, first)
    given = 0
    for name, index, offset, inode, size in found:
        given += size
        if size > _LARGEST_VALUE:
            raise ReadFailed(_DAMAGED)
        if given > MOST_XATTRS:
            raise ReadFailed("its extended attributes are too large")
        if inode:
            if not superblock.incompat & EA_INODE:
                raise ReadFailed(_DAMAGED)
            value = value_of(inode, size)
        else:
            value = data[offset : offset + size]
            if len(value) != size or (size and offset < end):
                raise ReadFailed(_DAMAGED)
        if index in _PREFIXES and name:
            yield _PREFIXES[index] + name, value
        elif index in _ACLS and not name and (known := _acl(value)) is not None:
            yield _ACLS[index], known


def _names(data: bytes, at: int) -> tuple[list[tuple[bytes, int, int, int, int]], int]:
    """Of each entry its name, index, offset, inode and size; and where values may begin."""
    found = []
    while data[at : at + 4] != bytes(4):
        if at + _ENTRY.size > len(data):
            raise ReadFailed(_DAMAGED)
        name_length, index, offset, inode, size, _ = _ENTRY.unpack_from(data, at)
        name = data[at + _ENTRY.size : at + _ENTRY.size + name_length]
        at += _ENTRY.size + (name_length + 3 & ~3)
        if len(name) != name_length or b"\0" in name:
            raise ReadFailed(_DAMAGED)
        found.append((name, index, offset, inode, size))
    return found, at + 4


def _acl(value: bytes) -> bytes | None:
    """An ACL as getxattr(2) gives it; None for one without entries."""
    if len(value) < 4 or int.from_bytes(value[:4], "little") != _ACL_VERSION:
        raise ReadFailed("its ACL is damaged")
    entries = []
    at = 4
    while at < len(value):
        if at + 4 > len(value):
            raise ReadFailed("its ACL is damaged")
        tag, bits = struct.unpack_from("<HH", value, at)
        at += 4
        who = xattrs.UNDEFINED
        if tag in _WITH_ID:
            if at + 4 > len(value):
                raise ReadFailed("its ACL is damaged")
            who = int.from_bytes(value[at : at + 4], "little")
            at += 4
        elif tag not in _WITHOUT_ID:
            raise ReadFailed("its ACL is damaged")
        entries.append((tag, bits, who))
    return xattrs.acl(entries) if entries else None
