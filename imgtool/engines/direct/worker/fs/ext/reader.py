"""ext2, ext3 and ext4.

The on-disk format is read here and not through a general library: what the kernel verifies on its
way to a file (checksums of inodes, trees and directories, the shape of each) is verified too, and
every walk over a hostile structure is bounded.

Sources: the kernel's Documentation/filesystems/ext4; fs/ext4/inode.c (ext4_iget).
"""

from __future__ import annotations

import os
import stat as modes
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import (
    MOST_XATTRS,
    Filesystem,
    Node,
    ReadFailed,
    Source,
    Usage,
)
from imgtool.engines.direct.worker.fs.checksums import crc32c
from imgtool.engines.direct.worker.fs.ext import mapping as ext_mapping
from imgtool.engines.direct.worker.fs.ext import xattrs as ext_xattrs
from imgtool.engines.direct.worker.fs.ext.directory import entries, is_sound
from imgtool.engines.direct.worker.fs.ext.mapping import DAMAGED, Extent, Tree
from imgtool.engines.direct.worker.fs.ext.superblock import (
    HAS_JOURNAL,
    HUGE_FILE,
    LARGE_DIR,
    PROJECT,
    Group,
    Superblock,
    read_superblock,
)
from imgtool.formats.xattrs import Xattrs, order_xattrs

_ROOT = 2
_JOURNAL_MAGIC = 0xC03B3998
_CHUNK = 32768  # of an inode table: neighbours are asked for next
_CHUNKS = 32
_INODES = 1024
_READ = 4 << 20
_READ_AHEAD = 64  # blocks of a directory

_INDEX_FLAG = 0x1000
_HUGE_FILE_FLAG = 0x40000
_EXTENTS_FLAG = 0x80000
_EA_INODE_FLAG = 0x200000
_PROJECT_INHERIT_FLAG = 0x20000000
_REFUSED_FLAGS = {
    0x800: "encrypted",
    0x100000: "protected by verity",
    0x10000000: "stored in its inode",
    0x40000000: "casefolded",
}


class _Inode(NamedTuple):
    number: int
    node: Node
    flags: int
    generation: int
    blocks: bytes  # the 60 bytes of i_block
    xattr_block: int


