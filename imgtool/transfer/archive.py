"""Reading tar streams that nobody vouches for: in bounded memory and time, and never silently less.

Python's tarfile takes a damaged header for the end of the archive, skips towards an end that never
comes, and believes any length of an extended header. Here each of these is a `tarfile.ReadError`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

_LARGEST_HEADER = 1 << 20
# Headers before one member: a long name, a long link, extended and global ones.
_MOST_HEADERS = 8
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Headers(tarfile.TarInfo):
    """Members whose headers cannot exhaust memory, nor end the archive by being damaged."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(archive)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged header: {error}") from None
        except (ValueError, OverflowError) as error:
            raise tarfile.ReadError(f"damaged header: {error}") from None

    def _proc_member(self, archive: _Archive) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError("negative size")
        extended = self.type in _EXTENDED or self.type not in tarfile.SUPPORTED_TYPES
        if extended and self.size > _LARGEST_HEADER:
            raise tarfile.ReadError("extended header larger than 1 MiB")
        archive.headers += 1
        if archive.headers > _MOST_HEADERS:
            raise tarfile.ReadError("too many extended headers")
        try:
            return cast(tarfile.TarInfo, super()._proc_member(archive))  # type: ignore[misc]
        finally:
            archive.headers -= 1


class _PlainHeaders(_Headers):
    """Only what tar(1) writes by itself: no global headers, no maps of holes without an end."""

    def _proc_member(self, archive: _Archive) -> tarfile.TarInfo:
        if self.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE):
            raise tarfile.ReadError("unexpected kind of header")
        member = super()._proc_member(archive)
        if member.issparse():
            raise tarfile.ReadError("unexpected kind of header")
        return member

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("unexpected kind of header")


class _Archive(tarfile.TarFile):
    tarinfo = _Headers
    headers = 0


class _Endless:
    """A stream that must not end: the archive has an end of its own before it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        if not block:
            raise tarfile.ReadError("unexpected end of data")
        return block


def members(stream: BinaryIO, *, plain: bool) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Each member, with its content if it is a regular file, good until the next one.

    `plain` is for what a tar(1) of a guest's directory wrote; else compressed and sparse archives
    are read too. Names are UTF-8 with surrogate escapes.
    """
    with _Archive.open(
        fileobj=cast(BinaryIO, _Endless(stream)),
        mode="r|" if plain else "r|*",
        tarinfo=_PlainHeaders if plain else _Headers,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]
            yield member, archive.extractfile(member) if member.isreg() else None
