"""The ext reader: what it refuses, what it verifies, and its arithmetic."""

from __future__ import annotations

import struct

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import NeedsReplay, ReadFailed, Usage
from imgtool.engines.direct.worker.fs.checksums import crc16, crc32c
from imgtool.engines.direct.worker.fs.ext.mapping import DAMAGED, Extent, Tree, block_map, extents
from imgtool.engines.direct.worker.fs.ext.reader import ExtFilesystem, _device
from imgtool.engines.direct.worker.fs.ext.superblock import Superblock

BLOCKS = 8192  # of 4 KiB, in one group


def superblock(changes: dict[int, bytes] | None = None, checksum: bool = True) -> bytes:
    """An ext4 superblock with metadata checksums and one group; `changes` by offset."""
    raw = bytearray(1024)
    for at, value in (
        (0x00, 2048),  # inodes
        (0x04, BLOCKS),
        (0x08, 400),  # reserved blocks
        (0x18, 2),  # block size 4 KiB
        (0x1C, 2),
        (0x20, 32768),
        (0x24, 32768),
        (0x28, 2048),  # inodes in a group
        (0x4C, 1),
        (0x54, 11),
        (0x5C, 0x38),
        (0x60, 0x2C2),
        (0x64, 0x46B),
    ):
        struct.pack_into("<I", raw, at, value)
    struct.pack_into("<HH", raw, 0x38, 0xEF53, 1)
    struct.pack_into("<H", raw, 0x58, 256)
    struct.pack_into("<H", raw, 0xFE, 64)
    raw[0x175] = 1
    for at, data in (changes or {}).items():
        raw[at : at + len(data)] = data
    if checksum:
        struct.pack_into("<I", raw, 0x3FC, crc32c(0xFFFFFFFF, bytes(raw[:0x3FC])))
    return bytes(raw)


def opened(changes: dict[int, bytes] | None = None) -> Superblock:
    return Superblock(superblock(changes), BLOCKS * 4096)


def test_a_sound_superblock_is_accepted() -> None:
    found = opened()
    assert (found.type, found.block_size, found.groups) == ("ext4", 4096, 1)


@pytest.mark.parametrize("kind", [0x5C, 0x60, 0x64])
def test_every_feature_that_is_not_listed_is_refused(kind: int) -> None:
    accepted = 0
    for bit in range(32):
        old = struct.unpack_from("<I", superblock(), kind)[0]
        if old >> bit & 1 or (kind, bit) in {(0x60, 2), (0x64, 4), (0x5C, 2)}:
            continue  # the journal has tests of its own; two kinds of checksums exclude another
        try:
            opened({kind: struct.pack("<I", old | 1 << bit)})
        except Unsupported as refusal:
            assert "feature" in str(refusal)
        else:
            accepted += 1
    assert accepted == {0x5C: 5, 0x60: 5, 0x64: 3}[kind]


@pytest.mark.parametrize(
    "changes",
    [
        {0x38: b"\0\0"},
        {0x4C: b"\2"},
        {0x48: b"\1"},
        {0x18: b"\x06"},
        {0x18: b"\xff\xff\xff\xff"},
        {0x1C: b"\3"},
        {0x04: struct.pack("<I", BLOCKS + 1)},
        {0x20: bytes(4), 0x24: bytes(4)},
        {0x28: bytes(4)},
        {0x00: struct.pack("<I", 4096)},
        {0x58: struct.pack("<H", 192)},
        {0x58: struct.pack("<H", 8192)},
        {0xFE: struct.pack("<H", 0)},
        {0x3A: b"\0"},
        {0x3A: b"\3"},
        {0xE8: b"\x0c"},
        {0x100: b"\x10"},
        {0x200: b"minixdf"},
        {0x175: b"\2"},
    ],
)
def test_what_is_not_sound_or_not_clean_is_refused(changes: dict[int, bytes]) -> None:
    with pytest.raises(Unsupported):
        opened(changes)


def test_a_wrong_checksum_is_refused() -> None:
    with pytest.raises(Unsupported, match="checksum"):
        Superblock(superblock({0x78: b"changed"}, checksum=False), BLOCKS * 4096)


def test_a_journal_to_replay_is_a_refusal_of_its_own() -> None:
    journal = {0x5C: b"\x3c", 0x60: b"\xc6", 0xE0: b"\x08"}
    with pytest.raises(NeedsReplay):
        opened(journal)
    with pytest.raises(Unsupported, match="another device"):
        opened({**journal, 0xE4: b"\1"})


