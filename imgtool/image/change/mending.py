"""An image whose tables were being written when QEMU was killed: set right, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from imgtool.errors import ImgtoolError
from imgtool.formats import qcow2, vdi
from imgtool.image import headers
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.info import ImageInfo, probe
from imgtool.image.change.rehearsing import json_name
from imgtool.image.change.repairing import WouldLose, repair_tables
from imgtool.image.checks.checking import CheckResult, check_metadata
from imgtool.image.locking.held import way_to
from imgtool.image.locking.locks import refuse_if_in_use
from imgtool.image.qemu.qemu_img import qemu_img
from imgtool.text import printable


def repair_metadata(
    image: Path, *, format: str | None = None, as_named_in: Path | None = None
) -> None:
    """Have QEMU set its tables right after it was killed at work; no guest data are touched.

    The format is the one that is given, or what an overlay on it says: what a guest wrote to a raw
    disk may look like any.
    """
    header = headers.read(as_named_in) if as_named_in is not None else None
    named = header.backing_format if header is not None else format
    link = probe(image, format=named)
    refuse_if_in_use(Chain((link,)))
    if link.format == "vdi":
        with way_to(image).open("r+b") as file:
            vdi.mend_count(file)
    if link.format != "qcow2":
        return
    if link.driver == "file":
        _lengthen(image)  # else a table that lies beyond the end escapes the check
    if not _mend(link).sound:
        raise ImgtoolError(
            "its tables are damaged after an interruption",
            subject=printable(image),
            hint="imgtool chain check says more",
        )
    if link.driver == "file":
        _lengthen(image)


def _mend(link: ImageInfo) -> CheckResult:
    """The check of an image after its repair, or without one where snapshots would be lost by it.

    What is left over then is space that nothing uses.
    """
    try:
        return repair_tables(link, "all")
    except WouldLose:
        found = check_metadata(link)
        if not found.sound:
            raise
        return found


def _lengthen(image: Path) -> None:
    """Make the file hold every cluster that its tables count.

    QEMU counts a cluster before it writes it, and reads zeros where the file has ended before;
    whoever finds an image too short for its tables takes it for a torn copy.
    """
    with way_to(image).open("r+b") as file:
        header = qcow2.read_header(file)
        if header is not None:
            needed = qcow2.size_needed(file, header)
            if needed > file.seek(0, os.SEEK_END):
                file.truncate(-(-needed // header.cluster_size) * header.cluster_size)


def on_snapshots(image: Path, option: str, name: str) -> None:
    """`qemu-img snapshot` on one qcow2 file; what it stands on is not opened."""
    alone = Chain((probe(image, format="qcow2"),)).filename(read_only=False)
    qemu_img(["snapshot", option, name, alone], image=image)


def try_on_snapshots(node: dict[str, object], image: Path, option: str, name: str) -> None:
    """The same on an image that a node of QEMU describes, in the place of `image`."""
    qemu_img(["snapshot", option, name, json_name(node)], image=image)
