"""What makes a chain doubtful that can be opened all the same: it is read with a warning, and not
written to unless that is asked for by name.

A base that was changed after its overlay leaves one trace, the times of the two files; to write to
the overlay wipes that out. An image whose tables are damaged loses more with each write.
"""

from __future__ import annotations

import functools
import os
from typing import BinaryIO

from imgtool.errors import Force, ImageError, Reason, RefusedError
from imgtool.formats import qcow2
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.info import ImageInfo
from imgtool.image.checks.ages import newer_bases
from imgtool.image.intent.intent_state import line_on
from imgtool.image.locking.host_file import open_host_file
from imgtool.image.locking.locks import in_use_for_writing
from imgtool.text import printable, typed

# A reader looks at so many tables of a chain at most: 8 MiB, of 64 GiB of disk where clusters have
# the usual size.
_MOST_TABLES = 128
_ENTRY = 8
_OFFSET = 0x00FF_FFFF_FFFF_FE00
# Layout: docs/interop/qcow2.txt in QEMU's sources, "Cluster mapping".
_NOT_OF_A_TABLE = 0x7F00_0000_0000_01FF  # reserved in an entry of the first table
_NOT_OF_DATA = 0x3F00_0000_0000_01FE  # reserved in an entry for a cluster that is not compressed
_COMPRESSED_BIT = 62


