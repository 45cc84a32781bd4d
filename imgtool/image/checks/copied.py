"""Whether an overlay and its base were copied together: then the base's file may be the newer one,
and was not changed.

Times of files alone cannot tell that from a base that was replaced. What can, is an ext filesystem
of which the overlay holds the superblock: base and overlay have the same one (UUID, time of its
making), the base's was last written before the overlay's, and neither was since its file was made,
by the clock of the guest and that of the host; and the files were made one after the other, each at
once. Everything else, other filesystems too, is taken for changed.

Layout: struct ext4_super_block in Linux's fs/ext4/ext4.h; UEFI specification 5.3 (GPT); statx(2).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import ImgtoolError
from imgtool.host.libc import libc
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.info import ImageInfo
from imgtool.image.qemu.disk_reader import open_contents

_TOGETHER = 60  # seconds that may be between the end of one copy and the beginning of the next
_AT_ONCE, _SLOWEST = 2, 5 << 20  # seconds, and bytes a second, that a copy takes
_SECTOR = 512
_SUPERBLOCK = 1024
_MAGIC, _WRITTEN, _UUID, _MADE = 0x38, 0x30, 0x68, 0x108
_MOST_PARTITIONS = 128
_AT_FDCWD, _BIRTH_TIME = -100, 0x800
_BIRTH_AT = 80

Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class _Superblock:
    content: bytes

    @property
    def identity(self) -> bytes:
        """What two states of one filesystem have in common."""
        return self.content[_UUID : _UUID + 16] + self.content[_MADE : _MADE + 4]

    @property
    def written(self) -> int:
        """When it was last written, in seconds since 1970."""
        return int.from_bytes(self.content[_WRITTEN : _WRITTEN + 4], "little")


def copied_together(links: Sequence[ImageInfo]) -> bool:
    """Whether it is sure that the first link and the one below it were copied in one go."""
    overlay, base = links[0].path, links[1].path
    born, base_born = _born(overlay), _born(base)
    if born is None or base_born is None or len(links[0].files) + len(links[1].files) > 2:
        return False
    before = overlay.stat()
    if not before.st_mtime <= base_born <= before.st_mtime + _TOGETHER:
        return False
    if not all(_in_one_go(file, at) for file, at in ((overlay, born), (base, base_born))):
        return False
    try:
        with (
            open_contents(Chain(tuple(links))) as (above, _),
            open_contents(Chain(tuple(links[1:]))) as (below, _),
        ):
            pairs = [
                pair for start in _starts(above) if (pair := _both(above, below, start)) is not None
            ]
    except (ImgtoolError, OSError):
        return False  # it cannot be read, so it does not tell
    return bool(pairs) and all(
        one.identity == other.identity
        and other.written <= one.written
        and one.written < born
        and other.written < base_born
        for one, other in pairs
    )


def _in_one_go(path: Path, born: float) -> bool:
    """Whether a file was last written by who made it: in the time that a copy takes."""
    status = path.stat()
    return status.st_mtime - born <= _AT_ONCE + status.st_blocks * 512 / _SLOWEST


def _both(above: Read, below: Read, start: int) -> tuple[_Superblock, _Superblock] | None:
    """The superblocks at a place, where there is an ext filesystem that the overlay wrote to."""
    found = [_Superblock(read(start + _SUPERBLOCK, _SUPERBLOCK)) for read in (above, below)]
    if found[0].content == found[1].content or len(found[1].content) < _SUPERBLOCK:
        return None
    if found[0].content[_MAGIC : _MAGIC + 2] != b"\x53\xef":
        return None
    return found[0], found[1]


def _starts(read: Read) -> Iterator[int]:
    """Where a filesystem may start, in bytes: the disk, and the partitions of its table."""
    yield 0
    sectors = read(0, 2 * _SECTOR)
    if sectors[_SECTOR : _SECTOR + 8] == b"EFI PART":
        at, count, size = struct.unpack_from("<QII", sectors, _SECTOR + 72)
        if size == 128 and at < 1 << 40:
            table = read(at * _SECTOR, min(count, _MOST_PARTITIONS) * size)
            for entry in range(0, len(table) - size + 1, size):
                if any(table[entry : entry + 16]):
                    yield int.from_bytes(table[entry + 32 : entry + 40], "little") * _SECTOR
    elif sectors[510:512] == b"\x55\xaa":
        for entry in range(446, 510, 16):
            if sectors[entry + 4]:
                yield int.from_bytes(sectors[entry + 8 : entry + 12], "little") * _SECTOR


def _born(path: Path) -> float | None:
    """When a file was made, in seconds since 1970; None where the file system does not tell."""
    answer = ctypes.create_string_buffer(256)
    statx = getattr(libc, "statx", None)
    if statx is None or statx(_AT_FDCWD, os.fsencode(path), 0, _BIRTH_TIME, answer) != 0:
        return None
    if not int.from_bytes(answer.raw[:4], "little") & _BIRTH_TIME:
        return None
    seconds, rest = struct.unpack_from("<qI", answer.raw, _BIRTH_AT)
    return float(seconds) + float(rest) / 1e9
