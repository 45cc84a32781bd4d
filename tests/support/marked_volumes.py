"""Volumes with the marks of filesystems that no program here makes."""

from __future__ import annotations

import binascii
import struct
import subprocess

MIB = 1 << 20


class Volume:
    """Bytes that are zero but where something was written."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> Volume:
        self.data[offset : offset + len(data)] = data
        return self


def udf_tag(ident: int, location: int, body: bytes, length: int = 512) -> bytes:
    """A descriptor of ECMA-167: tag and body, with the tag's sum and the body's CRC."""
    body = body.ljust(length - 16, b"\0")
    head = struct.pack(
        "<HHBBHHHI", ident, 3, 0, 0, 1, binascii.crc_hqx(body, 0), len(body), location
    )
    return head[:4] + bytes([(sum(head) - head[4]) & 0xFF]) + head[5:] + body


def udf(block: int, size: int) -> Volume:
    """A UDF of these blocks, as far as libblkid looks: its descriptors lie behind the anchor."""
    volume = Volume(size)
    for number, mark in enumerate((b"BEA01", b"NSR03", b"TEA01")):
        volume.write(32768 + number * max(block, 2048), b"\0" + mark + b"\1")
    first = 300
    extent = struct.pack("<II", 16 * block, first)
    volume.write(256 * block, udf_tag(2, 256, extent + extent))
    name = bytes([8]) + b"Label"
    identifier = name.ljust(127, b"\0") + bytes([len(name)])
    charset = b"\0OSTA Compressed Unicode".ljust(64, b"\0")
    logical = struct.pack("<I", 1) + charset + identifier + struct.pack("<I", block)
    volume.write(first * block, udf_tag(6, first, logical))
    volume.write((first + 1) * block, udf_tag(8, first + 1, b""))
    return volume


def bitlocker() -> Volume:
    """A volume of BitLocker: its boot sector, and the three headers that this names."""
    boot = b"\xeb\x58\x90-FVE-FS-" + struct.pack("<HB", 512, 8)
    boot = boot.ljust(160, b"\0") + bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")
    boot = boot.ljust(176, b"\0") + struct.pack("<QQQ", 20 * MIB, 24 * MIB, 28 * MIB)
    volume = Volume(32 * MIB).write(0, boot.ljust(510, b"\0") + b"\x55\xaa")
    for at in (20, 24, 28):
        volume.write(at * MIB, b"-FVE-FS-" + struct.pack("<HH", 64, 2))
    return volume


def vmfs() -> Volume:
    """A volume of VMware's filesystem."""
    return Volume(8 * MIB).write(2 * MIB, b"\x5e\xf1\xab\x2f".ljust(512, b"\1"))


def erofs_beside_minix() -> Volume:
    """An erofs with what minix would have in the same places: both are found, and exclude each
    other."""
    volume = Volume(64 * MIB)
    fields = struct.pack("<HHHHHHIHH", 0xE1E2, 0xE0F5, 8, 8, 100, 0, 0x7FFFFFFF, 0x137F, 1)
    return volume.write(1024, fields).write(1024, b"\xe2\xe1\xf5\xe0").write(1024 + 12, bytes([12]))


def blkid_version() -> tuple[int, ...]:
    said = subprocess.run(["blkid", "-V"], capture_output=True, text=True, check=True).stdout
    return tuple(int(number) for number in said.split()[3].split(".")[:2])


# It looks closer: what is made here by hand is no UDF for it, nor an erofs.
STRICT = blkid_version() >= (2, 41)
