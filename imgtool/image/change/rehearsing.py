"""Work on a qcow2 image tried out first, on a throw-away overlay over the file of the image.

Whatever QEMU writes goes to the overlay: what the image would hold afterwards is read there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from imgtool.errors import HostError
from imgtool.host.scratch import large_files, scratch_folder
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.holdings import Holdings, ReadAt, lost, read_holdings
from imgtool.image.chain.info import ImageInfo, probe
from imgtool.image.checks.checking import check_node
from imgtool.image.locking.host_file import node_driver, open_host_file
from imgtool.image.qemu.disk_reader import open_contents
from imgtool.image.qemu.qemu_img import qemu_img

# Work on the image that is described by these nodes: that of the image, and that of its file.
Way = Callable[[dict[str, object], dict[str, object]], None]

# What work may need beyond the end of the file: new refcounts of all of it.
_GROWS_BY, _GROWS_BY_PART = 64 << 20, 32


def rehearse(link: ImageInfo, way: Way, expected: Holdings) -> list[str]:
    """What of the image would be lost by the work, in words for the user; `expected` is what it has
    to hold afterwards. The image itself is only read.

    Raises what `way` raises, and `HostError` where there is no room to try it out.
    """
    with scratch_folder("rehearsal", large_files()) as folder:
        over = _over(link.path, link.driver, folder / "image")
        file = over.blockdev(read_only=False)
        data = None
        if link.data_path is not None:
            driver = node_driver(link.data_path)
            data = _over(link.data_path, driver, folder / "data").blockdev(read_only=False)
        way(check_node(link, file, data), file)
        with open_contents(over) as (read, size):
            now = read_holdings(cast(BinaryIO, ReadAt(read, size)))
        return lost(expected, now)


def json_name(node: dict[str, object]) -> str:
    """The name by which QEMU's programs take an image that is described by a node."""
    return "json:" + json.dumps(node)


def no_room() -> HostError:
    """The error for a host on which nothing can be tried out."""
    return HostError(
        "there is no room to try the work out before it is done",
        subject=large_files() or tempfile.gettempdir(),
        hint="make room there, or name another folder: TMPDIR=FOLDER",
    )


def _over(path: Path, driver: str, new: Path) -> Chain:
    """A throw-away overlay on a file as it is, whatever format that holds."""
    with open_host_file(path) as file:
        size, status = file.seek(0, os.SEEK_END), os.fstat(file.fileno())
    grown = size + (_GROWS_BY + size // _GROWS_BY_PART if driver == "file" else 0)
    grown = -(-grown // 512) * 512
    words: list[str | Path] = ["create", "-f", "qcow2", new, str(grown)]
    try:
        qemu_img(words, image=new)
    except HostError as error:  # its room is that of the folder, not that of the image
        raise no_room() from error
    above = probe(new, format="qcow2")
    below = ImageInfo(
        path=path,
        format="raw",
        virtual_size=size,
        actual_size=size,
        driver=driver,
        inodes=((path, (status.st_dev, status.st_ino)),),
    )
    return Chain((replace(above, backing=str(path), backing_format="raw"), below))
