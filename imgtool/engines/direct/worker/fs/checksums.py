"""The checksums of filesystem metadata that the standard library does not have.

As ext4 uses CRCs: seeded, without a final inversion, so that one call continues where another
ended.
"""

from __future__ import annotations

from functools import cache

try:
    from google_crc32c import extend as _extend
except ImportError:  # Debian has another of the kind, which is slower

    def _extend(crc: int, chunk: bytes) -> int:
        from crc32c import crc32c as continued

        return int(continued(chunk, crc))


_CRC16 = 0xA001  # x^16 + x^15 + x^2 + 1, bits reversed
_ALL = 0xFFFFFFFF


def crc32c(seed: int, data: bytes) -> int:
    """CRC-32C of the data, going on from `seed`."""
    return int(_extend(seed ^ _ALL, data)) ^ _ALL


def standard_crc32c(data: bytes) -> int:
    """CRC-32C of the data as the rest of the world has it: inverted before and after."""
    return int(_extend(0, data))


@cache
def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CRC16 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc16(seed: int, data: bytes) -> int:
    """CRC-16 of the data, going on from `seed`."""
    table = _table()
    for byte in data:
        seed = table[(seed ^ byte) & 0xFF] ^ seed >> 8
    return seed
