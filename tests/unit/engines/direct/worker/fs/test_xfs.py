"""The XFS reader refuses what it does not know, and takes nothing damaged for an answer."""

from __future__ import annotations

import struct

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.fs.xfs.inode import parse_inode
from imgtool.engines.direct.worker.fs.xfs.reader import XfsFilesystem

_BLOCK, _GROUP_BLOCKS, _LOG_START, _LOG_BLOCKS = 4096, 4096, 1024, 512
_ROOT = 64
_UNMOUNT, _COMMIT = 0x20, 0x02


class MemorySource:
    """A volume in memory."""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise ReadFailed("past the end")
        return bytes(self.data[offset : offset + length])


def _directory(names: list[bytes]) -> bytes:
    entries = b"".join(
        struct.pack(">BH", len(name), 0) + name + struct.pack(">I", _ROOT + 1 + index)
        for index, name in enumerate(names)
    )
    return struct.pack(">BBI", len(names), 0, _ROOT) + entries


def _inode(mode: int, form: int, size: int, extents: int, blocks: int, fork: bytes) -> bytes:
    core = struct.pack(
        ">2sHBBHIIIHH8s8s8s8sQQIIHBbIHHII",
        b"IN", mode, 2, form, 0, 1000, 100, 2, 0, 0, b"", b"", struct.pack(">iI", -5, 7), b"",
        size, blocks, 0, extents, 0, 0, 2, 0, 0, 0, 0, 0,
    )  # fmt: skip
    return (core + fork).ljust(256, b"\0")


def _image(names: list[bytes] | None = None) -> bytearray:
    """Version 4, one group of 16 MiB, a fresh log, a root directory kept in its inode."""
    image = bytearray(_GROUP_BLOCKS * _BLOCK)
    struct.pack_into(">4sIQ", image, 0, b"XFSB", _BLOCK, _GROUP_BLOCKS)
    struct.pack_into(">QQ", image, 48, _LOG_START, _ROOT)
    struct.pack_into(">IIII", image, 84, _GROUP_BLOCKS, 1, 0, _LOG_BLOCKS)
    struct.pack_into(">HHHH", image, 100, 0xB4A4 | 0x1000, 512, 256, 16)
    image[120:128] = bytes((12, 9, 8, 4, 12, 0, 0, 25))
    struct.pack_into(">QQQ", image, 128, 64, 60, 3000)
    struct.pack_into(">II", image, 200, 0x8A, 0x8A)
    _log_record(image, 0, 1, _UNMOUNT)
    fork = _directory([b"\xff\xfe", b"plain"] if names is None else names)
    root = _inode(0o040755, 1, len(fork), 0, 0, fork)
    image[_ROOT * 256 : _ROOT * 256 + 256] = root
    return image


def _log_record(image: bytearray, block: int, cycle: int, flags: int) -> None:
    at = _LOG_START * _BLOCK + block * 512
    struct.pack_into(">IIII", image, at, 0xFEEDBABE, cycle, 2, 512)
    struct.pack_into(">I", image, at + 40, 1)
    struct.pack_into(">I", image, at + 320, 32768)
    struct.pack_into(">IIBB", image, at + 512, cycle, 8, 0xAA, flags)


def _open(image: bytearray) -> XfsFilesystem:
    return XfsFilesystem.open(MemorySource(image))


def test_names_are_the_bytes_that_they_are() -> None:
    xfs = _open(_image())
    assert list(xfs.names(xfs.root)) == [(b"\xff\xfe", _ROOT + 1), (b"plain", _ROOT + 2)]


def test_lstat_is_whole() -> None:
    node = _open(_image()).stat(_ROOT)
    assert (node.mode, node.uid, node.gid, node.nlink) == (0o040755, 1000, 100, 2)
    assert node.mtime_ns == -5 * 10**9 + 7


