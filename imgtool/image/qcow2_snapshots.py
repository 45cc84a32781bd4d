"""The table of internal snapshots of a qcow2 image, read without QEMU.

Layout: docs/interop/qcow2.txt in QEMU's sources, "Snapshots".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from imgtool.image.qcow2 import Qcow2Header

_ENTRY = struct.Struct(">QIHHIIQII")
_LARGE_STATE = struct.Struct(">Q")
_STATE_AND_SIZE = struct.Struct(">QQ")
_FEATURES_AT, _EXTENDED_L2 = 72, 1 << 4
_MOST_EXTRA = 1024  # what QEMU takes
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_LARGEST_L1 = 32 << 20  # QEMU's limit


@dataclass(frozen=True)
class SnapshotRow:
    """One row: id and name as they stand there, time in nanoseconds since 1970 UTC, `vm_clock` in
    nanoseconds of run time, sizes and offsets in bytes; `l1_size` is that of its L1 table.
    `disk_size` is None where it is not told: then the disk had the size that it has now."""

    id: bytes
    name: bytes
    time: int
    vm_clock: int
    vm_state_size: int
    l1_offset: int
    l1_size: int
    disk_size: int | None = None


def read_snapshots(file: BinaryIO, header: Qcow2Header) -> tuple[SnapshotRow, ...] | None:
    """The snapshots in the table's order; None where the table is not as it should be."""
    rows = []
    at = header.snapshots_offset
    for _ in range(header.snapshots):
        at = (at + 7) // 8 * 8
        file.seek(at)
        fixed = file.read(_ENTRY.size)
        if len(fixed) < _ENTRY.size:
            return None
        l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, state, extra = (
            _ENTRY.unpack(fixed)
        )
        if extra > _MOST_EXTRA:
            return None
        rest = file.read(extra + id_length + name_length)
        if len(rest) < extra + id_length + name_length:
            return None
        if extra >= _LARGE_STATE.size:
            (state,) = _LARGE_STATE.unpack_from(rest)
        disk_size = None
        if extra >= _STATE_AND_SIZE.size:
            _, disk_size = _STATE_AND_SIZE.unpack_from(rest)
        rows.append(
            SnapshotRow(
                id=rest[extra : extra + id_length],
                name=rest[extra + id_length :],
                time=seconds * 10**9 + nanoseconds,
                vm_clock=clock,
                vm_state_size=state,
                l1_offset=l1_offset,
                l1_size=l1_entries * 8,
                disk_size=disk_size,
            )
        )
        at += _ENTRY.size + len(rest)
    return tuple(rows)


def _clusters(file: BinaryIO, offset: int, size: int) -> list[int]:
    file.seek(offset)
    table = file.read(min(size, _LARGEST_L1))
    return [entry & _OFFSET_MASK for (entry,) in struct.iter_unpack(">Q", table)]


def same_as_active(file: BinaryIO, header: Qcow2Header, row: SnapshotRow) -> bool:
    """Whether the present state and the snapshot are made of the very same clusters.

    False can also mean that the same bytes were written again. The state of a virtual machine,
    which lies behind the disk, does not count.
    """
    if row.disk_size is not None and row.disk_size != header.virtual_size:
        return False
    entry = 16 if header.version == 3 and _has_extended_l2(file) else 8
    covered = header.cluster_size * (header.cluster_size // entry)
    used = -(-header.virtual_size // covered)
    active = _clusters(file, header.l1_offset, header.l1_size)[:used]
    return active == _clusters(file, row.l1_offset, row.l1_size)[:used]


def _has_extended_l2(file: BinaryIO) -> bool:
    file.seek(_FEATURES_AT)
    return bool(int.from_bytes(file.read(8), "big") & _EXTENDED_L2)
