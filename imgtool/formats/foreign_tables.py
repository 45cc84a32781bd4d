"""Partition tables of other systems than PCs: which one a disk has, by its own marks.

Their rows are not read here, but a disk that has one is not empty, and not without a table. The
names are those of libparted, which reads most of them; of Ultrix libblkid's. A mark of few bytes
counts only with what else the system's own kernel looks at: a checksum, or partitions that lie on
the disk.

Sources: Linux, block/partitions/ (sun.c, sgi.c, atari.c, mac.c, amiga.c, ultrix.c, aix.c);
FreeBSD, sys/disklabel.h; util-linux, libblkid/src/partitions; parted, libparted/labels/pc98.c.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Callable

Read = Callable[[int, int], bytes]

_SECTOR = 512
_HEAD = 16 << 10
_ULTRIX_AT, _ULTRIX = 16384 - 72, 0x00029562
_AMIGA_SECTORS = 16
_BSD, _BSD_AT = 0x82564557, (512, 64, 128)
_ATARI = frozenset((b"GEM", b"BGM", b"LNX", b"SWP", b"RAW", b"XGM"))

# For those who read a table's name
TITLES = {
    "aix": "AIX",
    "amiga": "Amiga",
    "atari": "Atari",
    "bsd": "BSD",
    "dvh": "SGI",
    "mac": "Apple",
    "pc98": "PC-98",
    "sun": "Sun",
    "ultrix": "Ultrix",
}
# What stands for a volume with one of them where a filesystem's type would stand.
SUFFIX = "_table"


def foreign_table(read: Read, size: int) -> str | None:
    """The name of the table of another system on a disk, or a partition, of `size` bytes.

    None if there is none; `read(offset, length)` gives its bytes, fewer past its end.
    """
    head = read(0, min(_HEAD, size)).ljust(_HEAD, b"\0")
    for name, test in _TESTS.items():
        if test(head, size):
            return name
    return None


def _sun(head: bytes, size: int) -> bool:
    if head[508:510] != b"\xda\xbe":
        return False
    return not functools.reduce(operator.xor, struct.unpack_from(">256H", head))


def _sgi(head: bytes, size: int) -> bool:
    if head[:4] != b"\x0b\xe5\xa9\x41":
        return False
    return not sum(struct.unpack_from(">128I", head)) & 0xFFFFFFFF


def _bsd(head: bytes, size: int) -> bool:
    # Both magic numbers: of the checksum, tools other than the BSDs' own have their own idea.
    return any(
        struct.unpack_from("<I", head, at) == (_BSD,) == struct.unpack_from("<I", head, at + 132)
        for at in _BSD_AT
    )


def _mac(head: bytes, size: int) -> bool:
    block = int.from_bytes(head[2:4], "big")
    if head[:2] != b"ER" or block not in (512, 1024, 2048, 4096):
        return False
    return head[block : block + 2] in (b"PM", b"TS")


def _atari(head: bytes, size: int) -> bool:
    used = [
        entry for entry in struct.iter_unpack(">B3sII", head[0x1C6 : 0x1C6 + 48]) if entry[0] & 1
    ]
    if not used or head[510:512] == b"\x55\xaa":
        return False
    return all(
        name in _ATARI and start and count and (start + count) * _SECTOR <= size
        for _, name, start, count in used
    )


def _amiga(head: bytes, size: int) -> bool:
    for sector in range(_AMIGA_SECTORS):
        block = head[sector * _SECTOR : (sector + 1) * _SECTOR]
        if block[:4] != b"RDSK":
            continue
        longs = int.from_bytes(block[4:8], "big")
        if 16 <= longs <= 128:
            return not sum(struct.unpack_from(f">{longs}I", block)) & 0xFFFFFFFF
    return False


def _aix(head: bytes, size: int) -> bool:
    return head[:4] == b"\xc9\xc2\xd4\xc1"


def _ultrix(head: bytes, size: int) -> bool:
    return struct.unpack_from("<II", head, _ULTRIX_AT) == (_ULTRIX, 1)


def _pc98(head: bytes, size: int) -> bool:
    return head[4:8] == b"IPL1" and head[510:512] == b"\x55\xaa"


_TESTS: dict[str, Callable[[bytes, int], bool]] = {
    "sun": _sun,
    "dvh": _sgi,
    "bsd": _bsd,
    "mac": _mac,
    "amiga": _amiga,
    "aix": _aix,
    "ultrix": _ultrix,
    "pc98": _pc98,
    "atari": _atari,
}
