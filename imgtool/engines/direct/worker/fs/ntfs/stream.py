"""The bytes of an NTFS attribute: in its record, in runs of clusters, sparse or compressed.

Source: the NTFS documentation of the Linux-NTFS project; [MS-XCA] section 2.5 (LZNT1).
"""

from __future__ import annotations

import struct
from bisect import bisect_right

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.fs.ntfs.records import (
    COMPRESSED,
    ENCRYPTED,
    HOLE,
    SPARSE,
    Attribute,
    Damaged,
)
from imgtool.engines.direct.worker.fs.pages import Pages

_UNIT_BITS = 4  # a compressed file is packed in units of sixteen clusters
_LARGEST_PACKED_CLUSTER = 4096
_BLOCK = 4096  # what LZNT1 packs at a time
_LARGEST = 1 << 50


class Stream:
    """A readable attribute."""

    def __init__(self, source: Pages, cluster: int, attribute: Attribute) -> None:
        if attribute.flags & ENCRYPTED:
            raise Unsupported("an encrypted file on NTFS")
        if attribute.flags & ~(COMPRESSED | ENCRYPTED | SPARSE):
            raise Unsupported("an NTFS attribute has unknown flags")
        self._source = source
        self._cluster = cluster
        self._attribute = attribute
        self._unit = 0
        self._last_unit: tuple[int, bytes] = (-1, b"")
        self.size = attribute.size
        if attribute.value is not None:
            return
        if attribute.flags & COMPRESSED:
            if cluster > _LARGEST_PACKED_CLUSTER or attribute.unit_bits not in (0, _UNIT_BITS):
                raise Unsupported("an NTFS file is compressed in an odd way")
            self._unit = cluster << attribute.unit_bits if attribute.unit_bits else 0
        if not 0 <= self.size <= _LARGEST:
            raise Damaged("an NTFS attribute has an impossible size")
        if (attribute.highest + 1) * cluster < self.size:
            raise Damaged("an NTFS attribute has fewer clusters than bytes")
        self._starts = [run.start * cluster for run in attribute.runs]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at `offset`, fewer past the end; what was never written is zeros."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        if self._attribute.value is not None:
            return self._attribute.value[offset : offset + length]
        written = max(0, min(length, self._attribute.initialized - offset))
        data = self._unpack_range(offset, written) if self._unit else self._raw(offset, written)
        return data + bytes(length - written) if written < length else data

    def ranges(self) -> list[tuple[int, int]]:
        """Where there are data, in bytes."""
        if self._attribute.value is not None:
            return [(0, self.size)] if self.size else []
        end = min(self.size, self._attribute.initialized)
        grain = self._unit or self._cluster
        found: list[tuple[int, int]] = []
        for run in self._attribute.runs:
            if run.place == HOLE:
                continue
            start = run.start * self._cluster // grain * grain
            stop = min(end, -(-(run.start + run.clusters) * self._cluster // grain) * grain)
            if found and start <= sum(found[-1]):
                start = found.pop()[0]
            if start < stop:
                found.append((start, stop - start))
        return found

    def _raw(self, offset: int, length: int) -> bytes:
        parts = []
        at = bisect_right(self._starts, offset) - 1
        while length:
            run = self._attribute.runs[at]
            within = offset - self._starts[at]
            take = min(length, run.clusters * self._cluster - within)
            if run.place == HOLE:
                parts.append(bytes(take))
            else:
                parts.append(self._source.read(run.place * self._cluster + within, take))
            offset, length, at = offset + take, length - take, at + 1
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unpack_range(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            number, within = divmod(offset, self._unit)
            take = min(length, self._unit - within)
            if self._last_unit[0] != number:
                self._last_unit = (number, self._unpack(number))
            parts.append(self._last_unit[1][within : within + take])
            offset, length = offset + take, length - take
        return b"".join(parts)

    def _unpack(self, number: int) -> bytes:
        """One unit: all holes are zeros, no hole is plain data, else data packed before holes."""
        start, wanted = number * self._unit, self._unit
        at = bisect_right(self._starts, start) - 1
        parts: list[bytes] = []
        holes = False
        while wanted and at < len(self._attribute.runs):
            run = self._attribute.runs[at]
            within = start - self._starts[at]
            take = min(wanted, run.clusters * self._cluster - within)
            if run.place == HOLE:
                holes = True
            elif holes:
                raise Damaged("a compressed NTFS file has data after a hole")
            else:
                parts.append(self._source.read(run.place * self._cluster + within, take))
            start, wanted, at = start + take, wanted - take, at + 1
        if wanted:
            raise Damaged("a compressed NTFS file ends inside a unit")
        if not parts:
            return bytes(self._unit)
        packed = b"".join(parts)
        return decompress(packed, self._unit) if holes else packed


def decompress(packed: bytes, size: int) -> bytes:
    """LZNT1: blocks of up to 4096 bytes, each with a header, up to `size` bytes, then zeros."""
    out = bytearray()
    at = 0
    while at + 2 <= len(packed) and len(out) < size:
        (header,) = struct.unpack_from("<H", packed, at)
        if header == 0:
            break
        end = at + 3 + (header & 0xFFF)
        if end > len(packed):
            raise ReadFailed("a compressed file is damaged")
        block = packed[at + 2 : end]
        if header & 0x8000:
            block = _decompress_block(block)
        if len(block) > _BLOCK:
            raise ReadFailed("a compressed file is damaged")
        out += block.ljust(_BLOCK, b"\0")
        at = end
    return bytes(out[:size]).ljust(size, b"\0")


def _decompress_block(packed: bytes) -> bytes:
    """Literal bytes, and pairs of distance and length whose split moves with the position."""
    out = bytearray()
    at, end = 0, len(packed)
    while at < end:
        tags = packed[at]
        at += 1
        for bit in range(8):
            if at >= end:
                break
            if not tags >> bit & 1:
                out.append(packed[at])
                at += 1
                continue
            if at + 2 > end or not out:
                raise ReadFailed("a compressed file is damaged")
            token = packed[at] | packed[at + 1] << 8
            at += 2
            length_bits = 12 - max(0, (len(out) - 1).bit_length() - 4)
            distance = (token >> length_bits) + 1
            length = (token & (1 << length_bits) - 1) + 3
            start = len(out) - distance
            if start < 0 or len(out) + length > _BLOCK:
                raise ReadFailed("a compressed file is damaged")
            if distance >= length:
                out += out[start : start + length]
            else:
                pattern = out[start:]
                out += (pattern * (length // distance + 1))[:length]
    return bytes(out)
