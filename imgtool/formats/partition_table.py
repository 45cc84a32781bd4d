"""Partition tables, read from bytes: msdos with logical partitions, GPT, or none.

The answer is the one that the Linux kernel and parted give for the same disk: what counts as a
table, which entries are partitions, and how they are numbered. The table is hostile; everything
that is followed is bounded.

Sources: UEFI specification 2.10, section 5 (GPT, protective MBR); Linux, block/partitions/msdos.c
and efi.c (which entries count).
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from imgtool.formats.foreign_tables import foreign_table
from imgtool.formats.partition_types import EFI_SYSTEM, EXTENDED, GPT_TYPES, MSDOS_TYPES, PROTECTIVE

Read = Callable[[int, int], bytes]

SECTOR = 512
_MAX_LOGICAL = 128
_MAX_GPT_ENTRIES = 1 << 20  # bytes of the whole array; parted writes no larger one
_MAX_PROBLEMS = 20
_NO_COPY = "the copy of the partition table is missing or damaged"
_BEYOND = "reaches past the end of the disk"
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ")
_LEGACY_BOOT = 1 << 2

# Boot sectors of file systems also end in 55 AA; these signatures tell them from a table.
_BOOT_SECTORS = (
    (0x36, b"FAT"),
    (0x52, b"FAT32"),
    (0x03, b"NTFS    "),
    (0x03, b"EXFAT   "),
)


@dataclass(frozen=True)
class PartitionTable:
    """The rows of a disk, in the order of their numbers, and lines for the user on what is odd.

    `cut_off`: nothing is odd but that the disk ends before its table does.
    """

    partitions: tuple[Partition, ...]
    problems: tuple[str, ...] = ()
    cut_off: bool = False

    @property
    def lacks_copy(self) -> bool:
        """Whether nothing is odd but that the copy of the table at the end cannot be used."""
        return len(self.problems) == 1 and self.problems[0].endswith(_NO_COPY)


@dataclass(frozen=True)
class _Entry:
    """An entry of an msdos table; `start` and `count` in sectors, as written."""

    bootable: bool
    type: int
    start: int
    count: int

    @property
    def extended(self) -> bool:
        return self.type in EXTENDED


def disk_name(number: int) -> str:
    """The name of a guest's disk, counted from 0: /dev/sda ... /dev/sdz, /dev/sdaa ..."""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return f"/dev/sd{letters}"


def partition_device(disk: str, number: int) -> str:
    """The device of a partition: `/dev/sda1`, but `/dev/nbd0p1` after a digit."""
    return f"{disk}p{number}" if disk[-1:].isdigit() else f"{disk}{number}"


def _entries(sector: bytes) -> tuple[_Entry, ...] | None:
    """The four entries of a boot record; None if it is not one."""
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa":
        return None
    rows = [struct.unpack_from("<B3xB3xII", sector, 446 + 16 * slot) for slot in range(4)]
    return tuple(_Entry(status == 0x80, kind, start, count) for status, kind, start, count in rows)


def _master_entries(sector: bytes, sectors: int) -> tuple[_Entry, ...] | None:
    """The primary entries; None if sector 0 holds no table but, say, a FAT boot sector."""
    entries = _entries(sector)
    if entries is None:
        return None
    if any(sector[446 + 16 * slot] & 0x7F for slot in range(4)):
        return None
    if any(sector.startswith(signature, at) for at, signature in _BOOT_SECTORS):
        return None
    used = [entry for entry in entries if entry.count]
    if used and all(entry.start >= sectors for entry in used):
        return None
    return entries


def _no_partitions(device: str, size: int, table: str) -> Partition:
    return Partition(
        device=device,
        number=None,
        start=0,
        size=size,
        end=max(size - 1, 0),
        start_sector=0,
        sector_size=SECTOR,
        type=None,
        type_name=None,
        name=None,
        bootable=False,
        table=table,
    )


def _msdos_row(device: str, number: int, entry: _Entry, first: int, disk_id: int) -> Partition:
    return Partition(
        device=partition_device(device, number),
        number=number,
        start=first * SECTOR,
        size=entry.count * SECTOR,
        end=(first + entry.count) * SECTOR - 1,
        start_sector=first,
        sector_size=SECTOR,
        type=f"0x{entry.type:02x}",
        type_name=MSDOS_TYPES.get(entry.type),
        name=None,
        bootable=entry.bootable,
        table="msdos",
        partuuid=f"{disk_id:08x}-{number:02x}" if disk_id else None,
    )


