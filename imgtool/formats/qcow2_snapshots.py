"""The table of internal snapshots of a qcow2 image, read without QEMU.

Layout: docs/interop/qcow2.txt in QEMU's sources, "Snapshots"; limits: block/qcow2.h there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import BinaryIO

from imgtool.formats.qcow2 import Qcow2Header

_ENTRY = struct.Struct(">QIHHIIQII")
_LARGE_STATE = struct.Struct(">Q")
_STATE_AND_SIZE = struct.Struct(">QQ")
_FEATURES_AT, _EXTENDED_L2 = 72, 1 << 4
_MOST_EXTRA = 1024  # what QEMU takes
_LARGEST_TABLE = 64 << 20
# QEMU tells no more of an id and a name.
_LONGEST_ID, _LONGEST_NAME = 127, 255
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_L1_PART = 64 << 10  # of a table that is read at once, in bytes


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
    """The snapshots in the table's order; None where the table is not as it should be, or larger
    than QEMU takes. Of longer ids and names what QEMU tells of them."""
    rows = []
    at = header.snapshots_offset
    for _ in range(header.snapshots):
        at = (at + 7) // 8 * 8
        if at - header.snapshots_offset > _LARGEST_TABLE:
            return None
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
                id=rest[extra : extra + min(id_length, _LONGEST_ID)],
                name=rest[extra + id_length :][:_LONGEST_NAME],
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


def _clusters(file: BinaryIO, offset: int, entries: int) -> Iterator[tuple[int, int]]:
    """The clusters that a table of so many entries names, a part at a time: how many, and all of
    them as one number; fewer if the file ends."""
    mask = int.from_bytes(_OFFSET_MASK.to_bytes(8) * (_L1_PART // 8))
    for at in range(0, entries * 8, _L1_PART):
        file.seek(offset + at)
        table = file.read(min(_L1_PART, entries * 8 - at))
        count = len(table) // 8
        yield count, int.from_bytes(table[: count * 8].ljust(_L1_PART, b"\0")) & mask


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
    active = _clusters(file, header.l1_offset, min(used, header.l1_size // 8))
    then = _clusters(file, row.l1_offset, min(used, row.l1_size // 8))
    return all(here == there for here, there in zip_longest(active, then))


def _has_extended_l2(file: BinaryIO) -> bool:
    file.seek(_FEATURES_AT)
    return bool(int.from_bytes(file.read(8), "big") & _EXTENDED_L2)
