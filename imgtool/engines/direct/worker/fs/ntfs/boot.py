"""The boot sector of NTFS: sizes and where the master file table begins."""

from __future__ import annotations

import struct
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Source

_CLUSTER_SIZES = tuple(1 << bits for bits in range(9, 17))
INDEX_BLOCK = 4096


class Geometry(NamedTuple):
    """Sizes in bytes; places in clusters."""

    cluster: int
    clusters: int
    record: int
    table: int
    mirror: int


def read_geometry(source: Source) -> Geometry:
    """The geometry of a volume that has nothing odd; `Unsupported` for any other."""
    if source.size < 65536:
        raise Unsupported("the volume is too small for NTFS")
    boot = source.read(0, 512)
    if boot[3:11] != b"NTFS    " or boot[510:512] != b"\x55\xaa":
        raise Unsupported("the boot sector is not one of NTFS")
    sector, per_cluster = struct.unpack_from("<HB", boot, 11)
    if per_cluster > 0x80:
        per_cluster = 1 << (256 - per_cluster) if per_cluster >= 0xF4 else 0
    sectors, table, mirror, record, block = struct.unpack_from("<QQQb3xb", boot, 40)
    cluster = sector * per_cluster
    if sector not in (512, 1024, 2048, 4096) or cluster not in _CLUSTER_SIZES:
        raise Unsupported(f"NTFS with sectors of {sector} and clusters of {cluster} bytes")
    if any(boot[14:21]) or any(boot[22:24]) or any(boot[32:36]):
        raise Unsupported("NTFS with an odd boot sector")
    record_size = _size(record, cluster)
    if record_size not in (1024, 4096) or _size(block, cluster) != INDEX_BLOCK:
        raise Unsupported("NTFS with records of an odd size")
    clusters = sectors // per_cluster
    if not 0 < sectors * sector <= source.size or not (0 < table < clusters > mirror > 0):
        raise Unsupported("NTFS with areas outside of the volume")
    return Geometry(cluster, clusters, record_size, table, mirror)


def _size(clusters: int, cluster: int) -> int:
    """A record's size: so many clusters, or, below zero, a power of two of bytes."""
    if clusters > 0:
        return clusters * cluster
    return 1 << -clusters if -clusters <= 16 else 0