class ExtFilesystem(Filesystem):
    """An ext2, ext3 or ext4 filesystem that passed the allow-list."""

    can_be_replayed = True

    root = _ROOT

    def __init__(self, source: Source, superblock: Superblock) -> None:
        """Use `open`."""
        self.type = superblock.type
        self._source = source
        self._super = superblock
        self._groups: dict[int, Group] = {}
        self._chunks: dict[int, bytes] = {}
        self._inodes: dict[int, _Inode] = {}
        self._runs: tuple[int, list[Extent]] = (0, [])

    @classmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> ExtFilesystem:
        """Check superblock and root; `NeedsReplay` where a replay of the journal would do, unless
        it is to be read `unreplayed`, as the kernel does with `noload`."""
        filesystem = cls(source, read_superblock(source, unreplayed=unreplayed))
        if not modes.S_ISDIR(filesystem.stat(_ROOT).mode):
            raise Unsupported("ext: the root is no directory")
        return filesystem

    def stat(self, inode: int) -> Node:
        """`lstat`; `ReadFailed` for a damaged inode."""
        return self._inode(inode).node

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """What the kernel lists, and what it passes over after a damaged entry of a block."""
        directory = self._inode(inode)
        size, block_size = directory.node.size, self._super.block_size
        if not modes.S_ISDIR(directory.node.mode):
            raise ReadFailed("not a directory")
        if size % block_size:
            raise Unsupported("ext: the size of a directory is odd")
        damage: ReadFailed | None = None
        for block, position in self._directory_blocks(directory, size // block_size):
            try:
                if isinstance(block, ReadFailed):
                    raise block
                yield from self._entries(directory, block, position)
            except ReadFailed as error:
                damage = damage or error
        if damage is not None:
            raise damage

    def _directory_blocks(
        self, directory: _Inode, blocks: int
    ) -> Iterator[tuple[bytes | ReadFailed, int]]:
        """The blocks of a directory and their numbers in it; for those that are not there, why."""
        position = 0
        for run in self._mapping(directory):
            if position >= blocks:
                break
            if run.logical != position:
                yield ReadFailed("a directory has a hole"), position
            position = run.logical
            count = min(run.length, blocks - position)
            if run.physical == DAMAGED:
                yield ReadFailed("a part of a directory's map is damaged"), position
                position += max(count, 0)
                continue
            for start in range(0, count, _READ_AHEAD):
                length = min(_READ_AHEAD, count - start)
                for at, block in enumerate(self._blocks(run.physical + start, length)):
                    yield block, position + start + at
            position += max(count, 0)
        if position < blocks:
            yield ReadFailed("a directory has a hole"), position

    def _blocks(self, first: int, count: int) -> Iterator[bytes | ReadFailed]:
        """Blocks that lie together; for those that cannot be read, why."""
        size = self._super.block_size
        try:
            data = self._source.read(first * size, count * size)
        except ReadFailed as error:
            if count == 1:
                yield error
                return
            for number in range(count):
                yield from self._blocks(first + number, 1)
            return
        for at in range(0, count * size, size):
            yield data[at : at + size]

    def target(self, inode: int) -> bytes:
        """The target of a symbolic link."""
        link = self._inode(inode)
        size = link.node.size
        if not modes.S_ISLNK(link.node.mode):
            raise ReadFailed("not a symbolic link")
        if link.flags & _EA_INODE_FLAG:
            raise Unsupported("ext: a symbolic link in an attribute")
        xattr_units = self._super.block_size >> 9 if link.xattr_block else 0
        if link.node.blocks == xattr_units:
            if not 0 < size < len(link.blocks):
                raise ReadFailed("the size of a symbolic link is damaged")
            target = link.blocks[:size]
        else:
            if not 0 < size < self._super.block_size:
                raise ReadFailed("the size of a symbolic link is damaged")
            target = self._bytes(link, 0, size)
        if b"\0" in target:
            raise ReadFailed("the target of a symbolic link is damaged")
        return target

    def xattrs(self, inode: int) -> Xattrs:
        """From the inode, from its block of attributes, and from inodes that are values."""
        owner = self._inode(inode)

        def value_of(number: int, size: int) -> bytes:
            return self._attribute(owner, number, size)

        found = ext_xattrs.in_inode(self._raw_inode(inode), self._super, value_of)
        if number := owner.xattr_block:
            found += ext_xattrs.in_block(self._block(number), number, self._super, value_of)
        if sum(len(value) for _, value in found) > MOST_XATTRS:
            raise ReadFailed("its extended attributes are too large")
        return order_xattrs(found)

    def _attribute(self, owner: _Inode, number: int, size: int) -> bytes:
        """The value of an attribute, an inode of its own that keeps the checksum of its content."""
        if not self._super.first_inode <= number <= self._super.inodes:
            raise ReadFailed("the inode of an attribute is out of range")
        raw = self._raw_inode(number)
        inode = self._parse_inode(number, raw, attribute=True)
        value = self._bytes(inode, 0, size) if inode.node.size == size else b""
        if len(value) != size:
            raise ReadFailed("the inode of an attribute is damaged")
        checksum, back = struct.unpack_from("<I4xI", raw, 8)
        # Lustre's have a way back to their owner instead.
        if (back, inode.generation) != (owner.number, owner.generation) and (
            crc32c(self._super.seed, value) != checksum
        ):
            raise ReadFailed("the value of an attribute has a wrong checksum")
        return value

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file; straight from the volume, several MiB at a time."""
        file = self._regular(inode)
        if offset < 0 or length <= 0 or offset >= file.node.size:
            return b""
        return self._bytes(file, offset, min(length, file.node.size - offset))

    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        """Where a regular file has data, neighbouring runs as one."""
        file = self._regular(inode)
        size, block_size = file.node.size, self._super.block_size
        found: list[tuple[int, int]] = []
        for run in self._mapping(file):
            start = run.logical * block_size
            end = min(start + run.length * block_size, size)
            if start >= size:
                break
            if found and sum(found[-1]) == start:
                start = found.pop()[0]
            found.append((start, end - start))
        return found

    def runs(self, inode: int) -> Sequence[tuple[int, int, int]] | None:
        """Where a regular file's data are on the volume; None if a part of its map is damaged."""
        size = self._super.block_size
        mapping = self._mapping(self._regular(inode))
        if any(run.physical == DAMAGED for run in mapping):
            return None
        return [(run.logical * size, run.physical * size, run.length * size) for run in mapping]

    def usage(self) -> Usage:
        """statfs, from the free counts of all groups; the journal counts as overhead."""
        superblock = self._super
        if superblock.ro_compat & PROJECT and self._inode(_ROOT).flags & _PROJECT_INHERIT_FLAG:
            raise Unsupported("ext: the root may have a project quota")
        blocks = inodes = 0
        per_block = superblock.descriptors_per_block
        for first in range(0, superblock.groups, per_block):
            data = self._block(superblock.descriptor_block(first // per_block))
            for number in range(first, min(first + per_block, superblock.groups)):
                group = self._descriptor(number, data)
                blocks += group.free_blocks
                inodes += group.free_inodes
        return superblock.usage(blocks, inodes, self._journal_blocks())

    def _journal_blocks(self) -> int:
        if not self._super.compat & HAS_JOURNAL:
            return 0
        journal = self._inode(self._super.journal_inode, reserved=True)
        block_size = self._super.block_size
        runs = self._mapping(journal)
        if not runs or runs[0].logical or runs[0].physical == DAMAGED:
            raise Unsupported("ext: the journal is damaged")
        head = self._source.read(runs[0].physical * block_size, 0x14)
        magic, kind, _, found_size, blocks = struct.unpack(">5I", head)
        if magic != _JOURNAL_MAGIC or kind not in (3, 4) or found_size != block_size:
            raise Unsupported("ext: the journal is damaged")
        if blocks > journal.node.size // block_size:
            raise Unsupported("ext: the journal is longer than its inode")
        return int(blocks)

    def _regular(self, number: int) -> _Inode:
        file = self._inode(number)
        if not modes.S_ISREG(file.node.mode):
            raise ReadFailed("not a regular file")
        return file

    def _bytes(self, file: _Inode, offset: int, length: int) -> bytes:
        block_size = self._super.block_size
        runs = self._mapping(file)
        end = offset + length
        # The first run that ends after the offset.
        low, high = 0, len(runs)
        while low < high:
            middle = (low + high) // 2
            if (runs[middle].logical + runs[middle].length) * block_size <= offset:
                low = middle + 1
            else:
                high = middle
        parts: list[bytes] = []
        position = offset
        while low < len(runs) and position < end:
            run = runs[low]
            start = run.logical * block_size
            if start >= end:
                break
            if start > position:
                parts.append(bytes(start - position))
                position = start
            if run.physical == DAMAGED:
                if parts:
                    return b"".join(parts)  # what lies before it; the next read fails
                if file.flags & _EXTENTS_FLAG:
                    raise ReadFailed("a block of an extent tree is damaged")
                raise ReadFailed("a part of the file's block map is damaged")
            stop = min(start + run.length * block_size, end)
            at = run.physical * block_size - start
            while position < stop:
                step = min(stop - position, _READ)
                parts.append(self._source.read(at + position, step))
                position += step
            low += 1
        if position < end:
            parts.append(bytes(end - position))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _mapping(self, file: _Inode) -> list[Extent]:
        if self._runs[0] == file.number:
            return self._runs[1]
        superblock = self._super
        seed = self._seed(file.number, file.generation)

        def is_sound(data: bytes, tail: int) -> bool:
            if not superblock.has_checksums:
                return True
            return crc32c(seed, data[:tail]).to_bytes(4, "little") == data[tail : tail + 4]

        tree = Tree(
            superblock.block_size, superblock.first_block, superblock.blocks, self._block, is_sound
        )
        if file.flags & _EXTENTS_FLAG:
            runs = ext_mapping.extents(tree, file.blocks)
        else:
            blocks = -(-file.node.size // superblock.block_size)
            runs = ext_mapping.block_map(tree, file.blocks, blocks)
        self._runs = (file.number, runs)
        return runs

    def _entries(
        self, directory: _Inode, block: bytes, position: int
    ) -> Iterator[tuple[bytes, int]]:
        seed = self._seed(directory.number, directory.generation)
        indexed = bool(directory.flags & _INDEX_FLAG)
        if self._super.has_checksums and not is_sound(block, seed, indexed, position):
            raise ReadFailed("a block of a directory is damaged")
        return entries(block, self._super.inodes)

    def _inode(self, number: int, reserved: bool = False) -> _Inode:
        known = self._inodes.get(number)
        if known is not None:
            return known
        superblock = self._super
        if not 0 < number <= superblock.inodes:
            raise ReadFailed("an inode number is out of range")
        if number < superblock.first_inode and number != _ROOT and not reserved:
            raise ReadFailed("a name points at a reserved inode")
        inode = self._parse_inode(number, self._raw_inode(number))
        if len(self._inodes) >= _INODES:
            self._inodes.clear()
        if not reserved:
            self._inodes[number] = inode
        return inode

    def _parse_inode(self, number: int, raw: bytes, attribute: bool = False) -> _Inode:
        superblock = self._super
        (mode, uid, size, mtime, gid, links, units, flags) = struct.unpack_from(
            "<HHI8xi4xHHII", raw
        )
        generation, xattrs, size_high = struct.unpack_from("<III", raw, 0x64)
        units_high, xattrs_high, uid_high, gid_high = struct.unpack_from("<4H", raw, 0x74)
        extra = 0
        if len(raw) > 128:
            extra = int.from_bytes(raw[128:130], "little")
            if extra & 3 or 128 + extra > len(raw):
                raise ReadFailed("the extra size of an inode is damaged")
        if superblock.has_checksums:
            self._check_inode(number, raw, generation, extra)
        if not links or not mode:
            raise ReadFailed("an inode is not in use")
        if bool(flags & _EA_INODE_FLAG) != attribute:
            raise ReadFailed("a name points at the inode of an attribute, or an attribute at none")
        for flag, what in _REFUSED_FLAGS.items():
            if flags & flag:
                raise Unsupported(f"ext: a file is {what}")
        kind = modes.S_IFMT(mode)
        if kind == modes.S_IFREG or superblock.incompat & LARGE_DIR:
            size |= size_high << 32
        if size >> 63:
            raise ReadFailed("the size of an inode is damaged")
        if superblock.ro_compat & HUGE_FILE:
            units |= units_high << 32
            if flags & _HUGE_FILE_FLAG:
                units *= superblock.block_size >> 9
        nanoseconds = mtime * 10**9
        if extra >= 12:
            extended = int.from_bytes(raw[0x88:0x8C], "little")
            nanoseconds = (mtime + ((extended & 3) << 32)) * 10**9 + (extended >> 2)
        blocks = raw[0x28:0x64]
        rdev = 0
        if kind in (modes.S_IFCHR, modes.S_IFBLK):
            rdev = _device(*struct.unpack_from("<II", blocks))
        elif kind not in (
            modes.S_IFREG,
            modes.S_IFDIR,
            modes.S_IFLNK,
            modes.S_IFIFO,
            modes.S_IFSOCK,
        ):
            raise ReadFailed("the type of an inode is damaged")
        node = Node(
            inode=number,
            mode=mode,
            uid=uid | uid_high << 16,
            gid=gid | gid_high << 16,
            size=size,
            mtime_ns=nanoseconds,
            blocks=units,
            nlink=links,
            rdev=rdev,
        )
        return _Inode(number, node, flags, generation, blocks, xattrs | xattrs_high << 32)

    def _check_inode(self, number: int, raw: bytes, generation: int, extra: int) -> None:
        data = bytearray(raw)
        data[0x7C:0x7E] = b"\0\0"
        expected = int.from_bytes(raw[0x7C:0x7E], "little")
        mask = 0xFFFF
        if extra >= 4:
            data[0x82:0x84] = b"\0\0"
            expected |= int.from_bytes(raw[0x82:0x84], "little") << 16
            mask = 0xFFFFFFFF
        if crc32c(self._seed(number, generation), bytes(data)) & mask != expected:
            raise ReadFailed("the checksum of an inode is wrong")

    def _seed(self, number: int, generation: int) -> int:
        return crc32c(self._super.seed, struct.pack("<II", number, generation))

    def _raw_inode(self, number: int) -> bytes:
        superblock = self._super
        group, index = divmod(number - 1, superblock.inodes_per_group)
        at = self._group(group).inode_table * superblock.block_size + index * superblock.inode_size
        start = at - at % _CHUNK
        chunk = self._chunks.get(start)
        if chunk is None:
            if len(self._chunks) >= _CHUNKS:
                del self._chunks[next(iter(self._chunks))]
            chunk = self._source.read(start, min(_CHUNK, self._source.size - start))
            self._chunks[start] = chunk
        return chunk[at - start : at - start + superblock.inode_size]

    def _group(self, number: int) -> Group:
        known = self._groups.get(number)
        if known is None:
            block = self._super.descriptor_block(number // self._super.descriptors_per_block)
            known = self._groups[number] = self._descriptor(number, self._block(block))
        return known

    def _descriptor(self, number: int, block: bytes) -> Group:
        size = self._super.descriptor_size
        at = number % self._super.descriptors_per_block * size
        return self._super.group(number, block[at : at + size])

    def _block(self, number: int) -> bytes:
        if not 0 <= number < self._super.blocks:
            raise ReadFailed("a block number is out of range")
        size = self._super.block_size
        return self._source.read(number * size, size)


def _device(old: int, new: int) -> int:
    """A device number from its two encodings on disk, as makedev(3) has it."""
    if old:
        return os.makedev(old >> 8 & 0xFF, old & 0xFF)
    return os.makedev((new & 0xFFF00) >> 8, new & 0xFF | new >> 12 & 0xFFF00)
