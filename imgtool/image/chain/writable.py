"""Which images can be written to in place: those of which QEMU was seen to finish a write, cut off
at any moment, with the same content.

`tests/fault/test_formats.py` proves it of every format and subformat that qemu-img makes: an
overlay is written down into an image, killed at each of its writes, and written down again. What
is not in the table failed there, or cannot be made to try it, and is refused before anything
begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import BinaryIO

from imgtool.errors import RefusedError
from imgtool.formats import vdi, vhd, vmdk
from imgtool.image.chain.info import ImageInfo
from imgtool.image.locking.host_file import open_host_file
from imgtool.text import printable

# QEMU can set the tables of these right. (The log of a VHDX is replayed in a copy alone.)
MENDED = ("qcow2", "qed")
_VMDK_KINDS = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "vmfs",
)
_GRAINS, _GRAINS_OF_ZEROS = 1, 2  # versions of a sparse extent

Obstacle = str | None


def _always(link: ImageInfo, file: BinaryIO) -> Obstacle:
    return None


def _qcow(link: ImageInfo, file: BinaryIO) -> Obstacle:
    return "QEMU does not write the tables of a qcow (version 1) in an order that can be cut off"


def _vhdx(link: ImageInfo, file: BinaryIO) -> Obstacle:
    return "QEMU cannot go on writing to a VHDX that was cut off at the wrong moment"


def _vdi(link: ImageInfo, file: BinaryIO) -> Obstacle:
    image = vdi.read(file)
    if image is None or image.kind not in (vdi.DYNAMIC, vdi.STATIC):
        return "it is a VDI of a kind that is not known"
    if vdi.counts_too_few(file, image):
        return "its header counts fewer blocks than its map has, and QEMU would write over the rest"
    return None


def _vhd(link: ImageInfo, file: BinaryIO) -> Obstacle:
    footer = vhd.read_footer(file)
    if footer is None or footer.kind not in (vhd.FIXED, vhd.DYNAMIC):
        return "it is a VHD of a kind that is not known"
    if not footer.intact:
        return "the checksum of its footer is wrong"
    if footer.saved_state:
        return "its guest is suspended"
    if footer.size != link.virtual_size:
        return "QEMU takes it for another size than its footer says"
    return None


def _vmdk(link: ImageInfo, file: BinaryIO) -> Obstacle:
    descriptor = vmdk.read_descriptor(file)
    if descriptor is None or descriptor.kind not in _VMDK_KINDS:
        kind = printable(descriptor.kind[:40]) if descriptor is not None else ""
        return (
            f"it is a VMDK of the kind '{kind}', which is written once"
            if kind
            else ("it is a VMDK without a descriptor")
        )
    if descriptor.change_track is not None:
        return "VMware keeps track of its changes, and would not know of these"
    for path in link.extents or (link.path,):
        with open_host_file(path) as part:
            if (obstacle := _extent(part)) is not None:
                return obstacle
    return None


def _extent(file: BinaryIO) -> Obstacle:
    file.seek(0)
    if file.read(4) == vmdk.COWD_MAGIC:
        return "it is a VMDK as ESX writes its snapshots"
    sparse = vmdk.read_sparse(file)
    if sparse is None:
        return None  # flat
    if sparse.compressed or sparse.version not in (_GRAINS, _GRAINS_OF_ZEROS):
        return f"it is a compressed VMDK, or one of version {sparse.version}, which is written once"
    return None if sparse.closed else "it was not closed by the program that wrote it last"


_TABLE: dict[str, Callable[[ImageInfo, BinaryIO], Obstacle]] = {
    "raw": _always,
    "qcow2": _always,
    "qed": _always,
    "vdi": _vdi,
    "vpc": _vhd,
    "vmdk": _vmdk,
    "qcow": _qcow,
    "vhdx": _vhdx,
}


def refuse_unwritable(link: ImageInfo) -> None:
    """Raise `RefusedError` for an image that is not known to outlive a write that is cut off."""
    with open_host_file(link.path) as file:
        obstacle = _TABLE[link.format](link, file)
    if obstacle is not None:
        raise RefusedError(
            f"it cannot be written to in place: {obstacle}",
            subject=printable(link.path),
            hint="'imgtool convert' makes a qcow2 image of it, which can be; copy-in, edit and"
            " inject write to an overlay on it with --clone NEW.qcow2",
        )


def refuse_without_key(links: Sequence[ImageInfo]) -> None:
    """Raise `RefusedError` for an image of a chain that is encrypted by QEMU: nothing can be
    written to the chain, nor to an overlay on it, since imgtool cannot give QEMU the key."""
    for link in links:
        if link.encrypted:
            raise RefusedError(
                "it cannot be written to: it is encrypted by QEMU, and imgtool cannot give QEMU"
                " the key",
                subject=printable(link.path),
                hint="qemu-img can make one without, with --object secret and --image-opts",
            )


def refuse_unmended(link: ImageInfo) -> None:
    """Raise `RefusedError` for an image whose tables QEMU cannot set right."""
    if link.format not in MENDED:
        raise RefusedError(
            f"QEMU cannot mend the tables of a {link.format} image"
            if link.format != "raw"
            else "a raw image has no tables that could be mended",
            subject=printable(link.path),
            hint="'imgtool convert' makes a new image of what can be read"
            if link.format != "raw"
            else None,
        )
