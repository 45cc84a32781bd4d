"""XFS inodes and the extents of their data: the on-disk forms, checked as the kernel checks them.

Source: "XFS Algorithms & Data Structures", and Linux 6.1, fs/xfs/libxfs/xfs_format.h,
xfs_inode_buf.c (xfs_dinode_verify) and xfs_bmap_btree.c.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Node, ReadFailed
from imgtool.engines.direct.worker.fs.xfs.superblock import Superblock, checksum_holds

FORMAT_DEVICE, FORMAT_LOCAL, FORMAT_EXTENTS, FORMAT_BTREE = 0, 1, 2, 3

# What a file of half a million pieces needs in memory is about as much as the worker may have.
MOST_EXTENTS = 500_000

_CORE = struct.Struct(">2sHBBHIIIHH8s8s8s8sQQIIHBbIHHI")
_CORE_CRC = 100
_REALTIME, _FLAGS_KNOWN = 0x0001, 0x7FFF
_BIGTIME, _LARGE_COUNTERS, _FLAGS2_KNOWN = 0x08, 0x10, 0x1F
_BIGTIME_EPOCH = 1 << 31  # its nanoseconds count from 1901-12-13
_MAX_LEVELS = 9


class Extent(NamedTuple):
    """A piece of a file: `offset` and `blocks` in filesystem blocks, `start` in volume bytes."""

    offset: int
    blocks: int
    start: int
    unwritten: bool


class Inode(NamedTuple):
    """An inode: what lstat says of it, and where its data are."""

    node: Node
    format: int
    extent_count: int
    fork: bytes  # the data fork, as it lies in the inode
    attribute_format: int = FORMAT_EXTENTS
    attribute_extents: int = 0
    attribute_fork: bytes = b""


def parse_inode(superblock: Superblock, number: int, raw: bytes) -> Inode:
    """The inode in `raw`; `ReadFailed` where the kernel would call it corrupt."""
    (
        magic, mode, version, form, _onlink, uid, gid, nlink, _project, _project_high,
        large_count, _atime, mtime, _ctime, size, blocks, _extsize, extents,
        attribute_extents, fork_offset, attribute_form, _dmevents, _dmstate, flags, _generation,
    ) = _CORE.unpack_from(raw)  # fmt: skip
    damaged = ReadFailed(f"inode {number} is damaged")
    flags2 = 0
    if magic != b"IN":
        raise damaged
    if superblock.version == 5:
        own_number, flags2 = struct.unpack_from(">Q", raw, 152)[0], _flags2(raw)
        if version != 3 or own_number != number or raw[160:176] != superblock.uuid:
            raise damaged
        if not checksum_holds(raw, _CORE_CRC):
            raise ReadFailed(f"inode {number} has a wrong checksum")
    elif version == 1:
        raise Unsupported("XFS inodes of version 1")
    elif version != 2:
        raise damaged
    if not mode:
        raise ReadFailed(f"inode {number} is free, yet a directory names it")
    if flags & _REALTIME:
        raise Unsupported("XFS with files on a realtime device")
    if flags & ~_FLAGS_KNOWN or flags2 & ~_FLAGS2_KNOWN:
        raise Unsupported(f"inode {number} has unknown flags")
    if flags2 & _BIGTIME and not superblock.has_bigtime:
        raise damaged
    if bool(flags2 & _LARGE_COUNTERS) and not superblock.has_large_counters:
        raise damaged
    if flags2 & _LARGE_COUNTERS:
        attribute_extents, extents = extents, int.from_bytes(large_count, "big")

    start = 176 if version == 3 else 100
    room = superblock.inode_size - start
    if fork_offset * 8 > room:
        raise damaged
    fork = raw[start : start + (fork_offset * 8 or room)]
    attribute_fork = raw[start + fork_offset * 8 : start + room] if fork_offset else b""
    kind = stat.S_IFMT(mode)
    if form not in _FORMATS.get(kind, ()) or size >> 63 or extents + attribute_extents > blocks:
        raise damaged
    if attribute_form not in (FORMAT_LOCAL, FORMAT_EXTENTS, FORMAT_BTREE) and fork_offset:
        raise damaged
    if not size and kind in (stat.S_IFDIR, stat.S_IFLNK):
        raise damaged
    if form == FORMAT_LOCAL and size > len(fork):
        raise damaged
    if form == FORMAT_EXTENTS and extents * 16 > len(fork):
        raise damaged
    device = 0
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        packed = int.from_bytes(fork[:4], "big")
        device = os.makedev(packed >> 18 & 0x3FFF, packed & 0x3FFFF)
    node = Node(
        inode=number,
        mode=mode,
        uid=uid,
        gid=gid,
        size=size,
        mtime_ns=_nanoseconds(mtime, bool(flags2 & _BIGTIME), damaged),
        blocks=blocks * (superblock.block_size // 512),
        nlink=nlink,
        rdev=device,
    )
    if attribute_form == FORMAT_EXTENTS and attribute_extents * 16 > len(attribute_fork):
        raise damaged
    return Inode(node, form, extents, fork, attribute_form, attribute_extents, attribute_fork)


_FORMATS = {
    stat.S_IFREG: (FORMAT_EXTENTS, FORMAT_BTREE),
    stat.S_IFDIR: (FORMAT_LOCAL, FORMAT_EXTENTS, FORMAT_BTREE),
    stat.S_IFLNK: (FORMAT_LOCAL, FORMAT_EXTENTS),
    stat.S_IFCHR: (FORMAT_DEVICE,),
    stat.S_IFBLK: (FORMAT_DEVICE,),
    stat.S_IFIFO: (FORMAT_DEVICE,),
    stat.S_IFSOCK: (FORMAT_DEVICE,),
}


def _flags2(raw: bytes) -> int:
    return int.from_bytes(raw[120:128], "big")


def _nanoseconds(raw: bytes, bigtime: bool, damaged: ReadFailed) -> int:
    if bigtime:
        return int.from_bytes(raw, "big") - _BIGTIME_EPOCH * 1_000_000_000
    seconds, nanoseconds = struct.unpack(">iI", raw)
    if nanoseconds >= 1_000_000_000:
        raise damaged
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


class ExtentMap:
    """Reads the extents of one inode's data, whichever way they are kept.

    `read_block` gives a filesystem block of the volume by its byte offset.
    """

    def __init__(
        self, superblock: Superblock, inode: Inode, read_block: Callable[[int], bytes]
    ) -> None:
        self._superblock = superblock
        self._inode = inode
        self._read_block = read_block
        self._extents: list[Extent] = []
        self._damaged = ReadFailed(f"the extents of inode {inode.node.inode} are damaged")

    def extents(self) -> list[Extent]:
        """All of them, ascending; `ReadFailed` if they are not, or not as many as the inode has."""
        inode = self._inode
        if inode.extent_count > MOST_EXTENTS:
            raise Unsupported(f"a file in {inode.extent_count} pieces")
        if inode.format == FORMAT_EXTENTS:
            self._take(inode.fork, 0, inode.extent_count)
        elif inode.format == FORMAT_BTREE:
            level, count = struct.unpack_from(">HH", inode.fork)
            room = (len(inode.fork) - 4) // 16
            if not 0 < level <= _MAX_LEVELS or not 0 < count <= room:
                raise self._damaged
            self._descend(inode.fork, 4 + room * 8, count, level - 1)
        if len(self._extents) != inode.extent_count:
            raise self._damaged
        return self._extents

    def _descend(self, pointers: bytes, at: int, count: int, level: int) -> None:
        for (pointer,) in struct.iter_unpack(">Q", pointers[at : at + count * 8]):
            self._take_block(pointer, level)

    def _take_block(self, pointer: int, level: int) -> None:
        superblock = self._superblock
        offset = superblock.block_offset(pointer)
        if offset is None:
            raise self._damaged
        block = self._read_block(offset)
        magic, own_level, count = struct.unpack_from(">4sHH", block)
        header = 24
        if superblock.version == 5:
            header = 72
            place, uuid, owner = struct.unpack_from(">Q8x16sQ", block, 24)
            if magic != b"BMA3" or place * 512 != offset or uuid != superblock.uuid:
                raise self._damaged
            if owner != self._inode.node.inode or not checksum_holds(block, 64):
                raise self._damaged
        elif magic != b"BMAP":
            raise self._damaged
        room = (superblock.block_size - header) // 16
        if own_level != level or not 0 < count <= room:
            raise self._damaged
        if level:
            self._descend(block, header + room * 8, count, level - 1)
        else:
            self._take(block, header, count)

    def _take(self, records: bytes, at: int, count: int) -> None:
        # Records must ascend, so a tree that visits a block twice stops here.
        superblock, extents = self._superblock, self._extents
        if len(extents) + count > self._inode.extent_count:
            raise self._damaged
        end = extents[-1].offset + extents[-1].blocks if extents else 0
        for high, low in struct.iter_unpack(">QQ", records[at : at + count * 16]):
            offset, length = high >> 9 & ((1 << 54) - 1), low & 0x1FFFFF
            start = superblock.block_offset((high & 0x1FF) << 43 | low >> 21, length)
            if start is None or not length or offset < end:
                raise self._damaged
            end = offset + length
            extents.append(Extent(offset, length, start, bool(high >> 63)))