def test_usage_is_what_the_kernel_computes() -> None:
    usage = _open(_image()).usage()
    assert usage.size == (_GROUP_BLOCKS - _LOG_BLOCKS) * _BLOCK
    assert usage.available == (3000 - 8) * _BLOCK
    assert (usage.inodes, usage.inodes_used) == (16384, 4)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"XFSb"),
        (4, struct.pack(">I", 8192)),
        (8, struct.pack(">Q", 1 << 60)),
        (16, struct.pack(">Q", 1)),
        (48, bytes(8)),
        (84, bytes(4)),
        (88, struct.pack(">I", 2)),
        (96, struct.pack(">I", 1 << 31)),
        (100, struct.pack(">H", 0xB4A6)),
        (100, struct.pack(">H", 0xF4A4)),
        (100, struct.pack(">H", 0xB6A4)),
        (104, struct.pack(">H", 300)),
        (122, b"\x0a"),
        (126, b"\x01"),
        (178, b"\x01"),
        (192, b"\x20"),
        (200, struct.pack(">II", 0x9A, 0x9A)),
        (200, struct.pack(">II", 0x8A, 0x88)),
    ],
)
def test_a_superblock_not_on_the_allow_list_is_refused(offset: int, value: bytes) -> None:
    image = _image()
    image[offset : offset + len(value)] = value
    with pytest.raises(Unsupported):
        _open(image)


def test_version_5_superblock_with_a_wrong_checksum_is_refused() -> None:
    image = _image()
    struct.pack_into(">H", image, 100, 0xB4A5)
    with pytest.raises(Unsupported, match="checksum"):
        _open(image)


def test_a_log_that_does_not_end_in_an_unmount_is_refused() -> None:
    image = _image()
    _log_record(image, 2, 1, _COMMIT)
    with pytest.raises(Unsupported, match="dirty"):
        _open(image)


def test_a_log_that_was_written_around_is_followed_to_its_head() -> None:
    image, total = _image(), _LOG_BLOCKS * _BLOCK // 512
    for block in range(0, total, 2):
        _log_record(image, block, 7 if block <= 1000 else 6, _COMMIT)
    with pytest.raises(Unsupported, match="dirty"):
        _open(image)
    _log_record(image, 1000, 7, _UNMOUNT)
    assert _open(image).root == _ROOT


def _full_log(cycle: int, flags: int) -> bytearray:
    """An image whose log holds one cycle throughout, and in its last record these flags."""
    image, total = _image(), _LOG_BLOCKS * _BLOCK // 512
    for block in range(0, total, 2):
        _log_record(image, block, cycle, flags if block == total - 2 else _COMMIT)
    return image


@pytest.mark.parametrize("cycle", [1, 7])
def test_log_full_to_its_end_is_clean_after_an_unmount(cycle: int) -> None:
    assert _open(_full_log(cycle, _UNMOUNT)).root == _ROOT
    with pytest.raises(Unsupported, match="dirty"):
        _open(_full_log(cycle, _COMMIT))


@pytest.mark.parametrize(("block", "cycle"), [(4000, 6), (4095, 5), (3, 8), (500, 6)])
def test_a_full_log_with_a_block_of_another_cycle_is_refused(block: int, cycle: int) -> None:
    image = _full_log(7, _UNMOUNT)
    struct.pack_into(">II", image, _LOG_START * _BLOCK + block * 512, cycle, cycle)
    with pytest.raises(Unsupported, match="log"):
        _open(image)


def test_a_full_log_whose_last_record_ends_before_it_is_refused() -> None:
    image, total = _full_log(7, _COMMIT), _LOG_BLOCKS * _BLOCK // 512
    _log_record(image, total - 4, 7, _UNMOUNT)
    for block in (total - 2, total - 1):
        struct.pack_into(">II", image, _LOG_START * _BLOCK + block * 512, 7, 7)
    with pytest.raises(Unsupported, match="another length"):
        _open(image)


