"""What a qcow2 header says, read without QEMU: what must be known before QEMU opens anything that
is named in it, what it does not check, and what ten thousand images are told apart by.

Layout: docs/interop/qcow2.txt in QEMU's sources.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_V3_FIELDS = struct.Struct(">QQQII")
_V2_LENGTH, _V3_LENGTH = 72, 104
_SNAPSHOT_LENGTH = 40  # without names and extra data
_DIRTY_BIT, _CORRUPT_BIT, _DATA_FILE_BIT = 1 << 0, 1 << 1, 1 << 2
_FEATURES_OF_ANY_QEMU = _DIRTY_BIT | _CORRUPT_BIT | _DATA_FILE_BIT
# QEMU's limits: block/qcow2.h
_LARGEST_L1 = 32 << 20
_LARGEST_REFCOUNT_TABLE = 8 << 20
_LONGEST_FORMAT = 15
_LARGEST_OFFSET = 1 << 56
_AUTOCLEAR_BITMAPS = 1 << 0
_EXTENSION_BITMAPS = 0x23852875
_EXTENSION_DATA_FILE = 0x44415441
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_END = 0
_LOOKED_AT = (_EXTENSION_BITMAPS, _EXTENSION_DATA_FILE, _EXTENSION_BACKING_FORMAT)
_LONGEST_BACKING_NAME = 1023
_LONGEST_EXTENSION = 1 << 16  # QEMU has none of its own; no path is as long
_SECTOR = 512
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00

# A table of 64 empty refcount blocks describes nothing; then the image is taken as complete.
_BLOCKS_LOOKED_AT = 64


@dataclass(frozen=True)
class Qcow2Header:
    """What is read of the header; sizes and offsets in bytes, names as they stand there.

    `snapshots` is how many there are, `snapshots_offset` where their table starts, and
    `snapshots_end` where it ends at the earliest, 0 if there is none. `sound` is False where QEMU
    does not take the header, or only QEMU knows whether it does. `features` are the incompatible
    and the compatible ones, as bits, without those that say how the image was left. `bitmaps` is
    the header extension of that name, where it holds: a program that did not know of it and wrote
    to the image has cleared the bit that says so.
    """

    version: int
    virtual_size: int
    cluster_size: int
    l1_offset: int
    l1_size: int
    refcount_table_offset: int
    refcount_table_size: int
    refcount_bits: int
    snapshots: int
    snapshots_offset: int
    snapshots_end: int
    backing: bytes | None
    backing_format: bytes | None
    data_file: bytes | None
    has_data_file: bool
    encrypted: bool
    dirty: bool
    corrupt: bool
    sound: bool
    features: tuple[int, int] = (0, 0)
    bitmaps: bytes | None = None


def _extensions(area: bytes) -> dict[int, bytes]:
    """Those that are looked at; there can be as many others as there is room for."""
    found = {}
    at = 0
    while at + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, at)
        if kind == _EXTENSION_END:
            break
        if kind in _LOOKED_AT:
            # The last one wins, as in QEMU.
            found[kind] = area[at + 8 : at + 8 + min(length, _LONGEST_EXTENSION)]
        at += 8 + (length + 7) // 8 * 8
    return found


def read_header(file: BinaryIO) -> Qcow2Header | None:
    """The header, or None where this is no qcow2 of a version and cluster size that QEMU opens."""
    file.seek(0)
    first = file.read(_V3_LENGTH)
    if len(first) < _HEADER.size or not first.startswith(MAGIC):
        return None
    fields = _HEADER.unpack_from(first)
    version, backing_offset, backing_length, cluster_bits, size, crypt = fields[1:7]
    l1_entries, l1_offset, table_offset, table_clusters = fields[7:11]
    snapshots, snapshots_offset = fields[11:13]
    if version not in (2, 3) or not 9 <= cluster_bits <= 21:
        return None
    cluster_size = 1 << cluster_bits
    features, compatible, autoclear, refcount_order, length = 0, 0, 0, 4, _V2_LENGTH
    if version == 3:
        if len(first) < _V3_LENGTH:
            return None
        fields = _V3_FIELDS.unpack_from(first, _V2_LENGTH)
        features, compatible, autoclear, refcount_order, length = fields
    if refcount_order > 6:
        return None
    extensions: dict[int, bytes] = {}
    if length < cluster_size:
        end = min(backing_offset or cluster_size, cluster_size)
        file.seek(length)
        extensions = _extensions(file.read(max(end - length, 0)))
    backing = None
    placed = (
        backing_length <= _LONGEST_BACKING_NAME and backing_offset + backing_length <= cluster_size
    )
    if backing_offset and backing_length and placed:
        file.seek(backing_offset)
        backing = file.read(backing_length)
    backing_format = None
    if backing:
        named = extensions.get(_EXTENSION_BACKING_FORMAT)
        backing_format = named and named[: _LONGEST_FORMAT + 1]  # enough to be too long
    sound = (
        len(backing_format or b"") <= _LONGEST_FORMAT
        and (placed or not backing_offset)
        and not features & ~_FEATURES_OF_ANY_QEMU
        and (_V3_LENGTH <= length <= cluster_size or version == 2)
        and table_offset > 0
        and 0 < table_clusters <= _LARGEST_REFCOUNT_TABLE // cluster_size
        and not (table_offset | l1_offset | snapshots_offset) % cluster_size
        and (table_offset | l1_offset | snapshots_offset) < _LARGEST_OFFSET
        and -(-size // (cluster_size * (cluster_size // 8))) <= l1_entries <= _LARGEST_L1 // 8
    )
    return Qcow2Header(
        version=version,
        virtual_size=size // _SECTOR * _SECTOR,
        cluster_size=cluster_size,
        l1_offset=l1_offset,
        l1_size=l1_entries * 8,
        refcount_table_offset=table_offset,
        refcount_table_size=table_clusters * cluster_size,
        refcount_bits=1 << refcount_order,
        snapshots=snapshots,
        snapshots_offset=snapshots_offset,
        snapshots_end=snapshots_offset + snapshots * _SNAPSHOT_LENGTH if snapshots else 0,
        backing=backing,
        backing_format=backing_format,
        data_file=extensions.get(_EXTENSION_DATA_FILE) if features & _DATA_FILE_BIT else None,
        has_data_file=bool(features & _DATA_FILE_BIT),
        encrypted=crypt != 0,
        dirty=bool(features & _DIRTY_BIT),
        corrupt=bool(features & _CORRUPT_BIT),
        sound=sound,
        features=(features & ~(_DIRTY_BIT | _CORRUPT_BIT), compatible),
        bitmaps=extensions.get(_EXTENSION_BITMAPS) if autoclear & _AUTOCLEAR_BITMAPS else None,
    )


def size_needed(file: BinaryIO, header: Qcow2Header) -> int:
    """How long the file has to be, in bytes, to hold its tables and its last used cluster.

    QEMU opens a truncated image without a word and reads zeros past its end. Which cluster is the
    last used one is found from the end of the refcounts, so this reads little of a large image.
    """
    needed = max(
        header.l1_offset + header.l1_size,
        header.refcount_table_offset + header.refcount_table_size,
    )
    length = file.seek(0, os.SEEK_END)
    if needed > length:
        return needed
    file.seek(header.refcount_table_offset)
    table = file.read(min(header.refcount_table_size, _LARGEST_REFCOUNT_TABLE))
    looked_at = 0
    end = (len(table.rstrip(b"\0")) + 7) // 8 * 8
    for at in range(end - 8, -8, -8):
        block = int.from_bytes(table[at : at + 8], "big") & _OFFSET_MASK
        if block == 0:
            continue
        if block + header.cluster_size > length:
            return max(needed, block + header.cluster_size)
        file.seek(block)
        used = len(file.read(header.cluster_size).rstrip(b"\0"))
        if used:
            per_block = header.cluster_size * 8 // header.refcount_bits
            last = at // 8 * per_block + (used - 1) * 8 // header.refcount_bits
            # The last cluster itself may be cut short: a table ends where its last entry does.
            return max(needed, last * header.cluster_size + 1)
        looked_at += 1
        if looked_at == _BLOCKS_LOOKED_AT:
            break
    return needed
