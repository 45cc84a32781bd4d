"""What is on a volume, as libblkid says it: type, label, UUID.

libblkid wants a file. It gets a sparse copy of the places that its probes look at: both ends of the
volume, and for the filesystems whose label is elsewhere that place too. A volume in which nothing
is found that way is looked at once more if anything in it leads elsewhere (`far_places`).
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.far_places import FAR_ANCHOR, FAR_MARKS, far_places, far_windows
from imgtool.engines.direct.worker.fs.base import ReadFailed, Source
from imgtool.engines.direct.worker.sources import excerpt

_HEAD = 640 << 10  # the probes farthest from the start: ZFS at 256 KiB, UDF at 512 KiB
_TAIL = (1 << 20) + (64 << 10)  # what lies farthest from the end: an anchor of UDF
_MOST_FAT = 24 << 20
_RECORDS = 64 << 10

_LABEL, _UUID, _TYPE = 1 << 1, 1 << 3, 1 << 5
_SEVERAL, _FOUND = -2, 0
_NOT_IN = 1
# A magic number of two bytes, which other filesystems have in that place by accident.
_WEAK = (b"minix",)


class Signature(NamedTuple):
    """What libblkid found; `type` is None for nothing known."""

    type: str | None
    label: str | None
    uuid: str | None


@cache
def _library() -> Any:
    library = ctypes.CDLL("libblkid.so.1")
    library.blkid_new_probe.restype = ctypes.c_void_p
    for name in ("blkid_do_safeprobe", "blkid_free_probe"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.blkid_probe_set_device.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int64,
    )
    library.blkid_probe_set_superblocks_flags.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.blkid_probe_filter_superblocks_type.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_char_p),
    )
    library.blkid_probe_lookup_value.argtypes = (
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_size_t),
    )
    return library


def _elsewhere(boot: bytes) -> list[tuple[int, int]]:
    """Where the filesystem that begins with this sector keeps its label, if not in the sector."""
    sector = int.from_bytes(boot[11:13], "little")
    if boot[3:11] == b"NTFS    " and sector in (256, 512, 1024, 2048, 4096):
        per_cluster = boot[13]
        cluster = sector * (per_cluster if per_cluster <= 128 else 1 << (256 - per_cluster))
        first, mirror = struct.unpack_from("<QQ", boot, 48)
        return [(n * cluster, _RECORDS) for n in (first, mirror) if n < 1 << 48]
    if boot[3:11] == b"EXFAT   ":
        fat, _, heap, _, root = struct.unpack_from("<IIIII", boot, 80)
        unit, per_cluster = boot[108], boot[109]
        if unit > 12 or per_cluster > 25 - unit or root < 2:
            return []
        cluster = 1 << (unit + per_cluster)
        return [
            (fat << unit, min(root * 4 + 8, _MOST_FAT)),
            ((heap << unit) + (root - 2) * cluster, max(cluster, _RECORDS)),
        ]
    if boot[510:512] == b"\x55\xaa" and sector in (512, 1024, 2048, 4096) and boot[16] in (1, 2):
        reserved, fats, entries = struct.unpack_from("<HBH", boot, 14)
        length = int.from_bytes(boot[22:24], "little") or int.from_bytes(boot[36:40], "little")
        area = (reserved + fats * length) * sector + entries * 32
        if area > _MOST_FAT:
            raise Unsupported("a FAT of unusual size")
        windows = [(0, area)]
        root = int.from_bytes(boot[44:48], "little")
        if not entries and root >= 2:
            windows.append(
                (area + (root - 2) * boot[13] * sector, max(boot[13] * sector, _RECORDS))
            )
        return windows
    return []


def identify(source: Source) -> Signature:
    """The signature on a volume; nothing where libblkid finds several that exclude each other."""
    head = source.read(0, min(_HEAD, source.size))
    tail_at = max(len(head), source.size - _TAIL)
    tail = source.read(tail_at, source.size - tail_at)
    parts = [(0, head), (tail_at, tail)]
    windows = _elsewhere(head[:512]) if len(head) >= 512 else []
    found = _probe(source.size, itertools.chain(parts, _read(source, windows)))
    if found.type is not None:
        return found
    # What its probes look at far from both ends, which few volumes need.
    try:
        far = list(_read(source, far_windows(source.size)))
        anchored = head.ljust(FAR_ANCHOR[0], b"\0") + far[0][1]
        places = far_places(anchored, tail, source.size)
        if not places and not any(data.startswith(FAR_MARKS) for _, data in far):
            return found
        parts += [*far, *_read(source, places)]
    except ReadFailed:  # it would have been something else that says so
        return found
    return _probe(source.size, parts)


def _probe(size: int, parts: Iterable[tuple[int, bytes]]) -> Signature:
    library = _library()
    with excerpt(size, parts) as descriptor:
        probe = library.blkid_new_probe()
        if not probe:
            raise MemoryError
        try:
            if library.blkid_probe_set_device(probe, descriptor, 0, size):
                return Signature(None, None, None)
            library.blkid_probe_set_superblocks_flags(probe, _LABEL | _UUID | _TYPE)
            found = library.blkid_do_safeprobe(probe)
            if found == _SEVERAL:
                names = (ctypes.c_char_p * (len(_WEAK) + 1))(*_WEAK, None)
                library.blkid_probe_filter_superblocks_type(probe, _NOT_IN, names)
                found = library.blkid_do_safeprobe(probe)
            if found != _FOUND:
                return Signature(None, None, None)
            return Signature(*(_value(library, probe, n) for n in (b"TYPE", b"LABEL", b"UUID")))
        finally:
            library.blkid_free_probe(probe)


def _read(source: Source, windows: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """As much of each window (offset, length) as there is: (offset, bytes)."""
    for offset, length in windows:
        offset = max(0, min(offset, source.size))
        yield offset, source.read(offset, min(length, source.size - offset))


def _value(library: Any, probe: int, name: bytes) -> str | None:
    data, length = ctypes.c_void_p(), ctypes.c_size_t()
    if library.blkid_probe_lookup_value(probe, name, ctypes.byref(data), ctypes.byref(length)):
        return None
    if not data.value or not 0 < length.value <= 4096:
        return None
    raw = ctypes.string_at(data.value, length.value).rstrip(b"\0")
    return raw.decode("utf-8", "replace") or None
