"""The two checksums of ext4's metadata: CRC-32C (metadata_csum) and CRC-16 (uninit_bg).

Neither is in the standard library. Both are used as ext4 uses them: seeded, without a final
inversion, so that one call continues where another ended.
"""

from __future__ import annotations

import struct
from array import array
from functools import cache

_CRC32C = 0x82F63B78  # the Castagnoli polynomial, bits reversed
_ZEROS = 32
_CRC16 = 0xA001  # x^16 + x^15 + x^2 + 1, bits reversed


def _bytewise(polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
        table.append(value)
    return table


@cache
def _pairwise() -> array[int]:
    """A table for two bytes at a time: every inode is checked, so this is where the time goes."""
    single = _bytewise(_CRC32C)
    low = [single[value & 0xFF] ^ value >> 8 for value in single]
    return array("I", [entry ^ high for high in single for entry in low])


@cache
def _words(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}H")


@cache
def _after_zeros(bit: int) -> int:
    """What one bit of a checksum becomes after `_ZEROS` zero bytes."""
    table = _pairwise()
    value = 1 << bit
    for _ in range(_ZEROS // 2):
        value = table[value & 0xFFFF] ^ value >> 16
    return value


@cache
def _zero_tables() -> list[list[int]]:
    """For each byte of a checksum, what its values become after `_ZEROS` zero bytes."""
    tables = []
    for first in range(0, 32, 8):
        table = [0]
        for bit in range(first, first + 8):
            table += [value ^ _after_zeros(bit) for value in table]
        tables.append(table)
    return tables


def crc32c(seed: int, data: bytes) -> int:
    """CRC-32C of the data, going on from `seed`."""
    # Most inodes end in zeros, and a checksum is linear: zeros are stepped over many at a time.
    skipped = 0
    if len(data) >= _ZEROS and not any(data[-_ZEROS:]):
        skipped = (len(data) - len(data.rstrip(b"\0"))) // _ZEROS
        data = data[: len(data) - skipped * _ZEROS]
    table = _pairwise()
    pairs = len(data) >> 1
    for word in _words(pairs).unpack_from(data):
        seed = table[(seed ^ word) & 0xFFFF] ^ seed >> 16
    if len(data) & 1:
        seed = table_of_one(_CRC32C)[(seed ^ data[-1]) & 0xFF] ^ seed >> 8
    if skipped:
        first, second, third, fourth = _zero_tables()
        for _ in range(skipped):
            seed = (
                first[seed & 0xFF]
                ^ second[seed >> 8 & 0xFF]
                ^ third[seed >> 16 & 0xFF]
                ^ fourth[seed >> 24]
            )
    return seed


def crc16(seed: int, data: bytes) -> int:
    """CRC-16 of the data, going on from `seed`."""
    table = table_of_one(_CRC16)
    for byte in data:
        seed = table[(seed ^ byte) & 0xFF] ^ seed >> 8
    return seed


@cache
def table_of_one(polynomial: int) -> list[int]:
    """The table for one byte at a time."""
    return _bytewise(polynomial)
