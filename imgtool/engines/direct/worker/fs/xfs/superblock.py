"""The XFS superblock: what is on the allow-list, and what statfs says.

Sources: "XFS Algorithms & Data Structures" (the on-disk format), and Linux 6.1, fs/xfs/xfs_super.c
(statfs) and fs/xfs/libxfs/xfs_sb.c (what the kernel refuses).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Source, Usage
from imgtool.engines.direct.worker.fs.checksums import standard_crc32c

_LAYOUT = struct.Struct(">4sIQQQ16sQQQQIIIIIHHHH12s8BQQQQQQHBBIIIBBHIIIIIIIIIQQ16s")
_CRC_OFFSET = 224

_VERSION_ATTR, _VERSION_NLINK = 0x0010, 0x0020
_VERSION_ALIGN, _VERSION_DALIGN, _VERSION_LOGV2 = 0x0080, 0x0100, 0x0400
_VERSION_SECTOR, _VERSION_EXTFLG, _VERSION_DIRV2 = 0x0800, 0x1000, 0x2000
_VERSION_MOREBITS = 0x8000
_VERSION_NEEDED = (
    _VERSION_NLINK | _VERSION_LOGV2 | _VERSION_EXTFLG | _VERSION_DIRV2 | _VERSION_MOREBITS
)
_VERSION_KNOWN = (
    _VERSION_NEEDED | _VERSION_ATTR | _VERSION_ALIGN | _VERSION_DALIGN | _VERSION_SECTOR
)

_LAZY_COUNTERS, _ATTR2, _PROJECT32, _CRC, _V4_FTYPE = 0x02, 0x08, 0x80, 0x100, 0x200
_FEATURES2_V4 = _LAZY_COUNTERS | _ATTR2 | _PROJECT32 | _V4_FTYPE
_FEATURES2_V5 = _FEATURES2_V4 | _CRC

_RO_COMPAT_KNOWN = 0x1 | 0x2 | 0x4 | 0x8  # finobt, rmapbt, reflink, inobtcount
_FTYPE, _SPARSE_INODES, _META_UUID, _BIGTIME, _NREXT64 = 0x1, 0x2, 0x4, 0x8, 0x20
_INCOMPAT_KNOWN = _FTYPE | _SPARSE_INODES | _META_UUID | _BIGTIME | _NREXT64
_INCOMPAT_NAMES = {
    0x10: "it needs repair",
    0x40: "exchange-range",
    0x80: "parent pointers",
    0x100: "a metadata directory",
    0x200: "zones",
    0x400: "zone gaps",
}

_MAX_INODE_NUMBER = (1 << 56) - 1
_SET_ASIDE_BLOCKS = 8  # of every allocation group: four for its free list, four for the B-trees


class Superblock(NamedTuple):
    """What the reader needs to know; sizes in bytes unless they say blocks."""

    version: int
    block_size: int
    blocks: int
    log_start: int
    log_blocks: int
    root: int
    group_blocks: int
    groups: int
    sector_size: int
    inode_size: int
    inodes_per_block: int
    inodes_per_block_log: int
    group_blocks_log: int
    directory_block_size: int
    has_file_types: bool
    has_bigtime: bool
    has_large_counters: bool
    uuid: bytes  # as metadata blocks carry it
    inode_percent: int
    inodes: int
    free_inodes: int
    free_blocks: int

    def block_offset(self, block: int, count: int = 1) -> int | None:
        """Where a filesystem block lies in the volume; None if it is none, or `count` do not fit
        in its allocation group."""
        group, within = block >> self.group_blocks_log, block & ((1 << self.group_blocks_log) - 1)
        if group >= self.groups:
            return None
        first = group * self.group_blocks
        if within + count > min(self.group_blocks, self.blocks - first):
            return None
        return (first + within) * self.block_size

    def inode_offset(self, inode: int) -> int | None:
        """Where an inode lies in the volume; None if there can be no such inode."""
        block = self.block_offset(inode >> self.inodes_per_block_log)
        if block is None:
            return None
        return block + (inode & (self.inodes_per_block - 1)) * self.inode_size

    def usage(self) -> Usage:
        """What statvfs says of it mounted read-only (xfs_fs_statfs)."""
        if self.free_inodes > self.inodes or self.free_blocks > self.blocks:
            raise Unsupported("the XFS superblock's counters contradict each other")
        blocks = self.blocks - self.log_blocks
        free = max(self.free_blocks - self.groups * _SET_ASIDE_BLOCKS, 0)
        possible = min(self.inodes + (free << self.inodes_per_block_log), _MAX_INODE_NUMBER)
        if self.inode_percent:
            possible = min(possible, self._inode_limit())
        possible = max(possible, self.inodes)
        return Usage(
            size=blocks * self.block_size,
            used=(blocks - free) * self.block_size,
            available=free * self.block_size,
            inodes=possible,
            inodes_used=self.inodes - self.free_inodes,
        )

    def _inode_limit(self) -> int:
        """Inodes that the percentage allows, in whole allocations of 64."""
        allocation = max(64, self.inodes_per_block) >> self.inodes_per_block_log
        blocks = self.blocks * self.inode_percent // 100 // allocation * allocation
        return blocks << self.inodes_per_block_log


def checksum_holds(data: bytes, offset: int) -> bool:
    """Whether the CRC-32C in `data` at `offset` is that of `data` with the field zeroed."""
    stored = int.from_bytes(data[offset : offset + 4], "little")
    return standard_crc32c(data[:offset] + bytes(4) + data[offset + 4 :]) == stored


def read_superblock(source: Source) -> Superblock:
    """The superblock, if every feature is on the allow-list."""
    if source.size < 1 << 20:
        raise Unsupported("the volume is too small for XFS")
    raw = source.read(0, 4096)
    (
        magic, block_size, blocks, realtime_blocks, realtime_extents, uuid, log_start, root,
        _rbm, _rsum, _rextsize, group_blocks, groups, _rbmblocks, log_blocks, versionnum,
        sector_size, inode_size, inodes_per_block, _label, block_log, sector_log, inode_log,
        inodes_per_block_log, group_blocks_log, _rextslog, in_progress, inode_percent,
        inodes, free_inodes, free_blocks, _frextents, _uquota, _gquota, _qflags, flags, shared,
        _inoalign, _unit, _width, directory_block_log, _logsectlog, _logsectsize, _logsunit,
        features2, bad_features2, compat, ro_compat, incompat, log_incompat, _crc, _spino,
        _pquota, _lsn, meta_uuid,
    ) = _LAYOUT.unpack_from(raw)  # fmt: skip
    version = versionnum & 0xF
    if magic != b"XFSB":
        raise Unsupported("not an XFS superblock")
    if version not in (4, 5):
        raise Unsupported(f"XFS version {version}")
    if sector_size not in (512, 4096) or sector_log != sector_size.bit_length() - 1:
        raise Unsupported(f"XFS with sectors of {sector_size} bytes")
    if version == 5 and not checksum_holds(raw[:sector_size], _CRC_OFFSET):
        raise Unsupported("the XFS superblock's checksum is wrong")
    _check_features(version, versionnum, features2, bad_features2)
    if version == 5:
        _check_masks(compat, ro_compat, incompat, log_incompat)
    if realtime_blocks or realtime_extents:
        raise Unsupported("XFS with a realtime device")
    if not log_start:
        raise Unsupported("XFS with a log on another device")
    if in_progress or flags or shared:
        raise Unsupported("XFS that is being made, or is marked read-only or shared")
    if (
        block_size not in (1024, 2048, 4096)
        or block_log != block_size.bit_length() - 1
        or block_size < sector_size
        or inode_size not in (256, 512, 1024, 2048)
        or inode_log != inode_size.bit_length() - 1
        or (version == 5 and inode_size < 512)
        or inodes_per_block * inode_size != block_size
        or inodes_per_block_log != block_log - inode_log
        or block_size << min(directory_block_log, 7) not in _POWERS_TO_64K
        or not 64 <= group_blocks <= (1 << 30) // block_size * 1024
        or group_blocks_log != (group_blocks - 1).bit_length()
        or not (groups - 1) * group_blocks + 64 <= blocks <= groups * group_blocks
        or inode_percent > 100
    ):
        raise Unsupported("the XFS superblock has sizes that contradict each other")
    if blocks * block_size > source.size:
        raise Unsupported("the XFS filesystem is larger than its volume")
    superblock = Superblock(
        version=version,
        block_size=block_size,
        blocks=blocks,
        log_start=log_start,
        log_blocks=log_blocks,
        root=root,
        group_blocks=group_blocks,
        groups=groups,
        sector_size=sector_size,
        inode_size=inode_size,
        inodes_per_block=inodes_per_block,
        inodes_per_block_log=inodes_per_block_log,
        group_blocks_log=group_blocks_log,
        directory_block_size=block_size << directory_block_log,
        has_file_types=bool(incompat & _FTYPE if version == 5 else features2 & _V4_FTYPE),
        has_bigtime=bool(version == 5 and incompat & _BIGTIME),
        has_large_counters=bool(version == 5 and incompat & _NREXT64),
        uuid=meta_uuid if version == 5 and incompat & _META_UUID else uuid,
        inode_percent=inode_percent,
        inodes=inodes,
        free_inodes=free_inodes,
        free_blocks=free_blocks,
    )
    return superblock


_POWERS_TO_64K = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def _check_features(version: int, versionnum: int, features2: int, bad_features2: int) -> None:
    bits = versionnum & 0xFFF0
    if bits & ~_VERSION_KNOWN or bits & _VERSION_NEEDED != _VERSION_NEEDED:
        raise Unsupported(f"XFS with the version bits {bits:#06x}")
    # A bug of old kernels put the field in the wrong place on some machines.
    if bad_features2 not in (0, features2):
        raise Unsupported("XFS with two opinions about its features")
    if features2 & ~(_FEATURES2_V5 if version == 5 else _FEATURES2_V4):
        raise Unsupported(f"XFS with the features2 bits {features2:#x}")
    if version == 5 and not features2 & _CRC:
        raise Unsupported("XFS version 5 without checksums")
    if not features2 & _LAZY_COUNTERS:
        raise Unsupported("XFS with counters that are not lazy")


def _check_masks(compat: int, ro_compat: int, incompat: int, log_incompat: int) -> None:
    for bit, name in _INCOMPAT_NAMES.items():
        if incompat & bit:
            raise Unsupported(f"XFS with {name}" if bit != 0x10 else "XFS that needs repair")
    if compat:
        raise Unsupported(f"XFS with the compatible features {compat:#x}")
    if ro_compat & ~_RO_COMPAT_KNOWN:
        raise Unsupported(f"XFS with the read-only compatible features {ro_compat:#x}")
    if incompat & ~_INCOMPAT_KNOWN or not incompat & _FTYPE:
        raise Unsupported(f"XFS with the incompatible features {incompat:#x}")
    if log_incompat:
        raise Unsupported(f"XFS with the log features {log_incompat:#x}")
