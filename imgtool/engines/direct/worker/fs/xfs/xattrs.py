"""Extended attributes of XFS: in the inode, in leaf blocks under a tree, in blocks of their own.

Sources: "XFS Algorithms & Data Structures", and Linux 6.1, fs/xfs/libxfs/xfs_da_format.h,
xfs_attr_leaf.c (xfs_attr3_leaf_verify, xfs_attr_shortform_verify), xfs_attr_remote.c
(xfs_attr3_rmt_verify); fs/xfs/xfs_attr_list.c (xfs_attr_node_list) and xfs_acl.c.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator

from imgtool.engines.direct.worker.fs.base import MOST_XATTRS, ReadFailed
from imgtool.engines.direct.worker.fs.xfs.inode import FORMAT_LOCAL, Extent, ExtentMap, Inode
from imgtool.engines.direct.worker.fs.xfs.superblock import Superblock, checksum_holds
from imgtool.formats import xattrs
from imgtool.formats.xattrs import ACL_ACCESS, ACL_DEFAULT, Xattrs

_LOCAL, _ROOT, _SECURE, _INCOMPLETE = 0x01, 0x02, 0x04, 0x80
_KNOWN = _LOCAL | _ROOT | _SECURE | _INCOMPLETE
_PREFIXES = {0: b"user.", _ROOT: b"trusted.", _SECURE: b"security."}
_LARGEST_VALUE = 65536
_LEAF, _NODE = (0xFBEE, 0x3BEE), (0xFEBE, 0x3EBE)  # in versions 4 and 5
_MOST_LEVELS = 5  # XFS_DA_NODE_MAXDEPTH
_MOST_LEAVES = 100_000
_REMOTE_HEADER = 56

_ACLS = {b"SGI_ACL_FILE": ACL_ACCESS, b"SGI_ACL_DEFAULT": ACL_DEFAULT}
_ACL_ENTRY = struct.Struct(">IIHxx")


class Attributes:
    """The attributes of one inode. `read_block` gives a block of the volume by its byte offset."""

    def __init__(
        self, superblock: Superblock, inode: Inode, read_block: Callable[[int], bytes]
    ) -> None:
        self._superblock = superblock
        self._inode = inode
        self._number = inode.node.inode
        self._read_block = read_block
        self._damaged = ReadFailed(f"the attributes of inode {self._number} are damaged")
        self._extents: list[Extent] = []

    def read(self) -> Xattrs:
        """All of them; `ReadFailed` for damage."""
        inode = self._inode
        if not inode.attribute_fork:
            return ()
        if inode.attribute_format == FORMAT_LOCAL:
            entries = self._in_the_inode(inode.attribute_fork)
        elif not inode.attribute_extents:
            return ()
        else:
            as_data = inode._replace(
                format=inode.attribute_format,
                extent_count=inode.attribute_extents,
                fork=inode.attribute_fork,
            )
            self._extents = ExtentMap(self._superblock, as_data, self._read_block).extents()
            entries = self._in_leaves()
        found = []
        size = 0
        for flags, name, value in entries:
            size += len(name) + len(value)
            if size > MOST_XATTRS:
                raise ReadFailed("its extended attributes are too large")
            found.append(self._with_prefix(flags, name, value))
            if flags & _ROOT and name in _ACLS:
                found.append((_ACLS[name], self._acl(value)))
        return xattrs.order_xattrs(found)

    def _with_prefix(self, flags: int, name: bytes, value: bytes) -> tuple[bytes, bytes]:
        prefix = _PREFIXES.get(flags & (_ROOT | _SECURE))
        if flags & ~_KNOWN or prefix is None or not name or b"\0" in name:
            raise self._damaged
        return prefix + name, value

    def _acl(self, value: bytes) -> bytes:
        count = int.from_bytes(value[:4], "big")
        if len(value) != 4 + count * _ACL_ENTRY.size:
            raise self._damaged
        entries = []
        for tag, who, bits in _ACL_ENTRY.iter_unpack(value[4:]):
            if tag not in xattrs.TAGS:
                raise self._damaged
            named = tag in (xattrs.USER, xattrs.GROUP)
            entries.append((tag, bits, who if named else xattrs.UNDEFINED))
        return xattrs.acl(entries)

    def _in_the_inode(self, fork: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        size, count = struct.unpack_from(">HB", fork)
        if not 4 <= size <= len(fork):
            raise self._damaged
        at = 4
        for _ in range(count):
            if at + 3 > size:
                raise self._damaged
            name_length, value_length, flags = fork[at : at + 3]
            middle = at + 3 + name_length
            at = middle + value_length
            if at > size:
                raise self._damaged
            if not flags & _INCOMPLETE:
                yield flags, fork[middle - name_length : middle], fork[middle:at]

    # Blocks

    def _block(self, number: int) -> tuple[bytes, int]:
        """A block of the attribute fork, and where it lies in the volume."""
        index = bisect_right(self._extents, (number, 1 << 60)) - 1
        extent = self._extents[index] if index >= 0 else None
        if extent is None or number >= extent.offset + extent.blocks or extent.unwritten:
            raise self._damaged
        offset = extent.start + (number - extent.offset) * self._superblock.block_size
        return self._read_block(offset), offset

    def _tree_block(self, number: int) -> tuple[bytes, bool, int]:
        """A leaf or a node, whether it is a leaf, and where its fields begin."""
        block, offset = self._block(number)
        newer = self._superblock.version == 5
        magic = int.from_bytes(block[8:10], "big")
        if magic not in (_LEAF[newer], _NODE[newer]):
            raise self._damaged
        if newer:
            place, uuid, owner = struct.unpack_from(">Q8x16sQ", block, 16)
            if (place * 512, uuid, owner) != (offset, self._superblock.uuid, self._number):
                raise self._damaged
            if not checksum_holds(block, 12):
                raise ReadFailed(f"the attributes of inode {self._number} have a wrong checksum")
        return block, magic == _LEAF[newer], 56 if newer else 12

    def _in_leaves(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Down along the first entries to the first leaf, and on from leaf to leaf."""
        number = 0
        block, is_leaf, fields = self._tree_block(number)
        for _ in range(_MOST_LEVELS):
            if is_leaf:
                break
            count, _level = struct.unpack_from(">HH", block, fields)
            if not count:
                raise self._damaged
            start = fields + (8 if self._superblock.version == 5 else 4)
            number = int.from_bytes(block[start + 4 : start + 8], "big")
            block, is_leaf, fields = self._tree_block(number)
        seen: set[int] = set()
        while is_leaf:
            if number in seen or len(seen) > _MOST_LEAVES:
                raise self._damaged
            seen.add(number)
            yield from self._in_leaf(block, fields)
            number = int.from_bytes(block[:4], "big")
            if not number:
                return
            block, is_leaf, fields = self._tree_block(number)
        raise self._damaged

    def _in_leaf(self, block: bytes, fields: int) -> Iterator[tuple[int, bytes, bytes]]:
        count = int.from_bytes(block[fields : fields + 2], "big")
        start = 80 if self._superblock.version == 5 else 32
        end = start + count * 8
        if end > len(block):
            raise self._damaged
        for at in range(start, end, 8):
            place, flags = struct.unpack_from(">HB", block, at + 4)
            if not end <= place <= len(block) - 4:
                raise self._damaged
            if flags & _INCOMPLETE:
                continue
            if flags & _LOCAL:
                value_length, name_length = struct.unpack_from(">HB", block, place)
                middle = place + 3 + name_length
                value = block[middle : middle + value_length]
                if len(value) != value_length:
                    raise self._damaged
            else:
                if place + 9 > len(block):
                    raise self._damaged
                number, value_length, name_length = struct.unpack_from(">IIB", block, place)
                middle = place + 9 + name_length
                value = self._remote(number, value_length)
            if middle > len(block):
                raise self._damaged
            yield flags, block[middle - name_length : middle], value

    def _remote(self, number: int, length: int) -> bytes:
        """A value in blocks of its own, of which those of version 5 have a header each."""
        if length > _LARGEST_VALUE:
            raise self._damaged
        newer = self._superblock.version == 5
        value = bytearray()
        while len(value) < length:
            block, offset = self._block(number)
            number += 1
            if newer:
                size = min(length - len(value), len(block) - _REMOTE_HEADER)
                magic, at, given, uuid, owner, place = struct.unpack_from(">4sII4x16sQQ", block)
                found = (magic, at, given, uuid, owner, place * 512)
                wanted = (b"XARM", len(value), size, self._superblock.uuid, self._number, offset)
                if found != wanted or not checksum_holds(block, 12):
                    raise self._damaged
                block = block[_REMOTE_HEADER:]
            value += block[: length - len(value)]
        return bytes(value)
