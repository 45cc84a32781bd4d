"""Small exFAT volumes, filled without a mount: made by mkfs.exfat, the files written in by hand."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Union

ENTRY = 32
Tree = Mapping[str, Union[bytes, "Tree"]]
_NO_FAT_CHAIN = 3
_END = 0xFFFFFFFF
_WHEN = struct.pack("<HH", 12 << 11 | 34 << 5 | 28, (2024 - 1980) << 9 | 2 << 5 | 29)


def entry_sum(data: bytes) -> int:
    """The checksum of an entry set, but for its own place in it."""
    return _sum16(data[:2] + data[4:])


def _sum16(data: bytes) -> int:
    total = 0
    for byte in data:
        total = ((total & 1) << 15) + (total >> 1) + byte & 0xFFFF
    return total


def boot_sum(region: bytes) -> bytes:
    """The four bytes that fill the twelfth sector, for the eleven sectors before it."""
    total = 0
    for at, byte in enumerate(region):
        if at not in (106, 107, 112):
            total = ((total & 1) << 31) + (total >> 1) + byte & 0xFFFFFFFF
    return total.to_bytes(4, "little")


class Exfat:
    """A volume in memory. Names are ASCII; those that begin with `chained` lie in pieces."""

    def __init__(self, path: Path, size: int, cluster: int) -> None:
        with path.open("wb") as file:
            file.truncate(size)
        command = ["mkfs.exfat", "-L", "LABEL", "-c", str(cluster), str(path)]
        where = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
        env = {**os.environ, "PATH": where}
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=env)
        self.image = bytearray(path.read_bytes())
        fat: int
        heap: int
        fat, _, heap, _, self._root = struct.unpack_from("<IIIII", self.image, 80)
        self._table, self._heap, self.cluster = fat * 512, heap * 512, cluster
        root = self.at(self._root)
        entry = next(n for n in range(root, root + cluster, ENTRY) if self.image[n] == 0x81)
        self._bitmap = self.at(struct.unpack_from("<I", self.image, entry + 20)[0])
        self._next = self._root + 1
        self.directories = [root]  # where each cluster of a directory is, in bytes

    @property
    def table(self) -> int:
        """Where the table of clusters is, in bytes."""
        return self._table

    @property
    def bitmap(self) -> int:
        """Where the allocation bitmap is, in bytes."""
        return self._bitmap

    def at(self, cluster: int) -> int:
        """Where a cluster is, in bytes."""
        return self._heap + (cluster - 2) * self.cluster

    def fill(self, tree: Tree) -> None:
        """Write a tree into the root directory, which takes further clusters as it needs them."""
        sets = self._sets(tree)
        root = self.at(self._root)
        used = next(n for n in range(0, self.cluster, ENTRY) if not self.image[root + n])
        first, rest = sets[: self.cluster - used], sets[self.cluster - used :]
        self.image[root + used : root + used + len(first)] = first
        last = self._root
        while rest:
            (cluster,) = self._allocate(1, 2)
            self._link(last, cluster)
            self._write(cluster, rest[: self.cluster])
            self.directories.append(self.at(cluster))
            last, rest = cluster, rest[self.cluster :]
        self._link(last, _END)

    def _sets(self, tree: Tree) -> bytes:
        return b"".join(self._set(name, value) for name, value in tree.items())

    def _set(self, name: str, value: bytes | Tree) -> bytes:
        attributes, chained = 0x20, name.startswith("chained")
        if isinstance(value, bytes):
            content = value
        else:
            attributes = 0x10
            content = self._sets(value)
            content = content.ljust(-(-max(1, len(content)) // self.cluster) * self.cluster, b"\0")
        clusters = self._allocate(-(-len(content) // self.cluster), 2 if chained else 1)
        for number, cluster in enumerate(clusters):
            self._write(cluster, content[number * self.cluster :][: self.cluster])
            if attributes == 0x10:
                self.directories.append(self.at(cluster))
            if chained:
                self._link(cluster, (*clusters, _END)[number + 1])
        units = name.encode("utf-16-le")
        flags = 1 if chained or not content else _NO_FAT_CHAIN
        first = clusters[0] if clusters else 0
        entry = struct.pack("<BBHHH", 0x85, 1 + -(-len(name) // 15), 0, attributes, 0)
        entry += _WHEN * 3 + bytes([0, 50, 0x80, 0x80, 0x80])
        entry = entry.ljust(ENTRY, b"\0")
        entry += struct.pack("<BBBBHH", 0xC0, flags, 0, len(name), self._hash(name), 0)
        entry += struct.pack("<QIIQ", len(content), 0, first, len(content))
        for at in range(0, len(units), 30):
            entry += b"\xc1\0" + units[at : at + 30].ljust(30, b"\0")
        return entry[:2] + entry_sum(entry).to_bytes(2, "little") + entry[4:]

    @staticmethod
    def _hash(name: str) -> int:
        return _sum16(name.upper().encode("utf-16-le"))

    def _allocate(self, count: int, step: int) -> list[int]:
        found = list(range(self._next, self._next + count * step, step))
        self._next += count * step
        for cluster in found:
            self.image[self._bitmap + (cluster - 2) // 8] |= 1 << (cluster - 2) % 8
        return found

    def _link(self, cluster: int, following: int) -> None:
        struct.pack_into("<I", self.image, self._table + cluster * 4, following)

    def _write(self, cluster: int, content: bytes) -> None:
        self.image[self.at(cluster) : self.at(cluster) + len(content)] = content
