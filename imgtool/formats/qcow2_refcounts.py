"""Which parts of a qcow2 file are in use, by its own refcounts.

Layout: docs/interop/qcow2.txt in QEMU's sources, "Host cluster management".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from imgtool.formats.qcow2 import Qcow2Header

_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
_LARGEST_TABLE = 8 << 20  # QEMU's limit


def used_ranges(file: BinaryIO, header: Qcow2Header) -> Iterator[tuple[int, int]]:
    """The stretches of the file whose clusters have a refcount, as (offset, length) in bytes.

    Ascending and apart. Nothing is checked: a table that lies says what it says.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(header.refcount_table_offset)
    table = file.read(min(header.refcount_table_size, _LARGEST_TABLE))
    per_block = header.cluster_size * 8 // header.refcount_bits
    start = end = 0  # of the stretch so far
    for number in range(len(table) // 8):
        block = int.from_bytes(table[number * 8 : number * 8 + 8], "big") & _OFFSET_MASK
        first = number * per_block
        if first * header.cluster_size >= length:
            break  # there is nothing that it could count
        if block == 0:
            continue
        file.seek(block)
        for from_entry, to_entry in _used_entries(file.read(header.cluster_size), header):
            begins = (first + from_entry) * header.cluster_size
            ends = min((first + to_entry) * header.cluster_size, length)
            if begins >= ends:
                continue
            if begins == end:
                end = ends
                continue
            if end > start:
                yield start, end - start
            start, end = begins, ends
    if end > start:
        yield start, end - start


def _used_entries(block: bytes, header: Qcow2Header) -> Iterator[tuple[int, int]]:
    """Runs of entries that are not zero; below eight bits, whole bytes of entries."""
    width = max(header.refcount_bits // 8, 1)
    entries = 8 * width // header.refcount_bits
    flags = bytes(any(block[at : at + width]) for at in range(0, len(block), width))
    for run in re.finditer(rb"\x01+", flags):
        yield run.start() * entries, run.end() * entries