def doubts_of(chain: Chain) -> tuple[str, ...]:
    """A line for each thing that is doubtful about a chain which is to be read.

    Of the tables of qcow2 images so much is looked at as costs no time (`_MOST_TABLES`): whether
    their entries can be right at all. `check_metadata` looks at all.
    """
    lines = [*chain.notes]
    lines += [link.unseen.line(link.path) for link in chain.links if link.unseen is not None]
    lines += [line for link in chain.links if (line := line_on(link.path)) is not None]
    lines += [
        f"{printable(link.path)}: marked corrupt by QEMU" for link in chain.links if link.corrupt
    ]
    most = max(_MOST_TABLES // len(chain.links), 1)
    for link in chain.links:
        if not link.corrupt and (wrong := wrong_entries(link, most)):
            lines.append(
                f"its tables are damaged, {wrong} entries or more are wrong: parts of the disk read"
                f" as others, or not at all ({printable(link.path)})"
            )
    for overlay, base in newer_bases(chain.links):
        lines.append(
            f"its base {printable(base.path)} was changed after it, and may no longer fit"
            f" ({printable(overlay.path)})"
        )
    return tuple(lines)


def refuse_doubtful(chain: Chain, *, force: Force = ()) -> None:
    """Raise `RefusedError` for a chain that is only to be read, unless `force` says otherwise.

    All tables of the active image are checked by QEMU: that reads about a thousandth of what the
    image holds.
    """
    refuse_elsewhere(chain)
    for overlay, base in newer_bases(chain.links) if Reason.BASE_NEWER not in force else ():
        raise RefusedError(
            f"its base {printable(base.path)} was changed after it, and may no longer fit; to write"
            " to it would wipe out the only trace of that",
            subject=printable(overlay.path),
            hint="look whether the guest in it is whole; if the two were only copied or touched:"
            f" touch -r {typed(base.path)} {typed(overlay.path)}",
            reason=Reason.BASE_NEWER,
        )
    if Reason.DAMAGED not in force:
        _refuse_damaged(chain.active)


def refuse_elsewhere(chain: Chain) -> None:
    """Raise `RefusedError` for a chain with a base that is not where the name in the overlay leads:
    which of two it is on is then written into it first."""
    if (elsewhere := chain.misleading_base) is not None:
        link, below = elsewhere
        raise RefusedError(
            f"its base {printable(below.path)} is not where the name in it leads to, and so only"
            " read",
            subject=printable(link.path),
            hint="write that name into it: imgtool overlay rebase --unsafe --base-format"
            f" {below.format} {typed(link.path)} {typed(below.path)}",
        )


def _refuse_damaged(link: ImageInfo) -> None:
    # Who only reads does not need them.
    from imgtool.image.checks.checking import UnsupportedCheck, check_metadata
    from imgtool.image.checks.findings import salvage

    shown = printable(link.path)
    if link.dirty:
        raise lagging(link)
    mend = f"mend a copy of it: cp {typed(link.path)} COPY, then imgtool check --repair all COPY"
    tried = f"try to mend a copy: cp {typed(link.path)} COPY, then imgtool check --repair all COPY"
    if link.corrupt:
        raise RefusedError(
            "QEMU found its tables damaged and marked it: it is opened for reading only",
            subject=shown,
            hint=mend,
        )
    try:
        result = check_metadata(link)
    except UnsupportedCheck:
        return
    if not result.sound:
        raise RefusedError(
            f"its tables are damaged: {result.corruptions + result.errors} entries are wrong, and"
            " what is written could destroy what is there",
            subject=shown,
            hint=f"{tried}; or copy what can be read: {salvage(link)}",
            reason=Reason.DAMAGED,
        )


def lagging(link: ImageInfo) -> RefusedError:
    """The error for an image whose tables lag behind what is in it, since whoever wrote to it with
    lazy refcounts was killed. As the base of an overlay QEMU writes to it without bringing them up
    to date, over clusters that they do not count yet."""
    return RefusedError(
        "it was not closed properly, and its tables lag behind what is in it: what is written could"
        " destroy what is there",
        subject=printable(link.path),
        hint="bring them up to date, as QEMU does when a guest starts: imgtool check --repair all"
        f" {typed(link.path)}",
        reason=Reason.DAMAGED,
    )


def wrong_entries(link: ImageInfo, most: int = _MOST_TABLES) -> int:
    """How many entries of a qcow2 image's first `most` tables cannot be right.

    0 for other formats, and for tables that are not plain ones.
    """
    if link.format != "qcow2" or link.data_path is not None or link.encrypted:
        return 0
    try:
        if in_use_for_writing(link.path) is not None:
            return 0  # they are being changed
        with open_host_file(link.path) as file:
            header = qcow2.read_header(file)
            return _wrong_entries(file, header, most) if header is not None and header.sound else 0
    except (OSError, ImageError):
        return 0  # whoever reads it says so


def _wrong_entries(file: BinaryIO, header: qcow2.Qcow2Header, most: int) -> int:
    end = os.fstat(file.fileno()).st_size or file.seek(0, os.SEEK_END)
    # What lies before a cluster's start, and far beyond the end of the file, is no place for one.
    odd = (header.cluster_size - 1) & _OFFSET | _OFFSET & ~((1 << end.bit_length() + 1) - 1)
    wrong, tables = 0, 0
    file.seek(header.l1_offset)
    first = file.read(min(header.l1_size, 1 << 20))
    for at in range(0, len(first) - _ENTRY + 1, _ENTRY):
        entry = int.from_bytes(first[at : at + _ENTRY], "big")
        if entry & (_NOT_OF_A_TABLE | odd):
            wrong += 1
        elif entry & _OFFSET and tables < most:
            tables += 1
            file.seek(entry & _OFFSET)
            table = file.read(header.cluster_size)
            wrong += _wrong_in(table[: len(table) // _ENTRY * _ENTRY], odd)
    return wrong


@functools.lru_cache(maxsize=8)
def _in_each(count: int, bits: int) -> int:
    """A table of `count` entries that all have these bits, as one number."""
    return int.from_bytes(bits.to_bytes(_ENTRY, "big") * count, "big")


def _wrong_in(table: bytes, odd: int) -> int:
    """How many entries of a second table are wrong; all at once, since nearly always none is."""
    count = len(table) // _ENTRY
    entries = int.from_bytes(table, "big")
    if not entries & _in_each(count, _NOT_OF_DATA | odd | 1 << _COMPRESSED_BIT):
        return 0
    ones = _in_each(count, 1)
    compressed = entries >> _COMPRESSED_BIT & ones  # of these other bits say where they are
    wrong = entries & (ones - compressed) * (_NOT_OF_DATA | odd)
    if not wrong:
        return 0
    shown = wrong.to_bytes(len(table), "big")
    return sum(any(shown[at : at + _ENTRY]) for at in range(0, len(shown), _ENTRY))
