"""XFS, versions 4 and 5, without the appliance.

The on-disk structures are read here, not by a library: those at hand give names as text, which
names that are not UTF-8 do not survive, and neither a file's block count nor its checksums.
What Linux answers of a read-only mount is what counts as right.
"""

from __future__ import annotations

import stat
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Filesystem, Node, ReadFailed, Source, Usage
from imgtool.engines.direct.worker.fs.xfs.directory import ENTRIES_END, block_names, inline_names
from imgtool.engines.direct.worker.fs.xfs.inode import (
    FORMAT_LOCAL,
    Extent,
    ExtentMap,
    Inode,
    parse_inode,
)
from imgtool.engines.direct.worker.fs.xfs.log import require_clean_log
from imgtool.engines.direct.worker.fs.xfs.superblock import (
    Superblock,
    checksum_holds,
    read_superblock,
)
from imgtool.engines.direct.worker.fs.xfs.xattrs import Attributes
from imgtool.formats.xattrs import Xattrs

_WINDOW = 32 << 10  # a chunk of 64 inodes of the usual size
_WINDOWS_KEPT = 64
_INODES_KEPT = 256
_MAPS_KEPT = 8
_EXTENTS_KEPT = 100_000  # a map with more is kept alone
_PIECE = 8 << 20
_SYMLINK_MAX = 1024
_SYMLINK_HEADER = 56


