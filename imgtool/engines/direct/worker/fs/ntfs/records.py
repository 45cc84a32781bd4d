"""Records of NTFS's master file table and their attributes.

Source: the NTFS documentation of the Linux-NTFS project ("FILE Record", "Attributes", "Data Runs").
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported

STANDARD_INFORMATION, ATTRIBUTE_LIST, VOLUME_INFORMATION = 0x10, 0x20, 0x70
DATA, INDEX_ROOT, INDEX_ALLOCATION, BITMAP = 0x80, 0x90, 0xA0, 0xB0
COMPRESSED, ENCRYPTED, SPARSE = 0x0001, 0x4000, 0x8000
_END = 0xFFFFFFFF
_FIXUP_STRIDE = 512
_IN_USE, _IS_DIRECTORY = 1, 2
_MOST_RUNS = 500_000
NUMBER = (1 << 48) - 1  # of a file reference: the record; above it the sequence number
HOLE = -1


class Damaged(Unsupported):
    """A structure does not hold together. The reference decides what that means."""


class Extent(NamedTuple):
    """A piece of a stream in clusters; `place` is `HOLE` where nothing is allocated."""

    start: int
    place: int
    clusters: int


class Attribute(NamedTuple):
    """One attribute, or one extent of it. `value` is None where the content is in runs."""

    kind: int
    name: bytes
    flags: int
    instance: int
    value: bytes | None
    lowest: int
    highest: int
    unit_bits: int
    allocated: int
    size: int
    initialized: int
    runs: tuple[Extent, ...]


class Record(NamedTuple):
    """One record of the table."""

    sequence: int
    links: int
    in_use: bool
    is_directory: bool
    base: int
    used: bytes
    attributes: tuple[Attribute, ...]


def fixed_up(block: bytes, magic: bytes) -> bytes:
    """A record or an index block with the ends of its sectors put back."""
    offset, count = struct.unpack_from("<HH", block, 4)
    sectors = len(block) // _FIXUP_STRIDE
    if block[:4] != magic or count != sectors + 1 or offset + 2 * count > _FIXUP_STRIDE - 2:
        raise Damaged("an NTFS record is damaged")
    restored = bytearray(block)
    check = block[offset : offset + 2]
    for sector in range(sectors):
        end = (sector + 1) * _FIXUP_STRIDE
        if block[end - 2 : end] != check:
            raise Damaged("an NTFS record was torn in writing")
        original = offset + 2 + 2 * sector
        restored[end - 2 : end] = block[original : original + 2]
    return bytes(restored)


def parse_record(block: bytes, clusters: int) -> Record:
    """A record of the table; `clusters` is the size of the volume."""
    block = fixed_up(block, b"FILE")
    sequence, links, first, flags, used, _, base = struct.unpack_from("<HHHHIIQ", block, 16)
    if not 42 <= first <= used <= len(block):
        raise Damaged("an NTFS record is damaged")
    attributes = []
    at = first
    while True:
        if at + 4 > used:
            raise Damaged("an NTFS record has no end")
        (kind,) = struct.unpack_from("<I", block, at)
        if kind == _END:
            break
        if at + 24 > used:
            raise Damaged("an NTFS record has no end")
        (length,) = struct.unpack_from("<I", block, at + 4)
        if length < 24 or length % 8 or at + length > used:
            raise Damaged("an NTFS attribute is damaged")
        attributes.append(_attribute(kind, block[at : at + length], clusters))
        at += length
    return Record(
        sequence=sequence,
        links=links,
        in_use=bool(flags & _IN_USE),
        is_directory=bool(flags & _IS_DIRECTORY),
        base=base,
        used=block[:used],
        attributes=tuple(attributes),
    )


def _attribute(kind: int, raw: bytes, clusters: int) -> Attribute:
    in_runs, name_length, name_at, flags, instance = struct.unpack_from("<BBHHH", raw, 8)
    name = raw[name_at : name_at + 2 * name_length]
    if len(name) != 2 * name_length or in_runs > 1:
        raise Damaged("an NTFS attribute is damaged")
    if not in_runs:
        size, value_at = struct.unpack_from("<IH", raw, 16)
        value = raw[value_at : value_at + size]
        if len(value) != size:
            raise Damaged("an NTFS attribute is damaged")
        allocated = size + 7 & ~7
        return Attribute(kind, name, flags, instance, value, 0, 0, 0, allocated, size, size, ())
    if len(raw) < 64:
        raise Damaged("an NTFS attribute is damaged")
    lowest, highest, pairs, unit_bits, allocated, size, initialized = struct.unpack_from(
        "<QqHB5xqqq", raw, 16
    )
    if flags & (COMPRESSED | SPARSE) and lowest == 0:
        if len(raw) < 72:
            raise Damaged("an NTFS attribute is damaged")
        (allocated,) = struct.unpack_from("<q", raw, 64)
    if lowest == 0 and not 0 <= initialized <= size:
        raise Damaged("an NTFS attribute has impossible sizes")
    runs = tuple(_runs(raw[pairs:], lowest, clusters))
    if (runs[-1].start + runs[-1].clusters if runs else lowest) != highest + 1:
        raise Damaged("an NTFS attribute has other clusters than it says")
    return Attribute(
        kind,
        name,
        flags,
        instance,
        None,
        lowest,
        highest,
        unit_bits,
        allocated,
        size,
        initialized,
        runs,
    )


def _runs(pairs: bytes, start: int, clusters: int) -> list[Extent]:
    """The mapping pairs: each a length and the distance of its place from the one before."""
    runs: list[Extent] = []
    at, place = 0, 0
    while at < len(pairs) and pairs[at]:
        length_size, place_size = pairs[at] & 15, pairs[at] >> 4
        end = at + 1 + length_size + place_size
        if not 0 < length_size <= 8 or place_size > 8 or end > len(pairs):
            raise Damaged("an NTFS run list is damaged")
        at += 1
        count = int.from_bytes(pairs[at : at + length_size], "little", signed=True)
        at += length_size
        if count <= 0 or start + count >= 1 << 52:
            raise Damaged("an NTFS run list is damaged")
        if place_size:
            place += int.from_bytes(pairs[at:end], "little", signed=True)
            if place < 0 or place + count > clusters:
                raise Damaged("an NTFS run list leaves the volume")
        runs.append(Extent(start, place if place_size else HOLE, count))
        start, at = start + count, end
    if at >= len(pairs):
        raise Damaged("an NTFS run list has no end")
    return runs


def join_extents(extents: list[Attribute]) -> Attribute:
    """The extents of one attribute, in order, as one."""
    first = extents[0]
    if first.lowest != 0:
        raise Damaged("an NTFS attribute has no beginning")
    if len(extents) == 1:
        return first
    runs: list[Extent] = []
    expected = 0
    for extent in extents:
        if extent.value is not None or extent.lowest != expected:
            raise Damaged("an NTFS attribute has a gap")
        runs.extend(extent.runs)
        expected = extent.highest + 1
        if len(runs) > _MOST_RUNS:
            raise Unsupported("an NTFS file is in too many pieces")
    return first._replace(runs=tuple(runs), highest=expected - 1)


class Listed(NamedTuple):
    """An entry of an attribute list: which record holds which extent."""

    kind: int
    name: bytes
    lowest: int
    reference: int
    instance: int


def parse_list(value: bytes) -> list[Listed]:
    """The entries of an attribute list."""
    found: list[Listed] = []
    at = 0
    while at + 26 <= len(value):
        kind, length, name_length, name_at, lowest, reference, instance = struct.unpack_from(
            "<IHBBQQH", value, at
        )
        name = value[at + name_at : at + name_at + 2 * name_length]
        if length < 26 or at + length > len(value) or len(name) != 2 * name_length:
            raise Damaged("an NTFS attribute list is damaged")
        found.append(Listed(kind, name, lowest, reference, instance))
        at += length
    if at != len(value):
        raise Damaged("an NTFS attribute list is damaged")
    return found
