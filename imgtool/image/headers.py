"""What the first bytes of a file tell of it as an image, quickly and without trusting them.

Meant for thousands of files: each is opened once and a few hundred bytes of it are read. What is
told is what the header says; whether the image is sound is not looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from imgtool.formats import lineage, qcow2, vhd, vmdk
from imgtool.formats.protocols import protocol_of
from imgtool.image.locking.held import real_path, way_to

_MAGICS = (
    (0, b"QED\0", "qed"),
    (0, vmdk.SPARSE_MAGIC, "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
# Those of which every image is known by its first bytes.
FORMATS_WITH_MAGIC = ("qcow2", "qcow", "qed", "vdi", "vhdx")
_PROBED = 512
_LONGEST_NAME = 1023  # the longest that QEMU takes
_LOCAL = ("file", "host_device")
_QCOW_PLACE = struct.Struct(">QI")
_QED_PLACE = struct.Struct("<II")
_QED_HAS_BACKING, _QED_NO_PROBE = 1, 4
_QED_FIELDS = struct.Struct("<4sIIIQQQQQII")


@dataclass(frozen=True)
class Header:
    """What one file says of itself.

    `format` is None for a file that is no image but perhaps a raw one. `virtual_size` in bytes,
    None where it takes more than the header to know it. `backing` is the name as written,
    `backing_format` None where the header names none. `identity` is the file's device and inode,
    `modified` the time of its last change in nanoseconds, 0 for a block device, which tells none.
    `damaged`: QEMU would not take the header. `id` is what the image is known by to those that
    stand on it, `parent_id` that of what it stands on itself; `differencing`: QEMU would not read
    the two together.
    """

    path: Path
    identity: tuple[int, int]
    format: str | None
    size: int
    actual_size: int
    modified: int
    virtual_size: int | None = None
    backing: str | None = None
    backing_format: str | None = None
    snapshots: int = 0
    dirty: bool = False
    corrupt: bool = False
    damaged: bool = False
    id: str | None = None
    parent_id: str | None = None
    differencing: bool = False


def _name(file: BinaryIO, offset: int, length: int) -> str | None:
    if not offset or not 0 < length <= _LONGEST_NAME or offset >= 1 << 62:
        return None
    file.seek(offset)
    return os.fsdecode(file.read(length)) or None


def format_of(start: bytes) -> str | None:
    """The format that the first bytes of a file are those of; None where they are of none."""
    if start.startswith(qcow2.MAGIC):
        return "qcow" if start[4:8] == b"\0\0\0\1" else "qcow2"
    for at, magic, name in _MAGICS:
        if start[at : at + len(magic)] == magic:
            return name
    return "vmdk" if vmdk.looks_like_descriptor(start) else None


def _told(file: BinaryIO, start: bytes, format: str) -> dict[str, object]:
    if format == "qcow2" and (header := qcow2.read_header(file)) is not None:
        named = header.backing_format
        return {
            "virtual_size": header.virtual_size,
            "backing": os.fsdecode(header.backing) if header.backing else None,
            "backing_format": named.decode(errors="replace") if named else None,
            "snapshots": header.snapshots,
            "dirty": header.dirty,
            "corrupt": header.corrupt,
        }
    if format in ("qcow2", "qcow"):
        # A header that QEMU would refuse still tells what its image stood on.
        backing = _name(file, *_QCOW_PLACE.unpack_from(start, 8)) if len(start) >= 20 else None
        return {"backing": backing, "damaged": format == "qcow2"}
    if format == "qed" and len(start) >= _QED_FIELDS.size:
        fields = _QED_FIELDS.unpack_from(start)
        features, size, offset, length = fields[4], fields[8], fields[9], fields[10]
        backing = _name(file, offset, length) if features & _QED_HAS_BACKING else None
        format = "raw" if backing and features & _QED_NO_PROBE else ""
        return {"virtual_size": size, "backing": backing, "backing_format": format or None}
    if format == "vpc" and (footer := vhd.read_footer(file)) is not None and footer.offset:
        return {"virtual_size": footer.size, "id": f"vpc {footer.id.hex()}"}
    found = lineage.read(file)
    if found is None:
        return {}
    # QEMU takes the names in a VMDK as they stand there; the others' are often those of Windows.
    asis = found.format == "vmdk"
    parent = found.parent if asis or not found.parent else lineage.local_name(found.parent)
    return {
        "backing": parent,
        "backing_format": found.format if parent else None,
        "id": found.id,
        "parent_id": found.parent_id,
        "differencing": found.differencing,
    }


def _fixed_vhd(file: BinaryIO) -> str | None:
    """The format of a file that is known by its end alone."""
    return "vpc" if vhd.read_footer(file) is not None else None


def read(path: Path) -> Header | None:
    """The header of the file or block device at `path`; None for anything else.

    Raises `OSError`.
    """
    way = way_to(path)
    kind = way.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        return None
    descriptor = os.open(way, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=_PROBED) as file:
        status = os.fstat(descriptor)
        start = file.read(_PROBED)
        format = format_of(start)
        device = stat.S_ISBLK(status.st_mode)
        if format is None:
            format = _fixed_vhd(file)
        size = file.seek(0, os.SEEK_END) if device else status.st_size
        told = _told(file, start, format) if format else {"virtual_size": size}
        return Header(
            path=path,
            identity=(status.st_dev, status.st_ino),
            format=format,
            size=size,
            actual_size=size if device else status.st_blocks * 512,
            modified=0 if device else status.st_mtime_ns,
            **told,
        )


def contradicts(header: Header, format: str) -> bool:
    """Whether a file cannot be, or should not be taken as, an image of this format.

    A fixed VHD is a raw disk with a footer behind it, and can be taken as either.
    """
    if header.format == "vpc" and format == "raw":
        return header.virtual_size is None
    if header.format is not None:
        return header.format != format
    return format in FORMATS_WITH_MAGIC


def is_newer(base: int, overlay: int) -> bool:
    """Whether a base was changed after its overlay, by their times in nanoseconds.

    A time in whole seconds is one of a file system that knows no finer ones, or of a copy that
    lost the rest; then the seconds alone are compared.
    """
    if base % 10**9 == 0 or overlay % 10**9 == 0:
        base, overlay = base // 10**9, overlay // 10**9
    return base > overlay


def _file_in(node: object) -> str | None:
    """The local file in a description of an image as QEMU's json: pseudo-names have it."""
    while isinstance(node, dict):
        name = node.get("filename") or node.get("file.filename")
        if isinstance(name, str):
            return name
        node = node.get("file")
    return None


