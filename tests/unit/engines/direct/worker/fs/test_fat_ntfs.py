"""The pure parts of the readers of FAT, NTFS and ISO 9660."""

from __future__ import annotations

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.fs.fat import directory
from imgtool.engines.direct.worker.fs.fat.directory import entries
from imgtool.engines.direct.worker.fs.iso import records
from imgtool.engines.direct.worker.fs.ntfs.stream import decompress


def _short(name: bytes, attributes: int = 0x20, case: int = 0) -> bytes:
    return (name + bytes([attributes, case])).ljust(32, b"\0")


def test_times_of_fat_count_from_1980_in_utc():
    assert directory.unix_time(0x21, 0) == 315532800
    assert directory.unix_time((44 << 9) | (2 << 5) | 29, (12 << 11) | 15) == 1709208030


def test_labels_and_deleted_entries_are_not_listed():
    data = _short(b"LABEL      ", 8) + _short(b"\xe5ONE    TXT") + _short(b"KEPT    TXT")
    assert [entry.name for entry in entries(data)] == [b"KEPT.TXT"]


def test_the_bits_of_windows_nt_give_lower_case():
    data = _short(b"NAME    TXT", case=8) + _short(b"NAME    TXT", case=16)
    assert [entry.name for entry in entries(data)] == [b"name.TXT", b"NAME.txt"]


def test_lznt1_repeats_what_it_has_seen():
    packed = b"\x03\xb0\x02a\xfc\x0f\0\0"
    assert decompress(packed, 8192) == b"a" * 4096 + bytes(4096)


def test_a_distance_before_the_beginning_is_damage():
    with pytest.raises(ReadFailed):
        decompress(b"\x03\xb0\x02a\xfc\xff\0\0", 4096)


def test_plain_names_of_iso_lose_version_and_case():
    assert records.plain_name(b"README.TXT;1") == b"readme.txt"
    assert records.plain_name(b"NODOT.;1") == b"nodot"


def test_impossible_names_of_iso_are_refused():
    with pytest.raises(Unsupported):
        records.joliet_name("a/b".encode("utf-16-be"))
