"""The readers of filesystems: a line registers one. They are imported when one of theirs is opened.

How one is added: `docs/development/adding.md`.
"""

from __future__ import annotations

from importlib import import_module

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Filesystem

# By the type that libblkid names: the folder here and the class in its `reader`.
READERS = {
    "ext2": ("ext", "ExtFilesystem"),
    "ext3": ("ext", "ExtFilesystem"),
    "ext4": ("ext", "ExtFilesystem"),
    "xfs": ("xfs", "XfsFilesystem"),
    "vfat": ("fat", "FatFilesystem"),
    "ntfs": ("ntfs", "NtfsFilesystem"),
    "iso9660": ("iso", "IsoFilesystem"),
    "exfat": ("exfat", "ExfatFilesystem"),
}


def reader_of(kind: str | None) -> type[Filesystem]:
    """The reader of a type. Raises `Unsupported` where there is none."""
    known = READERS.get(kind or "")
    if known is None:
        raise Unsupported(kind or "of unknown type")
    folder, name = known
    reader: type[Filesystem] = getattr(import_module(f"{__package__}.{folder}.reader"), name)
    return reader
