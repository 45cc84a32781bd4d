"""Windows registry hives from nothing: hivex only changes hives that exist.

Layout: "Windows registry file format specification" by Maxim Suhanov, sections "Base block",
"Hive bins" and "Key node".
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hivex

REG_SZ, REG_DWORD = 1, 4

_BIN = 4096
_NOTHING = 0xFFFFFFFF
_FILETIME = 133_500_000_000_000_000  # some day in 2024, in 100 ns since 1601


def _cell(content: bytes) -> bytes:
    """A cell in use: its size, negative, then the content, padded to eight bytes."""
    size = -(-(len(content) + 4) // 8) * 8
    return struct.pack("<i", -size) + content.ljust(size - 4, b"\0")


def _empty_hive() -> bytes:
    """A hive with a root key and its security descriptor, and nothing else."""
    name = b"ROOT"
    root_offset = 32  # of cells, from the first bin on; the bin's own header comes before
    key = struct.pack(
        "<2sHQIIIIIIIIIIIIIIIHH",
        b"nk",
        0x2C,  # a root that cannot be deleted, its name in one byte a character
        _FILETIME,
        0,
        _NOTHING,  # parent
        0,
        0,  # subkeys, then volatile ones
        _NOTHING,
        _NOTHING,
        0,  # values
        _NOTHING,
        root_offset + 88,  # the security descriptor follows this cell
        _NOTHING,  # class name
        0,
        0,
        0,
        0,
        0,
        len(name),
        0,
    )
    key_cell = _cell(key + name)
    assert len(key_cell) == 88
    # Self-relative and empty: everyone may do everything.
    descriptor = struct.pack("<BBHIIII", 1, 0, 0x8000, 0, 0, 0, 0)
    here = root_offset + len(key_cell)
    security = struct.pack("<2sHIIII", b"sk", 0, here, here, 1, len(descriptor)) + descriptor
    used = key_cell + _cell(security)
    free = _BIN - 32 - len(used)
    header = struct.pack("<4sIIQQI", b"hbin", 0, _BIN, 0, _FILETIME, 0)
    first_bin = header + used + struct.pack("<i", free) + bytes(free - 4)

    base = struct.pack(
        "<4sIIQIIIIIII", b"regf", 1, 1, _FILETIME, 1, 3, 0, 1, root_offset, _BIN, 1
    ).ljust(508, b"\0")
    checksum = functools.reduce(operator.xor, struct.unpack("<127I", base))
    return (base + struct.pack("<I", checksum)).ljust(4096, b"\0") + first_bin


def write_hive(path: Path, keys: Mapping[str, Mapping[str, str | int]]) -> None:
    """A hive with these keys (`Select`, `A\\\\B`), each with its values."""
    path.write_bytes(_empty_hive())
    hive: Any = hivex.Hivex(str(path), write=True)
    for key, values in keys.items():
        node = hive.root()
        for part in key.split("\\"):
            node = hive.node_get_child(node, part) or hive.node_add_child(node, part)
        rows = []
        for name, value in values.items():
            if isinstance(value, int):
                row = (REG_DWORD, struct.pack("<I", value))
            else:
                row = (REG_SZ, (value + "\0").encode("utf-16-le"))
            rows.append({"key": name, "t": row[0], "value": row[1]})
        hive.node_set_values(node, rows)
    hive.commit(None)
