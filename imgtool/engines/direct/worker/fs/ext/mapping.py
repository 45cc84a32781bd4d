"""Where the blocks of an ext2, ext3 or ext4 file are: extent trees and block maps.

Sources: the kernel's Documentation/filesystems/ext4 (ifork), fs/ext4/extents.c (what it verifies of
a tree) and fs/ext4/indirect.c. Trees come from a hostile disk: every block of one is visited once,
in ascending order, and the number of runs is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import ReadFailed

_MAGIC = 0xF30A
_MAX_DEPTH = 5
_MAX_LENGTH = 32768  # of a written extent; beyond it the extent is unwritten
_MAX_RUNS = 400_000
_END = 1 << 32
_DIRECT = 12


DAMAGED = -1


class Extent(NamedTuple):
    """Blocks of a file that lie together: logical start, physical start, count; all written.

    With `DAMAGED` as its physical start it is where the map of the file cannot be read.
    """

    logical: int
    physical: int
    length: int


class Tree(NamedTuple):
    """What a walk needs: the range of valid blocks, a block reader and a check of a tree block."""

    block_size: int
    first_block: int
    blocks: int
    read: Callable[[int], bytes]
    is_sound: Callable[[bytes, int], bool]


def _sound(tree: Tree, block: int) -> bytes:
    data = tree.read(block)
    limit = struct.unpack_from("<H", data, 4)[0]
    tail = 12 + 12 * limit
    if tail + 4 > len(data) or not tree.is_sound(data, tail):
        raise ReadFailed("a block of an extent tree is damaged")
    return data


def extents(tree: Tree, root: bytes) -> list[Extent]:
    """The written runs of an extent tree; `root` is the inode's 60 bytes."""
    runs: list[Extent] = []
    depth = struct.unpack_from("<H", root, 6)[0]
    if depth > _MAX_DEPTH:
        raise ReadFailed("an extent tree is too deep")
    # Nodes still to be read, the next one last: block, its depth, and the logical blocks it covers.
    waiting: list[tuple[int, int, int, int]] = []
    _node(tree, root, depth, (0, _END), runs, waiting)
    while waiting:
        block, depth, start, end = waiting.pop()
        found: list[Extent] = []
        below: list[tuple[int, int, int, int]] = []
        try:
            data = _sound(tree, block)
            _node(tree, data, depth, (start, end), found, below)
            if data[12:16] != start.to_bytes(4, "little") and data[2:4] != b"\0\0":
                raise ReadFailed("a block of an extent tree is not where its parent has it")
        except ReadFailed:
            runs.append(Extent(start, DAMAGED, end - start))
            continue
        for run in found:
            _add(runs, *run)
        waiting.extend(below)
    return runs


def _node(
    tree: Tree,
    data: bytes,
    depth: int,
    covered: tuple[int, int],
    runs: list[Extent],
    waiting: list[tuple[int, int, int, int]],
) -> None:
    magic, entries, limit, found_depth = struct.unpack_from("<4H", data)
    if (
        magic != _MAGIC
        or found_depth != depth
        or entries > limit
        or not 0 < limit <= (len(data) - 12) // 12
        or (depth and not entries)
    ):
        raise ReadFailed("the header of an extent tree is damaged")
    position, end = covered
    if depth:
        starts: list[tuple[int, int]] = []
        for start, low, high in struct.iter_unpack("<IIHxx", data[12 : 12 + 12 * entries]):
            block = low | high << 32
            if start < position or start >= end or not tree.first_block < block < tree.blocks:
                raise ReadFailed("an index of an extent tree is damaged")
            starts.append((start, block))
            position = start + 1
        ends = [start for start, _ in starts[1:]] + [end]
        waiting.extend(
            (block, depth - 1, start, stop)
            for (start, block), stop in zip(reversed(starts), reversed(ends), strict=True)
        )
        return
    for start, length, high, low in struct.iter_unpack("<IHHI", data[12 : 12 + 12 * entries]):
        physical = low | high << 32
        count = length if length <= _MAX_LENGTH else length - _MAX_LENGTH
        if (
            not count
            or start < position
            or start + count > end
            or not tree.first_block < physical <= tree.blocks - count
        ):
            raise ReadFailed("an extent is damaged")
        position = start + count
        if length <= _MAX_LENGTH:
            _add(runs, start, physical, count)


def block_map(tree: Tree, root: bytes, blocks: int) -> list[Extent]:
    """The runs of a block map; `root` is the inode's 60 bytes, `blocks` the file's length."""
    runs: list[Extent] = []
    pointers = struct.unpack("<15I", root)
    seen: set[int] = set()
    for logical, physical in enumerate(pointers[:_DIRECT]):
        if physical:
            if not tree.first_block < physical < tree.blocks:
                raise ReadFailed("a block map is damaged")
            _add(runs, logical, physical, 1)
    start = _DIRECT
    for level, block in enumerate(pointers[_DIRECT:], 1):
        if block and start < blocks:
            _indirect(tree, block, level, (start, blocks), seen, runs)
        start += (tree.block_size // 4) ** level
    return runs


def _indirect(
    tree: Tree, block: int, level: int, covered: tuple[int, int], seen: set[int], runs: list[Extent]
) -> None:
    """What an indirect block maps; with one bad pointer, as in the kernel, all of it is damaged."""
    start, blocks = covered
    span = (tree.block_size // 4) ** (level - 1)
    # A block that is used twice could make a small image describe an endless file.
    if block in seen or len(seen) > _MAX_RUNS:
        raise Unsupported("ext: a block map is too large, or uses a block twice")
    seen.add(block)
    wanted = min(tree.block_size // 4, -(-(blocks - start) // span))
    try:
        if not tree.first_block < block < tree.blocks:
            raise ReadFailed("a block map is damaged")
        pointers = struct.unpack(f"<{tree.block_size // 4}I", tree.read(block))[:wanted]
        if not all(tree.first_block < pointer < tree.blocks for pointer in pointers if pointer):
            raise ReadFailed("a block map is damaged")
    except ReadFailed:
        _add(runs, start, DAMAGED, min(span * wanted, blocks - start))
        return
    for index, pointer in enumerate(pointers):
        if pointer and level == 1:
            _add(runs, start + index, pointer, 1)
        elif pointer:
            _indirect(tree, pointer, level - 1, (start + index * span, blocks), seen, runs)


def _add(runs: list[Extent], logical: int, physical: int, count: int) -> None:
    if runs:
        last = runs[-1]
        if last.logical + last.length == logical and last.physical + last.length == physical:
            runs[-1] = Extent(last.logical, last.physical, last.length + count)
            return
    if len(runs) >= _MAX_RUNS:
        raise Unsupported("ext: a file is in too many pieces")
    runs.append(Extent(logical, physical, count))
