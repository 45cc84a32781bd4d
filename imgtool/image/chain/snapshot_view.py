"""A disk at an internal snapshot, when it had another size than now.

QEMU's own way to load a snapshot keeps the present size: a disk that has shrunk since is cut off,
one that has grown ends in what was never in it. So QEMU is given the image's file with another
header in front: an overlay on the file itself, of one cluster, in which the snapshot's table of
clusters and its size are the image's. Nothing else of the file is copied.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import ImageError
from imgtool.formats import qcow2
from imgtool.formats.qcow2 import Qcow2Header
from imgtool.formats.qcow2_snapshots import SnapshotRow, read_snapshots
from imgtool.host.process import run
from imgtool.host.scratch import scratch_folder
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.qemu_info import PROBE_LIMITS
from imgtool.text import printable

_CLUSTER = 64 << 10  # of the overlay: the header, which ends before
_SIZE_AT, _L1_AT, _SNAPSHOTS_AT, _AUTOCLEAR_AT = 24, 36, 60, 88


def snapshot_option(chain: Chain, snapshot: str | None) -> list[str]:
    """The option that makes qemu-nbd, or `qemu-img convert`, load a snapshot of a chain that
    `at_snapshot` gave."""
    if snapshot is None or chain.header is not None:
        return []
    # By id, since a name can hold what a command line cannot.
    return ["-l", "snapshot.id=" + chain.snapshot(snapshot).id.replace(",", ",,")]


@contextlib.contextmanager
def at_snapshot(chain: Chain, snapshot: str | None) -> Iterator[Chain]:
    """The chain to be opened for an internal snapshot: as it is where the size is the same, or else
    with a header of its own, which is there until the block ends.

    Raises `NotInGuestError` for a snapshot that is not there.
    """
    if snapshot is None or chain.header is not None:
        yield chain
        return
    id = chain.snapshot(snapshot).id
    with chain.open_file(chain.active.path) as file:
        header = qcow2.read_header(file)
        row = _row(file, header, id) if header is not None else None
        if header is None or row is None:
            raise ImageError(
                "damaged: its table of snapshots cannot be read",
                subject=printable(chain.active.path),
                hint="without --snapshot the present state is read",
            )
        if row.disk_size in (None, header.virtual_size):
            yield chain
            return
        file.seek(0)
        start = _at(row, file.read(_CLUSTER))
        length = file.seek(0, os.SEEK_END)
    with scratch_folder("snapshot") as folder:
        overlay = _overlay(folder, start, length)
        active = replace(chain.active, virtual_size=row.disk_size)
        yield replace(chain, links=(active, *chain.links[1:]), header=overlay)


def _row(file: BinaryIO, header: Qcow2Header, id: str) -> SnapshotRow | None:
    rows = read_snapshots(file, header) or ()
    return next((row for row in rows if row.id.decode(errors="replace") == id), None)


def _at(row: SnapshotRow, start: bytes) -> bytes:
    """The start of an image's file, with the size and the table of a snapshot in its header."""
    header = bytearray(start)
    struct.pack_into(">Q", header, _SIZE_AT, row.disk_size)
    struct.pack_into(">IQ", header, _L1_AT, row.l1_size // 8, row.l1_offset)
    struct.pack_into(">IQ", header, _SNAPSHOTS_AT, 0, 0)
    if int.from_bytes(header[4:8]) > 2:
        # Bitmaps are those of the present disk, and of its size.
        struct.pack_into(">Q", header, _AUTOCLEAR_AT, 0)
    return bytes(header)


def _overlay(folder: Path, start: bytes, length: int) -> Path:
    """An overlay, to stand on a file of `length` bytes, that has another start."""
    raw, overlay = folder / "start", folder / "header.qcow2"
    raw.write_bytes(start.ljust(_CLUSTER, b"\0"))
    overlay.touch()
    overlay.chmod(0o644)  # in a folder that is not: the sandbox's user reads it by descriptor
    options = f"cluster_size={_CLUSTER}"
    words = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, str(raw), str(overlay)]
    run(["qemu-img", *words], limits=PROBE_LIMITS)
    size = max(-(-length // 512) * 512, _CLUSTER)
    run(["qemu-img", "resize", "-q", "-f", "qcow2", str(overlay), str(size)], limits=PROBE_LIMITS)
    return overlay
