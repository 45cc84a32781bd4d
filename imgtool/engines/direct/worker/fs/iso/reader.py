"""ISO 9660 with Rock Ridge or Joliet, as Linux's isofs shows it with its default options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from stat import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Filesystem, Node, ReadFailed, Source, Usage
from imgtool.engines.direct.worker.fs.iso.records import (
    ASSOCIATED,
    BLOCK,
    DIRECTORY,
    Record,
    Volume,
    joliet_name,
    plain_name,
    read_record,
    read_volume,
    records,
)
from imgtool.engines.direct.worker.fs.iso.rock import Posix, is_rock_ridge, posix
from imgtool.engines.direct.worker.fs.pages import Pages

_LARGEST_DIRECTORY = 64 * 1024 * 1024


class IsoFilesystem(Filesystem):
    """A volume. An inode is the place of a record: a file's, or a directory's own `.`."""

    type = "iso9660"

    def __init__(self, source: Source, volume: Volume) -> None:
        self._source = Pages(source)
        self._volume = volume
        root = read_record(self._source, volume.primary_root * BLOCK)
        self._rock = is_rock_ridge(self._source, root)
        self._joliet = volume.joliet_root is not None and not self._rock
        self.ignores_case = self._joliet
        extent = volume.primary_root
        if self._joliet and volume.joliet_root is not None:
            extent = volume.joliet_root
        self.root = extent * BLOCK
        self._named_by: dict[int, int] = {self.root: -1}

    @classmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> IsoFilesystem:
        """Check the descriptors and the root; Rock Ridge goes before Joliet, as in the kernel."""
        volume = read_volume(source)
        found = cls(source, volume)
        if found._rock and volume.joliet_root is not None and not any(found.names(found.root)):
            raise Unsupported("ISO 9660 with an empty Rock Ridge tree beside Joliet")
        return found

    def stat(self, inode: int) -> Node:
        """`lstat`; without Rock Ridge everything is root's and read-only."""
        record = self._record(inode)
        blocks = (record.size + 511) // 512
        kind = S_IFDIR if record.flags & DIRECTORY else S_IFREG
        if not self._rock:
            mtime = record.mtime * 10**9
            return Node(inode, kind | 0o555, 0, 0, record.size, mtime, blocks, 1, 0)
        said = self._posix(record)
        if (S_IFMT(said.mode) == S_IFDIR) != bool(record.flags & DIRECTORY):
            raise Unsupported("ISO 9660 with a file that is a directory to Rock Ridge alone")
        size = len(said.target) if S_IFMT(said.mode) == S_IFLNK else record.size
        mtime = (record.mtime if said.mtime is None else said.mtime) * 10**9
        return Node(
            inode, said.mode, said.uid, said.gid, size, mtime, blocks, said.links, said.rdev
        )

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """Rock Ridge's names, else Joliet's, else the short ones in lower case."""
        own = self._record(inode)
        if not own.flags & DIRECTORY or own.size > _LARGEST_DIRECTORY or own.size % BLOCK:
            raise Unsupported("a directory of ISO 9660 has an odd size")
        for record in records(self._source, inode // BLOCK, own.size):
            if record.is_dot or record.flags & ASSOCIATED:
                continue
            if self._rock:
                said = posix(self._source, record)
                if said.relocated:
                    continue
                name = said.name
            elif self._joliet:
                name = joliet_name(record.name)
            elif record.system_use.strip(b"\0"):
                raise Unsupported("ISO 9660 with an unknown system use area")
            else:
                name = plain_name(record.name)
            yield name, self._inode(record)

    def target(self, inode: int) -> bytes:
        """The target of a symbolic link, which only Rock Ridge has."""
        record = self._record(inode)
        said = posix(self._source, record) if self._rock else None
        if said is None or S_IFMT(said.mode) != S_IFLNK or not said.target:
            raise ReadFailed("not a symbolic link")
        return said.target

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file, which lies in one piece."""
        record = self._file(inode)
        length = min(length, record.size - offset)
        return self._source.read(record.extent * BLOCK + offset, length) if length > 0 else b""

    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        """All of the file."""
        size = self._file(inode).size
        return [(0, size)] if size else []

    def usage(self) -> Usage:
        """A full volume without a count of inodes."""
        size = self._volume.blocks * BLOCK
        return Usage(size, size, 0, 0, 0)

    def _record(self, inode: int) -> Record:
        return read_record(self._source, inode)

    def _file(self, inode: int) -> Record:
        record = self._record(inode)
        if record.flags & DIRECTORY:
            raise ReadFailed("not a regular file")
        return record

    def _posix(self, record: Record) -> Posix:
        said = posix(self._source, record)
        if S_IFMT(said.mode) == S_IFLNK and not said.target:
            raise Unsupported("ISO 9660 with a link that leads nowhere")
        return said

    def _inode(self, record: Record) -> int:
        if not record.flags & DIRECTORY:
            return record.place
        inode = record.extent * BLOCK
        # Two records with one directory behind them could make a walk endless.
        if self._named_by.setdefault(inode, record.place) != record.place:
            raise Unsupported("two directories of ISO 9660 share their blocks")
        return inode
