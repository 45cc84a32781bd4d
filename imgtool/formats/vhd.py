"""What a VHD says of itself in its footer and, where it has one, its dynamic header.

Layout: "Virtual Hard Disk Image Format Specification" 1.0 by Microsoft; which size QEMU goes by is
block/vpc.c.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import BinaryIO

COOKIE = b"conectix"
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
FOOTER_SIZE = 512
_DYNAMIC_COOKIE = b"cxsparse"
_DYNAMIC_SIZE = 1024
_SECTOR = 512
_NO_BLOCK = 0xFFFF_FFFF
_PIECE = 1 << 20  # of a table, read at once
_LARGEST_TABLE = 64 << 20  # of entries for 32 TiB; a VHD has 2 TiB at most
_LONGEST_LOCATOR = 4096
_RELATIVE, _ABSOLUTE = b"W2ru", b"W2ku"


@dataclass(frozen=True)
class Footer:
    """The footer, or the copy of it in front; sizes in bytes.

    `offset` is where it was found. `id` is the image's own. `intact`: its checksum is right.
    """

    kind: int
    offset: int
    size: int
    id: bytes
    header_offset: int
    saved_state: bool
    intact: bool


@dataclass(frozen=True)
class Dynamic:
    """The dynamic header: where its table of blocks is, and what it stands on.

    `parent` is the name as written, the relative one where there is one; empty if there is none.
    """

    table_offset: int
    entries: int
    block_size: int
    parent: str
    parent_id: bytes


def _checksum(data: bytes, at: int) -> int:
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFF_FFFF


def _footer(data: bytes, offset: int) -> Footer | None:
    if len(data) < FOOTER_SIZE or not data.startswith(COOKIE):
        return None
    kind, checksum = struct.unpack_from(">II", data, 60)
    return Footer(
        kind=kind,
        offset=offset,
        size=struct.unpack_from(">Q", data, 48)[0],
        id=data[68:84],
        header_offset=struct.unpack_from(">Q", data, 16)[0],
        saved_state=bool(data[84]),
        intact=checksum == _checksum(data, 64),
    )


def read_footer(file: BinaryIO) -> Footer | None:
    """What makes this file a VHD: the copy of its footer in front, or the footer of a fixed one.

    A fixed VHD is a raw disk with a footer behind it: only one that is intact, and describes no
    more than the file holds, is taken for a footer. None where this is no VHD.
    """
    file.seek(0)
    if (front := _footer(file.read(FOOTER_SIZE), 0)) is not None:
        return front
    end = file.seek(0, os.SEEK_END)
    if end < 2 * FOOTER_SIZE:
        return None
    file.seek(end - FOOTER_SIZE)
    found = _footer(file.read(FOOTER_SIZE), end - FOOTER_SIZE)
    if found is None or found.kind != FIXED or not found.intact:
        return None
    return found if 0 < found.size <= found.offset else None


def read_dynamic(file: BinaryIO, footer: Footer) -> Dynamic | None:
    """The header of a dynamic or differencing VHD; None where there is none that makes sense."""
    if footer.kind not in (DYNAMIC, DIFFERENCING) or footer.header_offset >= 1 << 62:
        return None
    file.seek(footer.header_offset)
    data = file.read(_DYNAMIC_SIZE)
    if len(data) < _DYNAMIC_SIZE or not data.startswith(_DYNAMIC_COOKIE):
        return None
    table, _, entries, block_size = struct.unpack_from(">QIII", data, 16)
    parent = ""
    if footer.kind == DIFFERENCING:
        unicode_name = data[64:576].decode("utf-16-be", errors="replace").partition("\0")[0]
        names = _locators(file, data)
        parent = names.get(_RELATIVE) or unicode_name or names.get(_ABSOLUTE) or ""
    return Dynamic(table, entries, block_size, parent, data[40:56])


def _locators(file: BinaryIO, header: bytes) -> dict[bytes, str]:
    found = {}
    for at in range(576, 576 + 8 * 24, 24):
        code = header[at : at + 4]
        length, _, offset = struct.unpack_from(">IIQ", header, at + 8)
        if code in (_RELATIVE, _ABSOLUTE) and 0 < length <= _LONGEST_LOCATOR and offset < 1 << 62:
            file.seek(offset)
            name = file.read(length).decode("utf-16-le", errors="replace").partition("\0")[0]
            if name:
                found[code] = name
    return found


def size_needed(file: BinaryIO, footer: Footer) -> int:
    """How long the file has to be, in bytes, to hold the last block that its table names."""
    dynamic = read_dynamic(file, footer)
    if dynamic is None:
        return 0
    length = min(dynamic.entries * 4, _LARGEST_TABLE)
    last = -1
    file.seek(min(dynamic.table_offset, 1 << 62))
    for at in range(0, length, _PIECE):
        wanted = min(_PIECE, length - at)
        piece = file.read(wanted)
        entries = array("I", piece[: len(piece) // 4 * 4])
        if sys.byteorder == "little":
            entries.byteswap()
        last = max(last, max((entry for entry in entries if entry != _NO_BLOCK), default=-1))
        if len(piece) < wanted:
            return dynamic.table_offset + length
    if last < 0:
        return dynamic.table_offset + length
    bitmap = -(-dynamic.block_size // (_SECTOR * 8 * _SECTOR)) * _SECTOR
    return last * _SECTOR + bitmap + dynamic.block_size
