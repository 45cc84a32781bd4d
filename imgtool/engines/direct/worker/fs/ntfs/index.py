"""Directories of NTFS: the entries of an index of file names.

Source: the NTFS documentation of the Linux-NTFS project ("Index Root", "Index Allocation").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.ntfs.boot import INDEX_BLOCK
from imgtool.engines.direct.worker.fs.ntfs.records import Damaged, fixed_up

FILE_NAMES = "$I30".encode("utf-16-le")
DOS_NAMESPACE = 2
_FILE_NAME, _COLLATE_FILE_NAME = 0x30, 1
_LAST_ENTRY = 2
_NAME_AT = 66


class Entry(NamedTuple):
    """A name and the file reference behind it."""

    reference: int
    namespace: int
    name: bytes


def root_entries(value: bytes) -> Iterator[Entry]:
    """The entries that lie in the directory's own record."""
    if len(value) < 32:
        raise Damaged("an NTFS directory is damaged")
    kind, collation, block = struct.unpack_from("<III", value)
    if (kind, collation, block) != (_FILE_NAME, _COLLATE_FILE_NAME, INDEX_BLOCK):
        raise Unsupported("an NTFS directory has an odd index")
    return _entries(value, 16)


def block_entries(block: bytes) -> Iterator[Entry]:
    """The entries of one index block."""
    return _entries(fixed_up(block, b"INDX"), 24)


def _entries(block: bytes, header: int) -> Iterator[Entry]:
    first, used = struct.unpack_from("<II", block, header)
    at, end = header + first, header + used
    if end > len(block):
        raise Damaged("an NTFS directory is damaged")
    while True:
        if at + 16 > end:
            raise Damaged("an NTFS directory has no end")
        reference, length, key, flags = struct.unpack_from("<QHHH", block, at)
        if flags & _LAST_ENTRY:
            return
        if length < 16 + _NAME_AT or length % 8 or at + length > end or 16 + key > length:
            raise Damaged("an NTFS directory is damaged")
        characters, namespace = block[at + 16 + 64], block[at + 16 + 65]
        if _NAME_AT + 2 * characters > key or characters == 0:
            raise Damaged("an NTFS directory is damaged")
        name_at = at + 16 + _NAME_AT
        yield Entry(reference, namespace, utf8(block[name_at : name_at + 2 * characters]))
        at += length


def utf8(name: bytes) -> bytes:
    """A name on NTFS in UTF-8; `Unsupported` for one that cannot be."""
    try:
        text = name.decode("utf-16-le").encode()
    except UnicodeDecodeError:
        raise Unsupported("a name on NTFS is not UTF-16") from None
    if b"\0" in text or b"/" in text or text == b"..":
        raise Unsupported("a name on NTFS is impossible")
    return text