def test_statfs_counts_metadata_and_journal_as_overhead() -> None:
    # One group: superblock, descriptors, two bitmaps, 128 blocks of inodes; 2 % are kept besides.
    blocks = BLOCKS - 132 - 1024
    assert opened().usage(5000, 2000, 1024) == Usage(
        size=blocks * 4096,
        used=(blocks - 5000) * 4096,
        available=(5000 - 400 - BLOCKS // 50) * 4096,
        inodes=2048,
        inodes_used=48,
    )


def test_free_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(Unsupported):
        opened().usage(BLOCKS, 0, 0)
    with pytest.raises(Unsupported):
        opened().usage(0, 2049, 0)


def test_checksums_have_the_published_check_values() -> None:
    assert crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc16(0, b"123456789") == 0xBB3D
    assert crc32c(crc32c(7, b"abc"), b"defg") == crc32c(7, b"abcdefg")
    assert crc32c(0xFFFFFFFF, bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA


@pytest.mark.parametrize("zeros", [31, 32, 33, 100, 255])
def test_zeros_that_are_stepped_over_count(zeros: int) -> None:
    expected = crc32c(7, b"inode")
    for _ in range(zeros):
        expected = crc32c(expected, b"\0")
    assert crc32c(7, b"inode" + bytes(zeros)) == expected


def test_both_encodings_of_a_device_number_are_read() -> None:
    assert _device(0x0103, 0) == 0x0103
    assert _device(0, 0x11170) == (0x111 << 8 | 0x70)
    assert _device(0, (1 << 20) | 0x00105) == (1 << 20) | 0x105


def tree(blocks: dict[int, bytes]) -> Tree:
    return Tree(1024, 1, 1000, lambda block: blocks.get(block, bytes(1024)), lambda *_: True)


def node(depth: int, *entries: bytes, limit: int = 4, size: int = 60) -> bytes:
    head = struct.pack("<4HI", 0xF30A, len(entries), limit, depth, 0)
    return (head + b"".join(entries)).ljust(size, b"\0")


def extent(start: int, length: int, block: int) -> bytes:
    return struct.pack("<IHHI", start, length, 0, block)


def test_unwritten_extents_are_holes_and_neighbours_are_one_run() -> None:
    root = node(0, extent(0, 2, 50), extent(2, 3, 52), extent(5, 32768 + 4, 60), extent(20, 1, 70))
    assert extents(tree({}), root) == [Extent(0, 50, 5), Extent(20, 70, 1)]


@pytest.mark.parametrize(
    "root",
    [
        bytes(60),
        node(0, extent(0, 0, 50)),
        node(0, extent(0, 2, 999)),
        node(0, extent(0, 2, 0)),
        node(0, extent(4, 2, 50), extent(5, 2, 60)),
        node(0, extent(0xFFFFFFFF, 2, 50)),
        node(6, struct.pack("<IIHH", 0, 7, 0, 0)),
        node(1),
        node(0, limit=5000),
    ],
)
def test_a_damaged_extent_tree_is_an_error(root: bytes) -> None:
    with pytest.raises(ReadFailed):
        extents(tree({}), root)


@pytest.mark.parametrize(
    "block",
    [
        bytes(1024),  # no node
        node(0, extent(0, 2, 50), limit=84, size=1024),  # not where its parent has it
        node(0, extent(12, 2, 50), extent(11, 1, 60), limit=84, size=1024),
        node(0, extent(12, 2, 999), limit=84, size=1024),
    ],
)
def test_damaged_extent_tree_block_takes_only_its_own_part(block: bytes) -> None:
    sound = node(0, extent(0, 2, 50), limit=84, size=1024)
    last = node(0, extent(20, 1, 70), limit=84, size=1024)
    root = node(1, *(struct.pack("<IIHH", start, at, 0, 0) for start, at in PARTS))
    assert extents(tree({7: sound, 8: block, 9: last}), root) == [
        Extent(0, 50, 2),
        Extent(12, DAMAGED, 8),
        Extent(20, 70, 1),
    ]


PARTS = ((0, 7), (12, 8), (20, 9))


def test_an_extent_tree_that_leads_back_to_itself_ends() -> None:
    index = struct.pack("<IIHH", 0, 7, 0, 0)
    looped = node(1, index, limit=84, size=1024)
    assert [run.physical for run in extents(tree({7: looped}), node(2, index))] == [DAMAGED]


def test_a_damaged_block_of_a_block_map_takes_only_its_own_part() -> None:
    good, bad = struct.pack("<256I", *range(100, 356)), struct.pack("<256I", *[0] * 255, 1 << 30)
    double = struct.pack("<256I", 8, 9, 10, *[0] * 253)
    root = struct.pack("<15I", *range(40, 52), 7, 11, 0)
    found = block_map(tree({7: good, 8: good, 9: bad, 10: good, 11: double}), root, 1030)
    assert found == [
        Extent(0, 40, 12),
        Extent(12, 100, 256),
        Extent(268, 100, 256),
        Extent(524, DAMAGED, 256),
        Extent(780, 100, 250),
    ]


def test_a_block_map_with_a_block_used_twice_is_refused() -> None:
    same = struct.pack("<256I", *[7] * 256)
    root = struct.pack("<15I", *[0] * 14, 7)
    with pytest.raises(Unsupported):
        block_map(tree({7: same}), root, 1 << 30)


def test_a_long_hole_of_a_block_map_costs_nothing() -> None:
    last = struct.pack("<256I", *[0] * 255, 99)
    root = struct.pack("<15I", 40, 41, *[0] * 10, 0, 0, 7)
    found = block_map(tree({7: last[:-4] + struct.pack("<I", 8), 8: last, 99: last}), root, 1 << 30)
    assert found[0] == Extent(0, 40, 2)
    assert len(found) == 2


class Volume:
    """A volume of nothing but the given superblock."""

    size = BLOCKS * 4096

    def __init__(self, raw: bytes) -> None:
        self._raw = bytes(1024) + raw

    def read(self, offset: int, length: int) -> bytes:
        return self._raw[offset : offset + length].ljust(length, b"\0")


def test_a_volume_whose_descriptors_are_empty_is_refused() -> None:
    with pytest.raises(Unsupported):
        ExtFilesystem.open(Volume(superblock()))