def _logical(read: Read, outer: _Entry, sectors: int) -> Iterator[tuple[_Entry, int]]:
    """The logical partitions in an extended one, with their first sectors on the disk.

    Boot records are chained; each may hold one partition, and odd tools use more of its entries.
    """
    seen: set[int] = set()
    here, length = outer.start, outer.count
    while here not in seen and here < sectors and len(seen) < _MAX_LOGICAL:
        seen.add(here)
        entries = _entries(read(here * SECTOR, SECTOR))
        if entries is None:
            return
        for slot, entry in enumerate(entries):
            if not entry.count or entry.extended:
                continue
            first = here + entry.start
            inside = (
                entry.start + entry.count <= length
                and outer.start <= first
                and first + entry.count <= outer.start + outer.count
            )
            if slot < 2 or inside:  # the last two are garbage more often than partitions
                yield entry, first
        links = [entry for entry in entries if entry.extended and entry.count]
        if not links:
            return
        here, length = outer.start + links[0].start, links[0].count


def _read_msdos(
    read: Read, entries: Sequence[_Entry], size: int, device: str
) -> tuple[Partition, ...]:
    disk_id = int.from_bytes(read(0, SECTOR)[440:444], "little")
    rows = [
        _msdos_row(device, slot, entry, entry.start, disk_id)
        for slot, entry in enumerate(entries, 1)
        if entry.count  # whatever its type, as Linux has it
    ]
    number = 4
    for outer in entries:
        if not outer.extended or not outer.count:
            continue
        for entry, first in _logical(read, outer, size // SECTOR):
            if number == 4 + _MAX_LOGICAL:
                break
            number += 1
            rows.append(_msdos_row(device, number, entry, first, disk_id))
    return tuple(rows) or (_no_partitions(device, size, "msdos"),)


def _gpt_at(
    read: Read, lba: int, sector_size: int, last: int | None
) -> tuple[int, bytes, int] | None:
    """A valid GPT header at `lba`: where its twin is, its entries, the size of one. Else None.

    `last` is the last sector of the disk, None for one that may have lost its end.
    """
    sector = read(lba * sector_size, sector_size)
    if len(sector) < _GPT_HEADER.size or not sector.startswith(b"EFI PART"):
        return None
    fields = _GPT_HEADER.unpack_from(sector)
    header_size, header_crc, here, twin, _, last_usable = fields[2], fields[3], *fields[5:9]
    entries_lba, count, entry_size, entries_crc = fields[10:]
    if last is None:
        last = twin
    if not _GPT_HEADER.size <= header_size <= sector_size or here != lba or last_usable > last:
        return None
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:header_size]) != header_crc:
        return None
    length = count * entry_size
    if entry_size < 128 or entry_size % 128 or length > _MAX_GPT_ENTRIES or entries_lba > last:
        return None
    entries = read(entries_lba * sector_size, length)
    if len(entries) != length or zlib.crc32(entries) != entries_crc:
        return None
    return twin, entries, entry_size


def _gpt_row(device: str, number: int, entry: bytes, sector_size: int) -> Partition | None:
    kind, unique, first, last, attributes = _GPT_ENTRY.unpack_from(entry)
    if kind == bytes(16):
        return None
    type_guid = str(uuid.UUID(bytes_le=kind)).upper()
    name = entry[56:128].decode("utf-16-le", errors="replace").partition("\0")[0]
    return Partition(
        device=partition_device(device, number),
        number=number,
        start=first * sector_size,
        size=(last - first + 1) * sector_size,
        end=(last + 1) * sector_size - 1,
        start_sector=first,
        sector_size=sector_size,
        type=type_guid,
        type_name=GPT_TYPES.get(type_guid),
        name=name,
        bootable=type_guid == EFI_SYSTEM or bool(attributes & _LEGACY_BOOT),
        table="gpt",
        partuuid=str(uuid.UUID(bytes_le=unique)),
    )


