"""What a VHDX says of itself, as far as QEMU does not tell: its log, its parent, its last block.

Layout: [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format" by Microsoft.
"""

from __future__ import annotations

import os
import struct
import sys
import uuid
from array import array
from dataclasses import dataclass
from typing import BinaryIO

SIGNATURE = b"vhdxfile"
_HEADERS = (64 << 10, 128 << 10)
_REGIONS = (192 << 10, 256 << 10)
_MOST_ENTRIES = 2047  # of a region or metadata table
_LARGEST_METADATA = 1 << 20
_LONGEST_LOCATOR = 64 << 10
_PIECE = 1 << 20  # of a table, read at once
_LARGEST_TABLE = 64 << 20
_HAS_PARENT = 1 << 1
_WHOLLY_THERE, _PARTLY_THERE = 6, 7
_NAMES = ("relative_path", "volume_path", "absolute_win32_path")


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


_BLOCKS = _guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = _guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_PARAMETERS = _guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_LOCATOR = _guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")


@dataclass(frozen=True)
class Vhdx:
    """Sizes and offsets in bytes.

    `id` changes with its content: an image on top names it as the one that it was made of. `parent`
    is the name as written, empty where there is none.
    """

    id: bytes
    has_parent: bool
    parent: str
    parent_id: bytes
    block_size: int
    table_offset: int
    table_size: int


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    if offset >= 1 << 62:
        return b""
    file.seek(offset)
    return file.read(length)


def _current_header(file: BinaryIO) -> bytes | None:
    found = [data for at in _HEADERS if (data := _at(file, at, 80)).startswith(b"head")]
    found = [data for data in found if len(data) == 80]
    return max(found, key=lambda data: int.from_bytes(data[8:16], "little"), default=None)


def _regions(file: BinaryIO) -> dict[bytes, tuple[int, int]]:
    for place in _REGIONS:
        head = _at(file, place, 16)
        if len(head) < 16 or not head.startswith(b"regi"):
            continue
        count = min(struct.unpack_from("<I", head, 8)[0], _MOST_ENTRIES)
        data = file.read(count * 32)
        return {
            data[at : at + 16]: struct.unpack_from("<QI", data, at + 16)
            for at in range(0, len(data) - 31, 32)
        }
    return {}


def _metadata(file: BinaryIO, place: int) -> dict[bytes, bytes]:
    """The items of the metadata that are looked at."""
    head = _at(file, place, 32)
    if len(head) < 32 or not head.startswith(b"metadata"):
        return {}
    count = min(struct.unpack_from("<H", head, 10)[0], _MOST_ENTRIES)
    table, items = file.read(count * 32), {}
    for at in range(0, len(table) - 31, 32):
        offset, length = struct.unpack_from("<II", table, at + 16)
        kind = table[at : at + 16]
        if kind in (_PARAMETERS, _LOCATOR) and offset < _LARGEST_METADATA:
            items[kind] = _at(file, place + offset, min(length, _LONGEST_LOCATOR))
    return items


def _locator(item: bytes) -> dict[str, str]:
    """The keys and values of a parent locator."""
    found: dict[str, str] = {}
    if len(item) < 20:
        return found
    count = struct.unpack_from("<H", item, 18)[0]
    for at in range(20, min(20 + count * 12, len(item) - 11), 12):
        key_at, value_at, key_length, value_length = struct.unpack_from("<IIHH", item, at)
        key, value = item[key_at : key_at + key_length], item[value_at : value_at + value_length]
        found[key.decode("utf-16-le", errors="replace")] = value.decode(
            "utf-16-le", errors="replace"
        )
    return found


def _linkage(text: str) -> bytes:
    try:
        return uuid.UUID(text.strip("{}")).bytes_le
    except ValueError:
        return b""


def read(file: BinaryIO) -> Vhdx | None:
    """What the header in force says; None where this is no VHDX that makes sense."""
    if not _at(file, 0, 8).startswith(SIGNATURE):
        return None
    header = _current_header(file)
    regions = _regions(file)
    if header is None or _METADATA not in regions or _BLOCKS not in regions:
        return None
    items = _metadata(file, regions[_METADATA][0])
    parameters = items.get(_PARAMETERS, b"")
    if len(parameters) < 8:
        return None
    block_size, flags = struct.unpack_from("<II", parameters)
    names = _locator(items.get(_LOCATOR, b""))
    return Vhdx(
        id=header[32:48],
        has_parent=bool(flags & _HAS_PARENT),
        parent=next((names[key] for key in _NAMES if names.get(key)), ""),
        parent_id=_linkage(names.get("parent_linkage", "")),
        block_size=block_size,
        table_offset=regions[_BLOCKS][0],
        table_size=regions[_BLOCKS][1],
    )


def size_needed(file: BinaryIO, image: Vhdx) -> int:
    """How long the file has to be, in bytes, to hold the last block that its table names, where
    that is more than it has."""
    there = file.seek(0, os.SEEK_END)
    length = min(image.table_size, _LARGEST_TABLE)
    needed = min(image.table_offset, 1 << 62) + length
    file.seek(min(image.table_offset, 1 << 62))
    for at in range(0, length, _PIECE):
        piece = file.read(min(_PIECE, length - at))
        entries = array("Q", piece[: len(piece) // 8 * 8])
        if sys.byteorder == "big":
            entries.byteswap()
        # The largest of all says at once that none is too large, which is the rule.
        if (max(entries, default=0) >> 20 << 20) + image.block_size > there:
            for entry in entries:
                if entry & 7 in (_WHOLLY_THERE, _PARTLY_THERE):
                    needed = max(needed, (entry >> 20 << 20) + image.block_size)
        if not piece:
            break
    return needed