class XfsFilesystem(Filesystem):
    """One XFS filesystem whose features are all on the allow-list and whose log is clean."""

    type = "xfs"

    def __init__(self, source: Source, superblock: Superblock) -> None:
        self._source = source
        self._superblock = superblock
        self._windows: OrderedDict[int, bytes] = OrderedDict()
        self._inodes: OrderedDict[int, Inode] = OrderedDict()
        self._maps: OrderedDict[int, list[Extent]] = OrderedDict()
        self.root = superblock.root

    @classmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> XfsFilesystem:
        """Open it; `Unsupported` for a feature not tried, a dirty log unless it is to be read
        `unreplayed`, as the kernel does with `norecovery`, or any doubt."""
        superblock = read_superblock(source)
        if not unreplayed:
            require_clean_log(source, superblock)
        filesystem = cls(source, superblock)
        try:
            root = filesystem.stat(filesystem.root)
        except ReadFailed as error:
            raise Unsupported(f"the XFS root cannot be read: {error}") from None
        if not stat.S_ISDIR(root.mode):
            raise Unsupported("the XFS root is no directory")
        return filesystem

    def stat(self, inode: int) -> Node:
        return self._inode(inode).node

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """Names and inodes, a directory block at a time, but of those that are damaged."""
        directory = self._of_kind(inode, stat.S_IFDIR, "directory")
        if directory.format == FORMAT_LOCAL:
            yield from inline_names(self._superblock, inode, directory.fork[: directory.node.size])
            return
        extents = self._extents(directory)
        size = self._superblock.directory_block_size
        per_block = size // self._superblock.block_size
        limit = ENTRIES_END // self._superblock.block_size
        last = extents[-1].offset + extents[-1].blocks if extents else 0
        single = last == per_block
        if directory.node.size % size or (single and directory.node.size != size) or not last:
            raise ReadFailed(f"directory {inode} is damaged")
        done = 0
        damage: ReadFailed | None = None
        for extent in extents:
            if extent.offset >= limit:
                break
            end = extent.offset + extent.blocks
            if (
                extent.unwritten
                or min(end, limit) * self._superblock.block_size > directory.node.size
            ):
                damage = damage or ReadFailed(f"directory {inode} is damaged")
                continue
            for first in range(
                max(done, extent.offset - extent.offset % per_block),
                min(end, limit),
                per_block,
            ):
                try:
                    data, where = self._directory_block(inode, extents, first, per_block)
                    yield from block_names(self._superblock, inode, data, where, single)
                except ReadFailed as error:
                    damage = damage or error
                done = first + per_block
        if damage is not None:
            raise damage

    def target(self, inode: int) -> bytes:
        link = self._of_kind(inode, stat.S_IFLNK, "symbolic link")
        damaged = ReadFailed(f"symbolic link {inode} is damaged")
        size = link.node.size
        if size > _SYMLINK_MAX:
            raise damaged
        if link.format == FORMAT_LOCAL:
            target = link.fork[:size]
        else:
            target = b"".join(self._target_pieces(inode, self._extents(link), size, damaged))
        if len(target) != size or b"\0" in target:
            raise damaged
        return target

    def read(self, inode: int, offset: int, length: int) -> bytes:
        file = self._of_kind(inode, stat.S_IFREG, "regular file")
        end = min(offset + length, file.node.size)
        if offset >= end:
            return b""
        block_size = self._superblock.block_size
        extents = self._extents(file)
        index = max(bisect_right(extents, (offset // block_size, 1 << 60)) - 1, 0)
        pieces: list[bytes] = []
        at = offset
        for extent in islice(extents, index, None):
            begin = extent.offset * block_size
            stop = min(begin + extent.blocks * block_size, end)
            if begin >= end:
                break
            if extent.unwritten or stop <= at:
                continue
            if begin > at:
                pieces.append(bytes(begin - at))
                at = begin
            while at < stop:
                step = min(stop - at, _PIECE)
                pieces.append(self._source.read(extent.start + at - begin, step))
                at += step
        if at < end:
            pieces.append(bytes(end - at))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        file = self._of_kind(inode, stat.S_IFREG, "regular file")
        block_size, size = self._superblock.block_size, file.node.size
        found: list[tuple[int, int]] = []
        for extent in self._extents(file):
            begin = extent.offset * block_size
            end = min(begin + extent.blocks * block_size, size)
            if extent.unwritten or begin >= end:
                continue
            if found and found[-1][0] + found[-1][1] == begin:
                begin = found.pop()[0]
            found.append((begin, end - begin))
        return found

    def runs(self, inode: int) -> Sequence[tuple[int, int, int]]:
        file = self._of_kind(inode, stat.S_IFREG, "regular file")
        size = self._superblock.block_size
        return [
            (extent.offset * size, extent.start, extent.blocks * size)
            for extent in self._extents(file)
            if not extent.unwritten
        ]

    def xattrs(self, inode: int) -> Xattrs:
        """What the kernel gives to root; ACLs in the form of Linux alone."""
        return Attributes(self._superblock, self._inode(inode), self._read_block).read()

    def usage(self) -> Usage:
        return self._superblock.usage()

    def _inode(self, number: int) -> Inode:
        kept = self._inodes.get(number)
        if kept is not None:
            return kept
        offset = self._superblock.inode_offset(number)
        if offset is None:
            raise ReadFailed(f"there can be no inode {number}")
        raw = self._metadata(offset, self._superblock.inode_size)
        inode = parse_inode(self._superblock, number, raw)
        self._inodes[number] = inode
        if len(self._inodes) > _INODES_KEPT:
            self._inodes.popitem(last=False)
        return inode

    def _of_kind(self, number: int, kind: int, name: str) -> Inode:
        inode = self._inode(number)
        if stat.S_IFMT(inode.node.mode) != kind:
            raise ReadFailed(f"inode {number} is no {name}")
        return inode

    def _extents(self, inode: Inode) -> list[Extent]:
        number = inode.node.inode
        kept = self._maps.get(number)
        if kept is not None:
            return kept
        extents = ExtentMap(self._superblock, inode, self._read_block).extents()
        if len(extents) > _EXTENTS_KEPT:
            self._maps.clear()
        self._maps[number] = extents
        if len(self._maps) > _MAPS_KEPT or len(extents) > _EXTENTS_KEPT < sum(
            len(each) for each in self._maps.values()
        ):
            self._maps.popitem(last=False)
        return extents

    def _read_block(self, offset: int) -> bytes:
        return self._source.read(offset, self._superblock.block_size)

    def _metadata(self, offset: int, length: int) -> bytes:
        """Bytes that do not cross a window; the neighbours of an inode are asked for next."""
        start = offset - offset % _WINDOW
        window = self._windows.get(start)
        if window is None:
            end = min(start + _WINDOW, self._superblock.blocks * self._superblock.block_size)
            window = self._source.read(start, end - start)
            self._windows[start] = window
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return window[offset - start : offset - start + length]

    def _directory_block(
        self, number: int, extents: list[Extent], first: int, count: int
    ) -> tuple[bytes, int]:
        """A directory block, which may be in several pieces, and where its first piece lies."""
        block_size = self._superblock.block_size
        pieces: list[bytes] = []
        where = at = first
        index = max(bisect_right(extents, (first, 1 << 60)) - 1, 0)
        for extent in extents[index : index + count]:
            if not extent.offset <= at < extent.offset + extent.blocks or extent.unwritten:
                raise ReadFailed(f"directory {number} is damaged")
            start = extent.start + (at - extent.offset) * block_size
            if not pieces:
                where = start
            blocks = min(extent.offset + extent.blocks, first + count) - at
            pieces.append(self._source.read(start, blocks * block_size))
            at += blocks
            if at == first + count:
                return b"".join(pieces), where
        raise ReadFailed(f"directory {number} is damaged")

    def _target_pieces(
        self, number: int, extents: list[Extent], size: int, damaged: ReadFailed
    ) -> Iterator[bytes]:
        """A link's target from its blocks; in version 5 each extent begins with a header."""
        superblock, done, next_block = self._superblock, 0, 0
        for extent in extents:
            # 1024 bytes and their headers never need more.
            if extent.unwritten or extent.offset != next_block or extent.blocks > 3:
                raise damaged
            next_block += extent.blocks
            data = self._source.read(extent.start, extent.blocks * superblock.block_size)
            if superblock.version == 5:
                header, data = data, data[_SYMLINK_HEADER:]
                place = int.from_bytes(header[40:48], "big") * 512
                owner, at = header[32:40], int.from_bytes(header[4:8], "big")
                length = int.from_bytes(header[8:12], "big")
                if (
                    header[:4] != b"XSLM"
                    or at != done
                    or length != min(size - done, len(data))
                    or header[16:32] != superblock.uuid
                    or int.from_bytes(owner, "big") != number
                    or place != extent.start
                    or not checksum_holds(header, 12)
                ):
                    raise damaged
            data = data[: size - done]
            done += len(data)
            yield data
