"""Telling a disk from noise: a raw image with nothing known on it is refused before any launch."""

from __future__ import annotations

from pathlib import Path

from imgtool.errors import ImageError
from imgtool.formats.foreign_tables import foreign_table
from imgtool.host.process import Limits, ProgramFailed, run
from imgtool.image.chain.chain import Chain
from imgtool.image.checks.split import is_a_part, parts_of
from imgtool.image.locking.host_file import open_host_file
from imgtool.image.qemu.disk_reader import open_contents

_NOTHING_FOUND = 2
_AMBIGUOUS = 8
_BEGINNING = 1 << 20


def require_known_content(chain: Chain, *, or_blank: bool = False) -> None:
    """Raise `ImageError` if the chain is one raw file without partition table or known content;
    with `or_blank` not if it begins as a new disk does, with zeros. Also if it is one of the
    numbered files of a disk that was split, of which the second is nothing by itself.

    The signatures are those of libblkid, read by blkid(8) in low-level probing mode, and the
    partition tables of other systems.
    """
    link = chain.links[0]
    if link.format != "raw" or len(chain.links) > 1:
        return
    parts = parts_of(link.path)
    if parts and not _is_known(parts[1]):
        raise is_a_part(link.path, parts)
    if or_blank:
        with open_host_file(link.path) as file:
            if not any(file.read(_BEGINNING)):
                return
    try:
        status, said = _probe(link.path)
    except ProgramFailed as error:
        raise ImageError(f"cannot be probed: {error.message}", subject=link.path) from error
    if status == _NOTHING_FOUND:
        with open_contents(chain) as (read, size):
            if foreign_table(read, size):  # libblkid knows fewer of them
                return
        raise ImageError(
            "not a disk image: no format, partition table or filesystem is known in it",
            subject=link.path,
            hint="a raw disk on which nothing known has been written is read with --format raw",
        )
    if status == 0 and not said.strip():
        raise ImageError("not a disk image: nothing known is in it", subject=link.path)


def _probe(path: Path) -> tuple[int, bytes]:
    """The status of blkid, and what it says of a file."""
    argv: list[str | Path] = ["blkid", "--probe", "--output", "export", path.absolute()]
    limits = Limits(memory=1 << 30, wall=10)
    done = run(argv, limits=limits, ok=(0, _NOTHING_FOUND, _AMBIGUOUS))
    return done.returncode, done.stdout


def _is_known(path: Path) -> bool:
    """Whether it is a disk by itself, as far as libblkid knows."""
    try:
        return _probe(path)[0] != _NOTHING_FOUND
    except ProgramFailed:
        return True
