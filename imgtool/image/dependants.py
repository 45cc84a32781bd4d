"""Which overlays stand on an image: to write to it would make garbage of them."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.errors import RefusedError
from imgtool.image import qcow2
from imgtool.image.chain import Chain
from imgtool.image.places import Places, printable

log = logging.getLogger(__name__)

_MOST_FILES = 20_000
_LONGEST_NAME = 1023  # the longest that QEMU takes
_PLACE = struct.Struct(">QI")


def _backing_name(path: Path) -> str | None:
    """The backing file's name in a qcow2 header, as it stands there; None if there is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        header = os.pread(descriptor, 20, 0)
        if len(header) < 20 or not header.startswith(qcow2.MAGIC):
            return None
        offset, length = _PLACE.unpack_from(header, 8)
        if not offset or not 0 < length <= _LONGEST_NAME or offset >= 1 << 63:
            return None
        return os.fsdecode(os.pread(descriptor, length, offset))
    finally:
        os.close(descriptor)


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    seen = 0
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > _MOST_FILES:
                        log.info("%s: too many files to look for overlays in all", folder)
                        return
                    if entry.is_file():
                        yield Path(entry.path)
        except OSError as error:
            log.info("%s: not looked at for overlays: %s", folder, error)


def overlays_on(path: Path, backing_dirs: Sequence[str | Path] = ()) -> list[Path]:
    """The qcow2 files that name `path` as their backing file.

    Looked at are the folders that a chain may use, without what is below them: an overlay in
    another folder is not found.
    """
    base = path.stat()
    found = []
    for file in _files(Places.around(path, backing_dirs).folders):
        try:
            name = _backing_name(file)
            if name is None or "\0" in name:
                continue
            named = (file.parent / name.removeprefix("file:")).stat()
        except OSError:
            continue  # gone, unreadable, or it stands on nothing that is there
        if (named.st_dev, named.st_ino) == (base.st_dev, base.st_ino):
            found.append(file)
    return sorted(set(found))


def refuse_if_base(chain: Chain, backing_dirs: Sequence[str | Path] = ()) -> None:
    """Raise `RefusedError` if an overlay stands on the active image."""
    path = chain.active.path
    overlays = overlays_on(path, backing_dirs)
    if overlays:
        names = ", ".join(printable(overlay) for overlay in overlays[:5])
        raise RefusedError(
            f"it is the base of {'an overlay' if len(overlays) == 1 else 'overlays'}: {names}",
            subject=printable(path),
            hint="write to the overlay; what is written to its base would make garbage of it",
        )
