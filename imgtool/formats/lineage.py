"""Which image an image of another maker says that it is, and which one it stands on.

QEMU follows the parent of a qcow2 or a VMDK. Those of VHD, VHDX and VDI it does not know: it reads
zeros, or nothing at all, where the parent would show.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import ImageError
from imgtool.formats import vdi, vhd, vhdx, vmdk
from imgtool.text import printable

_SHARED_CIDS = (vmdk.NO_PARENT, 0xFFFF_FFFE)  # the latter is of any new disk of VMware's
_MOST_LOOKED_AT = 1000
_LONGEST_NAME = 300  # of a name in a message
_SPOKEN = {"vpc": "VHD", "vhdx": "VHDX", "vdi": "VDI", "vmdk": "VMDK"}
_MERGED_BY = {
    "vpc": "Hyper-V's Convert-VHD or 'VBoxManage clonemedium' makes one image of both",
    "vhdx": "Hyper-V's Convert-VHD makes one image of both",
    "vdi": "'VBoxManage clonemedium' makes one image of both",
    "vmdk": "VMware's 'vmware-vdiskmanager -r' makes one image of both",
}


@dataclass(frozen=True)
class Lineage:
    """`id` is the image's own, None where it has none that tells it from others, `parent_id` that
    of what it stands on. `parent` is the name of that as written, None where it names none.
    `differencing`: it stands on what QEMU would not read."""

    format: str
    id: str | None = None
    differencing: bool = False
    parent: str | None = None
    parent_id: str | None = None


def _name_of(kind: str, id: bytes) -> str | None:
    return f"{kind} {id.hex()}" if any(id) else None


def _of_vhd(file: BinaryIO) -> Lineage | None:
    footer = vhd.read_footer(file)
    if footer is None:
        return None
    own = _name_of("vpc", footer.id)
    if footer.kind != vhd.DIFFERENCING:
        return Lineage("vpc", own)
    dynamic = vhd.read_dynamic(file, footer)
    if dynamic is None:
        return Lineage("vpc", own, differencing=True)
    return Lineage("vpc", own, True, dynamic.parent or None, _name_of("vpc", dynamic.parent_id))


def _of_vmdk(file: BinaryIO) -> Lineage:
    found = vmdk.read_descriptor(file)
    if found is None:
        return Lineage("vmdk")
    own = None if found.cid in _SHARED_CIDS else f"vmdk {found.cid:08x}"
    if found.parent_cid == vmdk.NO_PARENT:
        return Lineage("vmdk", own, parent=found.parent)
    below = None if found.parent_cid in _SHARED_CIDS else f"vmdk {found.parent_cid:08x}"
    return Lineage("vmdk", own, found.parent is None, found.parent, below)


def read(file: BinaryIO) -> Lineage | None:
    """What a VHD, VHDX, VDI or VMDK says of itself; None for any other file."""
    file.seek(0)
    start = file.read(512)
    if start.startswith(vhdx.SIGNATURE):
        image = vhdx.read(file)
        if image is None:
            return Lineage("vhdx")
        parent = _name_of("vhdx", image.parent_id) if image.has_parent else None
        own = _name_of("vhdx", image.id)
        return Lineage("vhdx", own, image.has_parent, image.parent or None, parent)
    if start[vdi.SIGNATURE_OFFSET :].startswith(vdi.SIGNATURE):
        disk = vdi.read(file)
        if disk is None:
            return Lineage("vdi")
        parent = _name_of("vdi", disk.parent_id)
        return Lineage("vdi", _name_of("vdi", disk.id), disk.has_parent, None, parent)
    if start.startswith((vmdk.SPARSE_MAGIC, vmdk.COWD_MAGIC)) or vmdk.looks_like_descriptor(start):
        return _of_vmdk(file)
    return _of_vhd(file)


def local_name(written: str) -> str:
    """How the name of a parent, which may be of Windows, is looked for here: below the image's
    folder, and by its last part alone where it starts at a drive or a root."""
    name = written.replace("\\", "/")
    if name.startswith("/") or name[1:2] == ":":
        return name.rpartition("/")[2].rpartition(":")[2]
    return name.removeprefix("./")


def _beside(path: Path, id: str) -> str | None:
    """The name of the file in an image's folder that has this id."""
    try:
        with os.scandir(path.parent) as entries:
            for entry in islice(entries, _MOST_LOOKED_AT):
                if entry.name.endswith(path.suffix) and entry.is_file():
                    with Path(entry.path).open("rb") as file:
                        found = read(file)
                    if found is not None and found.id == id:
                        return entry.name
    except OSError:
        pass  # it is told by its id then
    return None


def refuse_differencing(path: Path, found: Lineage) -> None:
    """Raise `ImageError` for an image that holds only what differs from one that QEMU does not
    read with it."""
    if not found.differencing:
        return
    name = found.parent
    if name is None and found.parent_id is not None:
        name = _beside(path, found.parent_id)
    if name is not None:
        parent = f"'{printable(name[:_LONGEST_NAME])}'"
    else:
        parent = (
            f"which it knows as {found.parent_id}" if found.parent_id else "which it does not name"
        )
    raise ImageError(
        f"a differencing {_SPOKEN[found.format]}: it holds what differs from its parent, {parent},"
        " and QEMU cannot read the two together",
        subject=printable(path),
        hint=_MERGED_BY[found.format],
    )
