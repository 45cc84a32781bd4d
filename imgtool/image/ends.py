"""Where the file of an image ends, and where what it holds would end.

Of most formats QEMU opens a truncated image without a word, and reads zeros past its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from imgtool.image import vdi, vhd, vhdx, vmdk
from imgtool.image.host_file import open_host_file


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
