"""The boot sector of FAT12, FAT16 and FAT32, and what the kernel's vfat makes of it.

Source: the FAT specification (fatgen103), section "Boot Sector and BPB", and Linux, fs/fat/inode.c.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Source
from imgtool.engines.direct.worker.fs.exfat.boot import FIRST_CLUSTER

_LAST_FAT12 = 0xFF4  # the kernel's MAX_FAT12: one cluster more is FAT16
_MOST_CLUSTERS = {12: 0xFF4, 16: 0xFFF4, 32: 0x0FFFFFF6}
_LARGEST_CLUSTER = 64 * 1024
_FOREIGN = (b"NTFS    ", b"EXFAT   ", b"-FVE-FS-", b"ReFS\0\0\0\0")
_BITLOCKER_TO_GO = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")


class Geometry(NamedTuple):
    """Where things are, in bytes; `bits` is the width of an entry of the table."""

    bits: int
    cluster_size: int
    clusters: int
    table: int
    root_offset: int  # of the root directory of FAT12 and FAT16
    root_size: int
    root_cluster: int  # of the root directory of FAT32
    data: int

    @property
    def end(self) -> int:
        """The number after the last cluster's."""
        return self.clusters + FIRST_CLUSTER


def read_geometry(source: Source) -> Geometry:
    """The geometry of a volume that has nothing odd; `Unsupported` for any other."""
    if source.size < 4096:
        raise Unsupported("the volume is too small for FAT")
    boot = source.read(0, 512)
    _check_identity(boot)
    sector, per_cluster, reserved, tables, root_entries, sectors, media, table_sectors = (
        struct.unpack_from("<HBHBHHBH", boot, 11)
    )
    sectors = sectors or struct.unpack_from("<I", boot, 32)[0]
    if sector not in (512, 1024, 2048, 4096):
        raise Unsupported(f"FAT with sectors of {sector} bytes")
    if per_cluster == 0 or per_cluster & (per_cluster - 1):
        raise Unsupported(f"FAT with {per_cluster} sectors a cluster")
    if per_cluster * sector > _LARGEST_CLUSTER:
        raise Unsupported(f"FAT with clusters of {per_cluster * sector} bytes")
    if reserved == 0 or tables not in (1, 2) or (media < 0xF8 and media != 0xF0):
        raise Unsupported("FAT with an odd boot sector")
    bits, root_cluster = 0, 0
    if table_sectors == 0:
        bits = 32
        table_sectors, flags, version, root_cluster = struct.unpack_from("<IHHI", boot, 36)
        if flags & 0x80 or version or root_entries:
            raise Unsupported("FAT32 with an odd boot sector")
    elif root_entries == 0 or root_entries % (sector // 32):
        raise Unsupported(f"FAT with a root directory of {root_entries} entries")
    table_start = reserved
    root_start = table_start + tables * table_sectors
    data_start = root_start + root_entries * 32 // sector
    if table_sectors == 0 or data_start >= sectors or sectors * sector > source.size:
        raise Unsupported("FAT with areas outside of the volume")
    clusters = (sectors - data_start) // per_cluster
    bits = bits or (16 if clusters > _LAST_FAT12 else 12)
    clusters = min(clusters, table_sectors * sector * 8 // bits - FIRST_CLUSTER)
    if not 0 < clusters <= _MOST_CLUSTERS[bits]:
        raise Unsupported(f"FAT{bits} with {clusters} clusters")
    geometry = Geometry(
        bits=bits,
        cluster_size=per_cluster * sector,
        clusters=clusters,
        table=table_start * sector,
        root_offset=root_start * sector,
        root_size=root_entries * 32,
        root_cluster=root_cluster,
        data=data_start * sector,
    )
    if bits == 32 and not FIRST_CLUSTER <= root_cluster < geometry.end:
        raise Unsupported("FAT32 with its root directory outside of the volume")
    return geometry


def _check_identity(boot: bytes) -> None:
    if boot[510:512] != b"\x55\xaa" or boot[0] not in (0xEB, 0xE9):
        raise Unsupported("the boot sector is not one of FAT")
    if boot[3:11] in _FOREIGN or boot[424:440] == _BITLOCKER_TO_GO:
        raise Unsupported("the boot sector is that of another filesystem")
