"""Where libblkid's probes look that is far from both ends of a volume.

Each of these superblocks says where the next thing is that a probe wants to see. What they say is
hostile: every place is bounded, and whoever reads it cuts it off at the end of the volume.

Sources: util-linux, libblkid/src/superblocks (udf.c, bitlocker.c, ddf.c, hfs.c, luks.c, vmfs.c,
promise_raid.c); ECMA-167 3/10.2 (anchors of UDF).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

# The anchors of UDF lie 256 blocks of up to 4096 bytes from either end, secondary headers of LUKS2
# up to 4 MiB from the start, VMFS at 1 and 2 MiB.
FAR_ANCHOR = (1 << 20, 64 << 10)
_WINDOWS = (FAR_ANCHOR, (2 << 20, 64 << 10), (4 << 20, 64 << 10))
_PROMISE = 3087  # sectors from the end: the farthest of the places that Promise's RAID uses
FAR_MARKS = (
    *(b"SKUL\xba\xbe", b"\x0d\xd0\x01\xc0", b"\x5e\xf1\xab\x2f"),
    b"Promise Technology, Inc.",
)
_WINDOW = 128 << 10
_UDF_BLOCKS = (512, 1024, 2048, 4096)
_UDF_ANCHOR, _UDF_AT = 2, 256
_DDF = b"\xde\x11\xde\x11"
_DDF_ENDS = (1, 257)  # sectors from the end, the second with room for the signature of another
_BITLOCKER = b"-FVE-FS-"

Places = list[tuple[int, int]]


def far_windows(size: int) -> Places:
    """The places where something may begin, with one of FAR_MARKS, in a volume of `size` bytes."""
    return [*_WINDOWS, (max(size - _PROMISE * 512, 0), 4096)]


def far_places(head: bytes, tail: bytes, size: int) -> Places:
    """The places (offset, length) that the superblocks in `head` and `tail`, the two ends of a
    volume of `size` bytes, lead to.
    """
    found: Places = []

    def at(offset: int, length: int) -> bytes:
        start = offset - (size - len(tail))
        return tail[start : start + length] if start >= 0 else head[offset : offset + length]

    found += _udf(at, size)
    for sectors in _DDF_ENDS:
        header = at(size - sectors * 512, 512)
        if header.startswith(_DDF) and len(header) == 512:
            (primary,) = struct.unpack_from(">Q", header, 96)
            found.append((primary << 9, 512))
    if head[3:11] == _BITLOCKER:
        for field in (176, 440):  # of Windows 7 and newer, and of BitLocker To Go
            found += [(offset, 512) for offset in struct.unpack_from("<QQQ", head, field)]
    master = at(1024, 512)
    if master[:2] == b"BD" and master[124:126] in (b"H+", b"HX"):
        unit, first = struct.unpack_from(">I4xH", master, 20)[:2]
        (embedded,) = struct.unpack_from(">H", master, 126)
        found.append((first * 512 + embedded * unit, _WINDOW))
    return [place for place in found if 0 <= place[0] < size]


def _udf(at: Callable[[int, int], bytes], size: int) -> Places:
    found: Places = []
    for block in _UDF_BLOCKS:
        last = size // block
        for number in (_UDF_AT, last - 1 - _UDF_AT, last - 1, last - _UDF_AT):
            anchor = at(number * block, 512) if number > 0 else b""
            if len(anchor) < 512 or int.from_bytes(anchor[:2], "little") != _UDF_ANCHOR:
                continue
            if int.from_bytes(anchor[12:16], "little") != number:
                continue
            for length, place in struct.iter_unpack("<II", anchor[16:32]):
                found.append((place * block, min(length, _WINDOW)))
    return found
