"""Which parts of a disk are not there, since the file of its image was cut off.

QEMU opens such a qcow2, VDI or VMDK and reads zeros for what is missing. Here it is asked where in
the file each part of the disk is, and what would lie past the end is lost. That can be told only
while the tables, which say so, are there themselves.
"""

from __future__ import annotations

import json
import os
import struct

from imgtool.formats import qcow2, vdi, vmdk
from imgtool.host.process import Limits, run
from imgtool.image.chain.ends import Truncated
from imgtool.image.chain.info import ImageInfo
from imgtool.image.locking.host_file import open_host_file

# Start and end, in bytes of the disk.
Range = tuple[int, int]

MOST_RANGES = 20_000
_LIMITS = Limits(memory=1 << 30, wall=60)
_OFFSET = 0x00FF_FFFF_FFFF_FE00  # of a table, in an entry of a qcow2's first table
_PIECE = 1 << 20


def lost_ranges(link: ImageInfo) -> tuple[Range, ...]:
    """The parts of the disk that lay past the end of a truncated image's file, in their order.

    Raises `ImageError` where that cannot be told: a table is past the end as well, or there are
    very many such parts.
    """
    unseen = link.unseen
    if unseen is None:
        return ()
    if not _tables_are_there(link, unseen.there):
        raise Truncated(link.path, unseen)
    argv = ["qemu-img", "map", "-U", "--output=json", "-f", link.format, str(link.path)]
    found: list[Range] = []
    for row in json.loads(run(argv, limits=_LIMITS).stdout):
        place, start, length = row.get("offset"), row["start"], row["length"]
        if place is None or place + length <= unseen.there:
            continue
        begin = start + max(unseen.there - place, 0)
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, start + length))
    if len(found) > MOST_RANGES:
        raise Truncated(link.path, unseen)
    return tuple(found)


def _tables_are_there(link: ImageInfo, length: int) -> bool:
    with open_host_file(link.path) as file:
        if link.format == "vdi":
            image = vdi.read(file)
            return image is not None and image.map_offset + image.blocks * 4 <= length
        if link.format == "vmdk":
            sparse = vmdk.read_sparse(file)
            return sparse is not None and vmdk.tables_end(file, sparse) <= length
        header = qcow2.read_header(file)
        if header is None or header.l1_offset + header.l1_size > length:
            return False
        for at in range(header.l1_offset, header.l1_offset + header.l1_size, _PIECE):
            piece = os.pread(file.fileno(), min(_PIECE, header.l1_offset + header.l1_size - at), at)
            places = struct.unpack(f">{len(piece) // 8}Q", piece[: len(piece) // 8 * 8])
            if max(place & _OFFSET for place in places) + header.cluster_size > length:
                return False
        return True
