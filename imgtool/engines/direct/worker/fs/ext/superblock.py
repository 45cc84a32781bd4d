"""The superblock and group descriptors of ext2, ext3 and ext4: what may be opened, and statfs.

Sources: the kernel's Documentation/filesystems/ext4 for the layout; fs/ext4/super.c (mount checks,
ext4_calculate_overhead, ext4_set_resv_clusters, ext4_statfs) for what Linux 6.1 makes of it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import NeedsReplay, ReadFailed, Source, Usage
from imgtool.engines.direct.worker.fs.checksums import crc16, crc32c

SUPERBLOCK_AT = 1024
SUPERBLOCK_SIZE = 1024
_MAGIC = 0xEF53
_HURD = 1
_CLEAN = 1
_UID16 = 0x10  # default mount option nouid32
_PAGE = 4096  # the kernel mounts no larger blocks
_MAX_GROUPS = 1 << 20  # every one is read for statfs; 128 TiB as mke2fs makes them
_MMP_MAGIC = 0x004D4D50
_MMP_CLEAN = 0xFF4D4D50

HAS_JOURNAL = 0x4
SPARSE_SUPER2 = 0x200
RECOVER = 0x4
META_BG = 0x10
EXTENTS = 0x40
HAS_64BIT = 0x80
MMP = 0x100
EA_INODE = 0x400
CSUM_SEED = 0x2000
LARGE_DIR = 0x4000
SPARSE_SUPER = 0x1
HUGE_FILE = 0x8
GDT_CSUM = 0x10
METADATA_CSUM = 0x400
PROJECT = 0x2000

# What a feature would need beyond this reader, or was never compared, is not in these tables.
_COMPAT = {
    0x1: "dir_prealloc",
    HAS_JOURNAL: "has_journal",
    0x8: "ext_attr",
    0x10: "resize_inode",
    0x20: "dir_index",
    SPARSE_SUPER2: "sparse_super2",
    0x400: "fast_commit",
    0x800: "stable_inodes",
    0x1000: "orphan_file",
}
_INCOMPAT = {
    0x2: "filetype",
    META_BG: "meta_bg",
    EXTENTS: "extents",
    HAS_64BIT: "64bit",
    MMP: "mmp",
    0x200: "flex_bg",
    EA_INODE: "ea_inode",
    CSUM_SEED: "metadata_csum_seed",
    LARGE_DIR: "large_dir",
}
_RO_COMPAT = {
    SPARSE_SUPER: "sparse_super",
    0x2: "large_file",
    HUGE_FILE: "huge_file",
    GDT_CSUM: "uninit_bg",
    0x20: "dir_nlink",
    0x40: "extra_isize",
    0x100: "quota",
    METADATA_CSUM: "metadata_csum",
    0x1000: "read-only",
    PROJECT: "project",
}
_ORPHAN_PRESENT = 0x10000
_REFUSED = {
    ("incompat", 0x1): "compression",
    ("incompat", 0x8): "journal_dev",
    ("incompat", 0x1000): "dirdata",
    ("incompat", 0x8000): "inline_data",
    ("incompat", 0x10000): "encrypt",
    ("incompat", 0x20000): "casefold",
    ("ro_compat", 0x200): "bigalloc",
    ("ro_compat", 0x8000): "verity",
    ("ro_compat", _ORPHAN_PRESENT): "orphan_present",
}


class Group(NamedTuple):
    """What a group descriptor says."""

    inode_table: int
    free_blocks: int
    free_inodes: int


class Superblock:
    """A superblock that passed the allow-list. All counts and positions are in blocks."""

    def __init__(self, raw: bytes, volume_size: int, *, unreplayed: bool = False) -> None:
        """Check 1024 bytes of superblock; `Unsupported` for all that is not known to be safe."""
        if len(raw) != SUPERBLOCK_SIZE:
            raise Unsupported("ext: the superblock is cut short")

        def u16(at: int) -> int:
            return int.from_bytes(raw[at : at + 2], "little")

        def u32(at: int) -> int:
            return int.from_bytes(raw[at : at + 4], "little")

        if u16(0x38) != _MAGIC:
            raise Unsupported("ext: no superblock")
        revision = u32(0x4C)
        if revision > 1:
            raise Unsupported(f"ext: revision {revision} is not known")
        self.compat, self.incompat, self.ro_compat = (
            struct.unpack_from("<3I", raw, 0x5C) if revision else (0, 0, 0)
        )
        self._check_features()
        self.uuid = raw[0x68:0x78]
        self.has_checksums = bool(self.ro_compat & METADATA_CSUM)
        if self.has_checksums and (
            raw[0x175] != 1 or crc32c(0xFFFFFFFF, raw[:0x3FC]) != u32(0x3FC)
        ):
            raise Unsupported("ext: the superblock's checksum is wrong")
        self.seed = u32(0x270) if self.incompat & CSUM_SEED else crc32c(0xFFFFFFFF, self.uuid)
        if u32(0x48) == _HURD:
            raise Unsupported("ext: made by the Hurd, which has other inodes")
        if u32(0x100) & _UID16 or raw[0x200:0x240].strip(b"\0"):
            raise Unsupported("ext: default mount options change what the kernel shows")

        wide = bool(self.incompat & HAS_64BIT)
        self.block_size = 1024 << min(u32(0x18), 16)
        self.blocks = u32(0x04) | (u32(0x150) << 32 if wide else 0)
        self.reserved = u32(0x08) | (u32(0x154) << 32 if wide else 0)
        self.first_block = u32(0x14)
        self.inodes = u32(0x00)
        self.blocks_per_group = u32(0x20)
        self.inodes_per_group = u32(0x28)
        self.inode_size = u16(0x58) if revision else 128
        self.first_inode = u32(0x54) if revision else 11
        self.descriptor_size = u16(0xFE) if wide else 32
        self.reserved_descriptor_blocks = u16(0xCE)
        self.first_meta_group = u32(0x104)
        self.backup_groups = (u32(0x24C), u32(0x250))
        self.journal_inode = u32(0xE0)
        self.mmp_block = struct.unpack_from("<Q", raw, 0x168)[0]
        self._check_geometry(u32(0x18), u32(0x1C), u32(0x24), wide, volume_size)
        if not unreplayed:
            self._check_state(u16(0x3A), u32(0xE8), u32(0xE4))

    def _check_features(self) -> None:
        # What replays the journal frees what the file of orphans has, too (e2fsck 1.47.1; an older
        # one leaves the feature as it is).
        orphans = _ORPHAN_PRESENT if self.incompat & RECOVER else 0
        for kind, found, known in (
            ("compat", self.compat, _COMPAT),
            ("incompat", self.incompat & ~RECOVER, _INCOMPAT),
            ("ro_compat", self.ro_compat & ~orphans, _RO_COMPAT),
        ):
            for bit in range(32):
                if found >> bit & 1 and 1 << bit not in known:
                    name = _REFUSED.get((kind, 1 << bit), f"{kind} 0x{1 << bit:x}")
                    raise Unsupported(f"ext: feature {name} is not read directly")
        if self.ro_compat & METADATA_CSUM and self.ro_compat & GDT_CSUM:
            raise Unsupported("ext: two kinds of checksums at once")

    def _check_geometry(
        self, log_block: int, log_cluster: int, per_cluster: int, wide: bool, volume_size: int
    ) -> None:
        size = self.block_size
        if size > _PAGE:
            raise Unsupported(f"ext: blocks of {size} bytes are more than the kernel mounts")
        sound = (
            log_block == log_cluster
            and per_cluster == self.blocks_per_group
            and self.first_block == (1 if size == 1024 else 0)
            and self.first_block < self.blocks <= volume_size // size
            and 0 < self.blocks_per_group <= 8 * size
            and self.blocks_per_group % 8 == 0
            and 0 < self.inodes_per_group <= 8 * size
            and 128 <= self.inode_size <= size
            and self.inode_size & (self.inode_size - 1) == 0
            and self.inodes_per_group * self.inode_size % size == 0
            and self.first_inode >= 11
            and (not wide or self.descriptor_size in (64, 128, 256, 512, 1024))
            and self.reserved <= self.blocks
        )
        if not sound:
            raise Unsupported("ext: the superblock's geometry is not sound")
        groups = -(-(self.blocks - self.first_block) // self.blocks_per_group)
        if self.inodes != groups * self.inodes_per_group:
            raise Unsupported("ext: inodes and groups do not match")
        if groups > _MAX_GROUPS:
            raise Unsupported("ext: too many block groups")
        self.groups = groups
        self.descriptors_per_block = size // self.descriptor_size
        self.descriptor_blocks = -(-groups // self.descriptors_per_block)
        if self.incompat & META_BG and self.first_meta_group > self.descriptor_blocks:
            raise Unsupported("ext: the first meta block group is out of range")

    def _check_state(self, state: int, last_orphan: int, journal_device: int) -> None:
        if self.compat & HAS_JOURNAL and (journal_device or not self.journal_inode):
            raise Unsupported("ext: the journal is on another device")
        if self.incompat & RECOVER:
            if not self.compat & HAS_JOURNAL:
                raise Unsupported("ext: to be recovered, but there is no journal")
            raise NeedsReplay("ext: the journal must be replayed")
        if state != _CLEAN:
            raise Unsupported("ext: not unmounted cleanly, or with errors")
        if last_orphan:
            raise Unsupported("ext: orphaned inodes are to be cleaned up")

    @property
    def type(self) -> str:
        """The name libblkid has for it."""
        if self.incompat & ~(0x2 | META_BG) or self.ro_compat & ~0x7:
            return "ext4"
        return "ext3" if self.compat & HAS_JOURNAL else "ext2"

    def has_backup(self, group: int) -> bool:
        """Whether a group begins with a superblock (ext4_bg_has_super)."""
        if group == 0:
            return True
        if self.compat & SPARSE_SUPER2:
            return group in self.backup_groups
        if group == 1 or not self.ro_compat & SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def descriptor_block(self, number: int) -> int:
        """Where the `number`th block of group descriptors is."""
        if not self.incompat & META_BG or number < self.first_meta_group:
            return self.first_block + 1 + number
        group = number * self.descriptors_per_block
        start = self.first_block + group * self.blocks_per_group
        return start + self.has_backup(group)

    def group(self, number: int, raw: bytes) -> Group:
        """One group descriptor, checked."""
        if self.has_checksums:
            found = crc32c(self.seed, number.to_bytes(4, "little") + raw[:0x1E] + b"\0\0")
            expected = crc32c(found, raw[0x20:]) & 0xFFFF
        elif self.ro_compat & GDT_CSUM:
            expected = crc16(
                0xFFFF, self.uuid + number.to_bytes(4, "little") + raw[:0x1E] + raw[0x20:]
            )
        else:
            expected = int.from_bytes(raw[0x1E:0x20], "little")
        if expected != int.from_bytes(raw[0x1E:0x20], "little"):
            raise Unsupported(f"ext: the checksum of group {number} is wrong")
        table, blocks, inodes = struct.unpack_from("<IHH", raw, 8)
        if len(raw) >= 64:
            high = struct.unpack_from("<IHH", raw, 0x28)
            table |= high[0] << 32
            blocks |= high[1] << 16
            inodes |= high[2] << 16
        length = self.inodes_per_group * self.inode_size // self.block_size
        if not self.first_block < table <= self.blocks - length:
            raise Unsupported(f"ext: the inode table of group {number} is out of range")
        return Group(table, blocks, inodes)

    def usage(self, free_blocks: int, free_inodes: int, journal_blocks: int) -> Usage:
        """statfs as ext4_statfs has it, bsddf (the default), without project quotas."""
        blocks = self.blocks - self._overhead() - journal_blocks
        kept = self.reserved
        if self.incompat & EXTENTS:
            kept += min(self.blocks // 50, 4096)
        if not 0 <= free_blocks <= blocks or not 0 <= free_inodes <= self.inodes:
            raise Unsupported("ext: the counts of free blocks and inodes are not sound")
        return Usage(
            size=blocks * self.block_size,
            used=(blocks - free_blocks) * self.block_size,
            available=max(0, free_blocks - kept) * self.block_size,
            inodes=self.inodes,
            inodes_used=self.inodes - free_inodes,
        )

    def _overhead(self) -> int:
        table = self.inodes_per_group * self.inode_size // self.block_size
        overhead = self.first_block + self.groups * (table + 2)
        if self.compat & SPARSE_SUPER2 or self.ro_compat & SPARSE_SUPER:
            candidates = {0, 1, *self.backup_groups}
            for base in (3, 5, 7):
                candidates.update(base**power for power in range(1, 33))
            backups = sum(
                1 for group in candidates if group < self.groups and self.has_backup(group)
            )
        else:
            backups = self.groups
        per_backup = 1 + self.reserved_descriptor_blocks
        if not self.incompat & META_BG:
            return overhead + backups * (per_backup + self.descriptor_blocks)
        overhead += backups * per_backup
        for group in range(self.groups):
            block, position = divmod(group, self.descriptors_per_block)
            if block < self.first_meta_group:
                overhead += self.first_meta_group if self.has_backup(group) else 0
            elif position in (0, 1, self.descriptors_per_block - 1):
                overhead += 1
        return overhead


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def read_superblock(source: Source, *, unreplayed: bool = False) -> Superblock:
    """The superblock of a volume; `Unsupported` unless everything in it is known."""
    if source.size < SUPERBLOCK_AT + SUPERBLOCK_SIZE:
        raise Unsupported("ext: the volume is too small")
    raw = source.read(SUPERBLOCK_AT, SUPERBLOCK_SIZE)
    superblock = Superblock(raw, source.size, unreplayed=unreplayed)
    if superblock.incompat & MMP:
        if not superblock.first_block < superblock.mmp_block < superblock.blocks:
            raise ReadFailed("ext: the block of multiple mount protection is out of range")
        at = superblock.mmp_block * superblock.block_size
        if struct.unpack("<II", source.read(at, 8)) != (_MMP_MAGIC, _MMP_CLEAN):
            raise Unsupported("ext: multiple mount protection says it is in use")
    return superblock
