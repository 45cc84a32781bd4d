"""The boot region of exFAT, and what the kernel's exfat makes of it.

Source: the exFAT file system specification (Microsoft), sections 3 "Main and Backup Boot Regions"
and 3.4 "Boot Checksum Sub-region", and Linux, fs/exfat/super.c.
"""

from __future__ import annotations

import struct
from array import array
from sys import byteorder
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Source

FIRST_CLUSTER = 2
_NAME = b"EXFAT   "
_SECTOR_SHIFTS = range(9, 13)
_LARGEST_CLUSTER_SHIFT = 25  # 32 MiB
_MOST_CLUSTERS = 0xFFFFFFF5
_CHECKED_SECTORS = 11
_NOT_IN_CHECKSUM = (106, 107, 112)  # the flags and how full it is
_DIRTY = 0x02
_REVISION = b"\x00\x01"


class Geometry(NamedTuple):
    """Where things are, in bytes."""

    sector_size: int
    cluster_size: int
    clusters: int
    table: int
    data: int
    root_cluster: int

    @property
    def end(self) -> int:
        """The number after the last cluster's."""
        return self.clusters + FIRST_CLUSTER


def read_geometry(source: Source) -> Geometry:
    """The geometry of a volume that has nothing odd; `Unsupported` for any other.

    A dirty volume is mounted like a clean one, and so it is read.
    """
    if source.size < _CHECKED_SECTORS * 512 + 512:
        raise Unsupported("the volume is too small for exFAT")
    boot = source.read(0, 512)
    if boot[3:11] != _NAME or boot[510:512] != b"\x55\xaa" or any(boot[11:64]):
        raise Unsupported("the boot sector is not one of exFAT")
    length, table, table_length, data, clusters, root = struct.unpack_from("<QIIIII", boot, 72)
    flags, sector_shift, cluster_shift, tables = struct.unpack_from("<HBBB", boot, 106)
    if sector_shift not in _SECTOR_SHIFTS:
        raise Unsupported(f"exFAT with sectors of 2^{sector_shift} bytes")
    if sector_shift + cluster_shift > _LARGEST_CLUSTER_SHIFT:
        raise Unsupported(f"exFAT with clusters of 2^{sector_shift + cluster_shift} bytes")
    if tables != 1:
        raise Unsupported(f"exFAT with {tables} tables")
    if boot[104:106] != _REVISION:
        raise Unsupported(f"exFAT of revision {boot[105]}.{boot[104]:02}")
    if flags & ~_DIRTY:
        raise Unsupported(f"exFAT with the volume flags 0x{flags:x}")
    sector = 1 << sector_shift
    if (
        not 0 < clusters <= _MOST_CLUSTERS
        or table < _CHECKED_SECTORS + 1
        or table_length * sector < (clusters + FIRST_CLUSTER) * 4
        or data < table + table_length
        or data + (clusters << cluster_shift) > length
        or length * sector > source.size
    ):
        raise Unsupported("exFAT with areas outside of the volume")
    if not FIRST_CLUSTER <= root < clusters + FIRST_CLUSTER:
        raise Unsupported("exFAT with its root directory outside of the volume")
    _check_region(source.read(0, (_CHECKED_SECTORS + 1) * sector), sector)
    return Geometry(
        sector_size=sector,
        cluster_size=sector << cluster_shift,
        clusters=clusters,
        table=table * sector,
        data=data * sector,
        root_cluster=root,
    )


def _check_region(region: bytes, sector: int) -> None:
    checked = bytearray(region[: _CHECKED_SECTORS * sector])
    stored = region[_CHECKED_SECTORS * sector :]
    start = checked[: _NOT_IN_CHECKSUM[-1] + 1]
    for at in reversed(_NOT_IN_CHECKSUM):
        del start[at]
    found = rotated_sum(start + checked[_NOT_IN_CHECKSUM[-1] + 1 :], 32)
    if stored != found.to_bytes(4, "little") * (sector // 4):
        raise Unsupported("exFAT with a wrong checksum of the boot region")


def rotated_sum(data: bytes | bytearray, bits: int) -> int:
    """exFAT's checksum of 16 or 32 bits: rotate right by one, add the next byte."""
    total, mask, high = 0, (1 << bits) - 1, bits - 1
    for byte in data:
        total = ((total << high | total >> 1) + byte) & mask
    return total


def numbers(data: bytes, code: str) -> array[int]:
    """Little-endian numbers: `H` of 16 bits, `I` of 32."""
    found = array(code, data)
    if byteorder == "big":
        found.byteswap()
    return found