def bases_of(header: Header) -> tuple[Path, ...]:
    """Where the backing file that a header names is, or should be: a relative name starts where the
    file itself is, and for QEMU in the folder of a link that leads to it. Empty for what is no
    local file.

    For comparing only: the name was written by whoever wrote the image.
    """
    name = header.backing
    if name is None:
        return ()
    if name.startswith("json:"):
        try:
            name = _file_in(json.loads(name.removeprefix("json:")))
        except (ValueError, RecursionError):
            return ()
        if name is None:
            return ()
    elif protocol_of(name) in _LOCAL:
        name = name.partition(":")[2]
    elif protocol_of(name) is not None:
        return ()
    if not name or "\0" in name:
        return ()
    starts = [header.path.parent]
    if header.path.is_symlink() or not header.path.is_absolute():
        with contextlib.suppress(OSError, RuntimeError):  # gone, or a circle
            starts.insert(0, real_path(header.path).parent)
    names = [name]
    if header.differencing:  # it was made where its parent was in another folder
        names.append(Path(name).name)
    return tuple(dict.fromkeys(start / name for name in names for start in starts))


def base_of(header: Header) -> Path | None:
    """The first of `bases_of` that is there; where none is, the first; None where there is none."""
    named = bases_of(header)
    for path in named if len(named) > 1 else ():
        with contextlib.suppress(OSError, ValueError):
            path.stat()
            return path
    return named[0] if named else None
