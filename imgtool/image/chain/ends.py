"""Where the file of an image ends, and where what it holds would end.

Of most formats QEMU opens a truncated image without a word, and reads zeros past its end.
"""

from __future__ import annotations

import os
import shlex
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from imgtool.errors import ImageError
from imgtool.formats import vdi, vhd, vhdx, vmdk
from imgtool.image.locking.host_file import open_host_file
from imgtool.text import printable

_SECTOR = 512
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ")
_LARGEST_DISK = 1 << 62
_PROTECTIVE = 0xEE


@dataclass(frozen=True)
class Unseen:
    """A part of a disk that is not seen: `what` it is in a word for scripts, what it `means`, what
    to `do`; how many bytes the disk has, and how many of them are `there`."""

    what: str
    means: str
    do: str
    size: int
    there: int

    def line(self, path: Path) -> str:
        """For the user."""
        return f"{printable(path)}: {self.means}"


class Truncated(ImageError):
    """The file of an image is shorter than what its tables name; `unseen` says how much."""

    def __init__(self, path: Path, unseen: Unseen) -> None:
        super().__init__(unseen.means, subject=printable(path), hint=unseen.do)
        self.unseen = unseen


class Short(NamedTuple):
    """A file that is `length` bytes long, and holds what reaches to `needed`."""

    path: Path
    length: int
    needed: int


def _size_needed(file: BinaryIO, format: str) -> int:
    if format == "vdi" and (disk := vdi.read(file)) is not None:
        return vdi.size_needed(file, disk)
    if format == "vhdx" and (image := vhdx.read(file)) is not None:
        return vhdx.size_needed(file, image)
    if format == "vpc" and (footer := vhd.read_footer(file)) is not None:
        return vhd.size_needed(file, footer)
    if format == "vmdk" and (sparse := vmdk.read_sparse(file)) is not None:
        return vmdk.size_needed(file, sparse)
    return 0


def short_files(
    file: BinaryIO, path: Path, format: str, extents: Sequence[Path] = ()
) -> Iterator[Short]:
    """Which files of a VDI, VHD, VHDX or VMDK are too short for what its tables name."""
    yield from _short(path, file, _size_needed(file, format))
    if not extents:
        return
    descriptor = vmdk.read_descriptor(file)
    flat = {
        Path(os.fsdecode(extent.name)).name: extent.offset + extent.size
        for extent in (descriptor.extents if descriptor is not None else ())
        if extent.kind in ("FLAT", "VMFS")
    }
    for extent in extents:
        with open_host_file(extent) as part:
            yield from _short(extent, part, flat.get(extent.name) or _size_needed(part, format))


def _short(path: Path, file: BinaryIO, needed: int) -> Iterator[Short]:
    length = file.seek(0, os.SEEK_END)
    if length < needed:
        yield Short(path, length, needed)


def disk_size(start: bytes, length: int) -> int:
    """How many bytes the disk has of which these are the first two sectors or more, and `length`
    bytes are there: by its GPT, or its msdos table; `length` where neither says that it has more.

    Layout: UEFI specification 2.10, section 5.
    """
    if len(start) < 2 * _SECTOR or start[510:512] != b"\x55\xaa":
        return length
    magic, _, size, checksum, _, here, twin, _, last = _GPT_HEADER.unpack_from(start, _SECTOR)
    if magic == b"EFI PART":
        whole = _GPT_HEADER.size <= size <= _SECTOR and here == 1 and last < twin
        header = start[_SECTOR : _SECTOR + size]
        if whole and zlib.crc32(header[:16] + bytes(4) + header[20:]) == checksum:
            return int(max(length, min((twin + 1) * _SECTOR, _LARGEST_DISK)))
        return length
    return max(length, _msdos_size(start))


def _msdos_size(start: bytes) -> int:
    """Where the last partition of an msdos table ends; 0 where this is no such table."""
    end = 0
    for at in range(446, 510, 16):
        status, kind = start[at], start[at + 4]
        first, count = struct.unpack_from("<II", start, at + 8)
        if status & 0x7F or (kind and not (first and count)):
            return 0  # a boot sector of something else
        if kind == _PROTECTIVE:
            return 0  # which has no size of its own
        if kind:
            end = max(end, (first + count) * _SECTOR)
    return end


def other_size(path: Path, footer: vhd.Footer, size: int) -> Unseen | None:
    """What QEMU does not see of a VHD that it takes for a disk of `size` bytes."""
    if footer.size <= size:
        return None
    name = str(path).replace(",", ",,")
    node = f"driver=vpc,force_size_calc=current_size,file.filename={name}"
    return Unseen(
        "geometry",
        f"its footer says {footer.size} bytes, but QEMU goes by its geometry, {size} bytes: what"
        " lies beyond is not seen",
        f"to have all of it: qemu-img convert -O qcow2 --image-opts {shlex.quote(printable(node))}"
        " NEW.qcow2",
        footer.size,
        size,
    )


def cut_off(start: bytes, length: int) -> Unseen | None:
    """What is missing of a raw disk of `length` bytes that begins with these bytes."""
    size = disk_size(start, length)
    if size == length:
        return None
    return Unseen(
        "cut-off",
        f"it ends at {length} bytes, but its partition table is of a disk of {size} bytes: what"
        " lies beyond cannot be read",
        "copy it anew from where it came, and compare the lengths; to have what is left mounted,"
        f" lengthen a copy of it: truncate -s {size} COPY",
        size,
        length,
    )