def _read_gpt(read: Read, size: int, device: str, sector_size: int) -> PartitionTable | None:
    last = size // sector_size - 1
    found = _gpt_at(read, 1, sector_size, last)
    problems, cut_off = [], False
    if found is None and (found := _gpt_at(read, 1, sector_size, None)) is not None:
        cut_off = True  # Linux takes no such table
        problems.append(
            f"{device} ends before the disk that its partition table is of, which has"
            f" {(found[0] + 1) * sector_size} bytes"
        )
    elif found is None:
        found = _gpt_at(read, last, sector_size, last) if last > 1 else None
        if found is None:
            return None
        problems.append(
            f"{device}: the partition table at the start of the disk is damaged;"
            " its copy at the end was used"
        )
    elif _gpt_at(read, min(found[0], last), sector_size, last) is None:
        problems.append(f"{device}: {_NO_COPY}")
    _, entries, entry_size = found
    rows = []
    for number, at in enumerate(range(0, len(entries), entry_size), 1):
        row = _gpt_row(device, number, entries[at : at + entry_size], sector_size)
        if row is not None and row.size > 0:
            rows.append(row)
        elif row is not None:
            problems.append(f"{row.device} ends before it starts: left out")
            cut_off = False
    none = replace(_no_partitions(device, size, "gpt"), sector_size=sector_size)
    return PartitionTable(tuple(rows) or (none,), tuple(problems[:_MAX_PROBLEMS]), cut_off)


def problems(partitions: Sequence[Partition], size: int) -> tuple[str, ...]:
    """Lines on partitions that reach past the end of a disk of `size` bytes, or overlap."""
    found = []
    widest: Partition | None = None
    rows = [row for row in partitions if row.number is not None]
    for row in sorted(rows, key=lambda row: (row.start, row.end)):
        if row.end >= size:
            found.append(f"{row.device} {_BEYOND}")
        if row.table == "msdos" and int(row.type or "0", 16) in EXTENDED:
            continue  # it holds the logical ones
        if widest is not None and row.start <= widest.end:
            found.append(f"{row.device} overlaps {widest.device}")
        if widest is None or row.end > widest.end:
            widest = row
    if len(found) > _MAX_PROBLEMS:
        found[_MAX_PROBLEMS:] = [f"and {len(found) - _MAX_PROBLEMS} more such partitions"]
    return tuple(found)


def examine(read: Read, size: int, device: str) -> PartitionTable:
    """The partition table of the disk `device` of `size` bytes, and what is odd about it.

    `read(offset, length)` gives bytes of the disk, fewer past its end. A disk without a table, or
    with an empty one, is one row with `number` None.
    """
    entries = _master_entries(read(0, SECTOR), size // SECTOR)
    odd: tuple[str, ...] = ()
    cut_off = True
    if entries is None:
        foreign = foreign_table(read, size)
        rows: tuple[Partition, ...] = (_no_partitions(device, size, foreign or "none"),)
    elif any(entry.type == PROTECTIVE for entry in entries):
        # Also a hybrid: where the two tables disagree, Linux goes by the GPT.
        table = _read_gpt(read, size, device, SECTOR) or _read_gpt(read, size, device, 4096)
        if table is None:
            odd = (f"{device}: protected for a GPT, but neither copy of one is intact",)
            table = PartitionTable((_no_partitions(device, size, "none"),))
        rows, odd, cut_off = table.partitions, odd + table.problems, table.cut_off
    else:
        rows = _read_msdos(read, entries, size, device)
        if rows[0].number is None and (foreign := foreign_table(read, size)):
            rows = (replace(rows[0], table=foreign),)
    wrong = problems(rows, size)
    cut_off = cut_off and bool(odd or wrong) and all(line.endswith(_BEYOND) for line in wrong)
    return PartitionTable(rows, odd + wrong, cut_off)


@dataclass(frozen=True)
class Partition:
    """A row of `partitions`. `end` and `end_sector` are inclusive; `type` is the table's own code
    (a GUID for GPT, `0x83` for msdos); `table` is gpt, msdos or none.

    A disk without a partition table is one row with `number` None. `partuuid` is what Linux calls
    PARTUUID.
    """

    device: str
    number: int | None
    start: int
    size: int
    end: int
    start_sector: int
    sector_size: int
    type: str | None
    type_name: str | None
    name: str | None
    bootable: bool
    table: str
    partuuid: str | None = None