@pytest.mark.parametrize("block", [900, 1100, 4095])
def test_a_log_with_a_hole_is_refused(block: int) -> None:
    image, total = _image(), _LOG_BLOCKS * _BLOCK // 512
    for each in range(0, total, 2):
        _log_record(image, each, 7 if each <= 1000 else 6, _UNMOUNT)
    struct.pack_into(">II", image, _LOG_START * _BLOCK + block * 512, 3, 3)
    with pytest.raises(Unsupported, match="log"):
        _open(image)


def test_an_empty_log_is_refused() -> None:
    image = _image()
    image[_LOG_START * _BLOCK : (_LOG_START + _LOG_BLOCKS) * _BLOCK] = bytes(_LOG_BLOCKS * _BLOCK)
    with pytest.raises(Unsupported, match="log"):
        _open(image)


@pytest.mark.parametrize("name", [b"", b"a/b", b"a\0b"])
def test_a_name_that_cannot_be_is_damage(name: bytes) -> None:
    xfs = _open(_image([name]))
    with pytest.raises(ReadFailed):
        list(xfs.names(xfs.root))


def test_a_directory_that_ends_before_its_entries_is_damage() -> None:
    image = _image()
    image[_ROOT * 256 + 100] = 200
    xfs = _open(image)
    with pytest.raises(ReadFailed):
        list(xfs.names(xfs.root))


@pytest.mark.parametrize("number", [0, _ROOT + 5, _GROUP_BLOCKS * 16, 1 << 63])
def test_an_inode_that_is_none_is_damage(number: int) -> None:
    with pytest.raises(ReadFailed):
        _open(_image()).stat(number)


def _extent(offset: int, start: int, count: int, unwritten: bool = False) -> bytes:
    return struct.pack(
        ">QQ", unwritten << 63 | offset << 9 | start >> 43, (start << 21 | count) & ~(-1 << 64)
    )


def _with_file(size: int, *extents: bytes) -> XfsFilesystem:
    image = _image()
    raw = _inode(0o100644, 2, size, len(extents), 100, b"".join(extents))
    image[(_ROOT + 1) * 256 : (_ROOT + 2) * 256] = raw
    image[100 * _BLOCK : 104 * _BLOCK] = b"D" * (4 * _BLOCK)
    return _open(image)


def test_holes_and_unwritten_extents_read_as_zeros() -> None:
    xfs = _with_file(5 * _BLOCK + 3, _extent(1, 100, 1), _extent(3, 101, 2, unwritten=True))
    data = xfs.read(_ROOT + 1, 0, 1 << 20)
    assert data == bytes(_BLOCK) + b"D" * _BLOCK + bytes(3 * _BLOCK + 3)
    assert xfs.ranges(_ROOT + 1) == [(_BLOCK, _BLOCK)]
    assert xfs.read(_ROOT + 1, _BLOCK - 2, 4) == b"\0\0DD"
    assert xfs.read(_ROOT + 1, 5 * _BLOCK + 3, 4) == b""


@pytest.mark.parametrize(
    "extents",
    [
        (_extent(1, 100, 1), _extent(1, 101, 1)),
        (_extent(2, 100, 1), _extent(0, 101, 1)),
        (_extent(0, 100, 0),),
        (_extent(0, _GROUP_BLOCKS - 1, 2),),
        (_extent(0, 1 << 50, 1),),
    ],
)
def test_extents_that_cannot_be_are_damage(extents: tuple[bytes, ...]) -> None:
    xfs = _with_file(10 * _BLOCK, *extents)
    with pytest.raises(ReadFailed):
        xfs.read(_ROOT + 1, 0, 1)


def test_a_realtime_file_is_left_to_the_appliance() -> None:
    image = _image()
    struct.pack_into(">H", image, _ROOT * 256 + 90, 1)
    xfs = _open(_image())
    with pytest.raises(Unsupported, match="realtime"):
        parse_inode(xfs._superblock, _ROOT, bytes(image[_ROOT * 256 : _ROOT * 256 + 256]))
