"""NTFS as ntfs-3g shows it when mounted read-only with its default options."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from stat import S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import (
    MOST_XATTRS,
    Filesystem,
    Node,
    PathNotFound,
    ReadFailed,
    Source,
    Usage,
)
from imgtool.engines.direct.worker.fs.ntfs import index as ntfs_index
from imgtool.engines.direct.worker.fs.ntfs.boot import INDEX_BLOCK, Geometry, read_geometry
from imgtool.engines.direct.worker.fs.ntfs.index import DOS_NAMESPACE, FILE_NAMES, Entry
from imgtool.engines.direct.worker.fs.ntfs.records import (
    ATTRIBUTE_LIST,
    BITMAP,
    DATA,
    INDEX_ALLOCATION,
    INDEX_ROOT,
    NUMBER,
    STANDARD_INFORMATION,
    VOLUME_INFORMATION,
    Attribute,
    Damaged,
    Record,
    join_extents,
    parse_list,
    parse_record,
)
from imgtool.engines.direct.worker.fs.ntfs.stream import Stream
from imgtool.engines.direct.worker.fs.pages import Pages
from imgtool.formats.xattrs import Xattrs, order_xattrs

_TABLE, _VOLUME, _ROOT, _BITMAP, _FIRST_USER = 0, 3, 5, 6, 16
_MIRRORED = 4
_VERSIONS = ((3, 0), (3, 1))
_CHANGED_BY_CHKDSK = 0x8000  # the one flag of a volume that says nothing about its state
_SYSTEM, _HIDDEN, _REPARSE, _ENCRYPTED = 0x4, 0x2, 0x400, 0x4000
_EPOCH = 116444736000000000  # 1970 in units of 100 ns since 1601
_MOST_RECORDS_A_FILE = 10_000
_LARGEST_LIST = 256 * 1024
_LARGEST_DIRECTORY = 1 << 30
_LARGEST_BITMAP = 1 << 30  # eight thousand million clusters or records; and it may be all holes
_OPEN_FILES = 64
_CHUNK = 1024 * 1024
_INTERIX = b"Intx"
_INTERIX_LINK = b"IntxLNK\1"
_LONGEST_LINK = 8192
_LARGEST_XATTR = 65536  # what getxattr(2) gives


class File:
    """A base record with all its attributes, extents joined."""

    def __init__(self, record: Record, attributes: dict[tuple[int, bytes], Attribute]) -> None:
        self.record = record
        self.attributes = attributes
        information = attributes.get((STANDARD_INFORMATION, b""))
        if information is None or information.value is None or len(information.value) < 36:
            raise Damaged("an NTFS file has no standard information")
        self.modified: int
        self.flags: int
        self.modified, self.flags = struct.unpack_from("<8xq16xI", information.value)
        self.streams: dict[tuple[int, bytes], Stream] = {}

    @property
    def mtime_ns(self) -> int:
        """Nanoseconds since 1970; before that ntfs-3g gives whole seconds."""
        ticks = self.modified - _EPOCH
        return ticks * 100 if ticks >= 0 else -(-ticks // 10**7) * 10**9


class NtfsFilesystem(Filesystem):
    """An NTFS volume. An inode is a file reference: record number and sequence number."""

    type = "ntfs"
    root = _ROOT

    def __init__(self, source: Source, geometry: Geometry) -> None:
        self._source = Pages(source)
        self._geometry = geometry
        self._files: dict[int, File] = {}
        place = geometry.table * geometry.cluster
        self._table = Stream(self._source, geometry.cluster, self._start_of_table(place))
        table = self._file(_TABLE)
        self._table = self._stream(table, DATA)

    @classmethod
    def open(cls, source: Source, *, unreplayed: bool = False) -> NtfsFilesystem:
        """Check boot sector, mirror, version, dirty flag and hibernation."""
        found = cls(source, read_geometry(source))
        found._check_mirror()
        found._check_volume()
        found._check_hibernation()
        return found

    def stat(self, inode: int) -> Node:
        """`lstat`; `Unsupported` for reparse points and encrypted files."""
        file = self._sound(inode)
        number, mode, size, blocks, links = inode & NUMBER, S_IFREG, 0, 0, file.record.links
        if file.record.is_directory:
            mode, links = S_IFDIR, 1
            index = file.attributes.get((INDEX_ALLOCATION, FILE_NAMES))
            if index is not None:
                size, blocks = index.size, index.allocated // 512
        else:
            data = file.attributes.get((DATA, b""))
            if data is not None:
                stream = self._stream(file, DATA)
                size, blocks = data.size, (data.allocated + 511) // 512
                if file.flags & _SYSTEM:
                    mode = self._special(file, stream)
                    if mode == S_IFLNK:
                        size = len(self.target(inode))
        mode |= 0o777
        return Node(number, mode, 0, 0, size, file.mtime_ns, blocks, links, 0)

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        """Long names alone, without the files of the filesystem itself."""
        for entry in self._entries(inode):
            if entry.namespace != DOS_NAMESPACE and entry.reference & NUMBER >= _FIRST_USER:
                yield entry.name, entry.reference

    def target(self, inode: int) -> bytes:
        """The target of a symbolic link of Interix's kind, the one that ntfs-3g makes."""
        content = self._stream(self._sound(inode), DATA).read(0, _LONGEST_LINK + 8)
        if not content.startswith(_INTERIX_LINK):
            raise ReadFailed("not a symbolic link")
        text = content[len(_INTERIX_LINK) :]
        try:
            target = text.decode("utf-16-le")
        except UnicodeDecodeError:
            raise Unsupported("the target of a link on NTFS is not UTF-16") from None
        if "\0" in target or not target:
            raise Unsupported("the target of a link on NTFS is impossible")
        return target.encode()

    def xattrs(self, inode: int) -> Xattrs:
        """The named streams of files and directories, which are user attributes to ntfs-3g."""
        fitting = [(n, s) for n, s in self._named_streams(inode) if s.size <= _LARGEST_XATTR]
        if sum(stream.size for _, stream in fitting) > MOST_XATTRS:
            raise ReadFailed("its extended attributes are too large")
        return order_xattrs(
            (b"user." + ntfs_index.utf8(name), stream.read(0, stream.size))
            for name, stream in fitting
        )

    def oversized_xattrs(self, inode: int) -> int:
        """The named streams that are longer than an attribute can be."""
        return sum(stream.size > _LARGEST_XATTR for _, stream in self._named_streams(inode))

    def _named_streams(self, inode: int) -> list[tuple[bytes, Stream]]:
        file = self._sound(inode)
        names = [name for kind, name in file.attributes if kind == DATA and name]
        # The kernel gives user attributes of nothing else.
        if not names or S_IFMT(self.stat(inode).mode) not in (S_IFREG, S_IFDIR):
            return []
        return [(name, self._stream(file, DATA, name)) for name in names]

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file."""
        stream = self._content(inode)
        return stream.read(offset, length) if stream else b""

    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        """Where the file's clusters are; whole units of a compressed file."""
        stream = self._content(inode)
        return stream.ranges() if stream else []

    def usage(self) -> Usage:
        """The numbers of ntfs-3g: a record that would fit in the free space is a free inode."""
        cluster = self._geometry.cluster
        free = _zero_bits(self._stream(self._file(_BITMAP), DATA))
        possible = free * cluster // self._geometry.record
        table = self._file(_TABLE)
        records = self._stream(table, BITMAP)
        bitmap = table.attributes[BITMAP, b""]
        if not bitmap.size <= bitmap.allocated <= _LARGEST_BITMAP:
            raise Unsupported("the bitmap of NTFS's table has an impossible size")
        inodes = bitmap.allocated * 8 + possible
        free_records = _zero_bits(records)
        free_records += (bitmap.allocated - bitmap.size) * 8
        size = self._geometry.clusters * cluster
        used = inodes - free_records - possible
        if free * cluster > size:
            raise Unsupported("the bitmap of NTFS is longer than the volume")
        return Usage(size, size - free * cluster, free * cluster, inodes, used)

    def lookup(self, inode: int, name: bytes) -> int:
        """Long and DOS names, letter by letter as they are written."""
        for entry in self._entries(inode):
            if entry.name == name and entry.reference & NUMBER != _ROOT:
                if entry.reference & NUMBER < _FIRST_USER:
                    raise Unsupported("a file of NTFS itself")
                return entry.reference
        raise PathNotFound

    def _special(self, file: File, stream: Stream) -> int:
        """What a file marked as the system's may be: ntfs-3g keeps Unix's other kinds so."""
        if not file.flags & _HIDDEN and stream.size < 2:
            return S_IFSOCK if stream.size else S_IFIFO
        start = stream.read(0, 8)
        if start.startswith(_INTERIX) and 8 < stream.size <= _LONGEST_LINK + 8:
            if start == _INTERIX_LINK:
                return S_IFLNK
            raise Unsupported("a device file on NTFS")
        return S_IFREG

    def _content(self, inode: int) -> Stream | None:
        file = self._sound(inode)
        if file.record.is_directory:
            raise ReadFailed("not a regular file")
        return self._stream(file, DATA) if (DATA, b"") in file.attributes else None

    def _entries(self, inode: int) -> Iterator[Entry]:
        """An index in the order in which ntfs-3g reads it: never along its tree."""
        file = self._sound(inode)
        root = file.attributes.get((INDEX_ROOT, FILE_NAMES))
        if not file.record.is_directory or root is None or root.value is None:
            raise ReadFailed("not a directory")
        yield from ntfs_index.root_entries(root.value)
        if (INDEX_ALLOCATION, FILE_NAMES) not in file.attributes:
            return
        blocks = self._stream(file, INDEX_ALLOCATION, FILE_NAMES)
        used = self._stream(file, BITMAP, FILE_NAMES)
        if blocks.size > _LARGEST_DIRECTORY:
            raise Unsupported("a directory on NTFS is too large")
        count = blocks.size // INDEX_BLOCK
        bits = used.read(0, (count + 7) // 8)
        for number in range(min(count, len(bits) * 8)):
            if bits[number // 8] >> number % 8 & 1:
                yield from ntfs_index.block_entries(blocks.read(number * INDEX_BLOCK, INDEX_BLOCK))

    def _sound(self, inode: int) -> File:
        """A file that this reader may speak of."""
        file = self._file(inode)
        if file.flags & _REPARSE:
            raise Unsupported("a reparse point on NTFS")
        if file.flags & _ENCRYPTED:
            raise Unsupported("an encrypted file on NTFS")
        return file

    def _file(self, reference: int) -> File:
        number = reference & NUMBER
        file = self._files.pop(number, None)
        if file is None:
            record = self._record(number)
            if not record.in_use or record.base & NUMBER:
                raise Damaged("a name on NTFS leads to a record that is not in use")
            file = File(record, self._attributes(number, record))
            if len(self._files) >= _OPEN_FILES:
                del self._files[next(iter(self._files))]
        self._files[number] = file
        if reference >> 48 not in (0, file.record.sequence):
            raise Damaged("a name on NTFS leads to a record that is another file's")
        return file

    def _record(self, number: int) -> Record:
        size = self._geometry.record
        block = self._table.read(number * size, size)
        if len(block) != size:
            raise Damaged("a record of NTFS is outside of its table")
        return parse_record(block, self._geometry.clusters)

    def _start_of_table(self, place: int) -> Attribute:
        """The first extent of the table: enough to find the records that describe the others."""
        block = self._source.read(place, self._geometry.record)
        for attribute in parse_record(block, self._geometry.clusters).attributes:
            if attribute.kind == DATA and not attribute.name and attribute.value is None:
                known = (attribute.highest + 1) * self._geometry.cluster
                size = min(attribute.size, known)
                return attribute._replace(size=size, initialized=min(size, attribute.initialized))
        raise Damaged("the table of NTFS has no clusters")

    def _attributes(self, number: int, record: Record) -> dict[tuple[int, bytes], Attribute]:
        """The attributes by kind and name, gathered from all the file's records."""
        extents: dict[tuple[int, bytes], list[Attribute]] = {}
        listing = next((a for a in record.attributes if a.kind == ATTRIBUTE_LIST), None)
        if listing is None:
            for attribute in record.attributes:
                extents.setdefault((attribute.kind, attribute.name), []).append(attribute)
        else:
            if listing.size > _LARGEST_LIST:
                raise Damaged("an NTFS attribute list is too long")
            value = Stream(self._source, self._geometry.cluster, listing).read(0, _LARGEST_LIST)
            records = {number: record}
            for listed in parse_list(value):
                holder = listed.reference & NUMBER
                if holder not in records:
                    if len(records) >= _MOST_RECORDS_A_FILE:
                        raise Unsupported("an NTFS file is in too many pieces")
                    records[holder] = self._extension(listed.reference, number)
                for attribute in records[holder].attributes:
                    if attribute.kind == listed.kind and attribute.instance == listed.instance:
                        break
                else:
                    raise Damaged("an NTFS attribute list names what is not there")
                if attribute.name != listed.name or attribute.lowest != listed.lowest:
                    raise Damaged("an NTFS attribute list names what is not there")
                extents.setdefault((attribute.kind, attribute.name), []).append(attribute)
        return {key: join_extents(parts) for key, parts in extents.items() if key[0] in _NEEDED}

    def _extension(self, reference: int, base: int) -> Record:
        record = self._record(reference & NUMBER)
        if not record.in_use or record.base & NUMBER != base:
            raise Damaged("a record of an NTFS file is another file's")
        if reference >> 48 not in (0, record.sequence):
            raise Damaged("a record of an NTFS file is another file's")
        return record

    def _stream(self, file: File, kind: int, name: bytes = b"") -> Stream:
        stream = file.streams.get((kind, name))
        if stream is None:
            if (kind, name) not in file.attributes:
                raise Damaged("an NTFS file lacks an attribute")
            stream = Stream(self._source, self._geometry.cluster, file.attributes[kind, name])
            file.streams[kind, name] = stream
        return stream

    def _check_mirror(self) -> None:
        """ntfs-3g mounts no volume whose first records differ from their copies."""
        size, place = self._geometry.record, self._geometry.mirror * self._geometry.cluster
        for number in range(_MIRRORED):
            block = self._source.read(place + number * size, size)
            copy = parse_record(block, self._geometry.clusters)
            if copy.used != self._record(number).used:
                raise Unsupported("the table of NTFS differs from its mirror")

    def _check_volume(self) -> None:
        information = self._file(_VOLUME).attributes.get((VOLUME_INFORMATION, b""))
        if information is None or information.value is None or len(information.value) < 12:
            raise Damaged("NTFS has no volume information")
        major, minor, flags = struct.unpack_from("<BBH", information.value, 8)
        if (major, minor) not in _VERSIONS:
            raise Unsupported(f"NTFS of version {major}.{minor}")
        if flags & ~_CHANGED_BY_CHKDSK:
            raise Unsupported("the NTFS volume is dirty")

    def _check_hibernation(self) -> None:
        for name, inode in self.names(_ROOT):
            if name.lower() == b"hiberfil.sys":
                start = self.read(inode, 0, 4096)
                if any(start) and start[:4].lower() != b"wake":
                    raise Unsupported("Windows is hibernated on this NTFS volume")


_NEEDED = frozenset(
    (STANDARD_INFORMATION, VOLUME_INFORMATION, DATA, INDEX_ROOT, INDEX_ALLOCATION, BITMAP)
)


def _zero_bits(stream: Stream) -> int:
    if stream.size > _LARGEST_BITMAP:
        raise Unsupported("a bitmap of NTFS is too large")
    ones = 0
    for offset in range(0, stream.size, _CHUNK):
        ones += int.from_bytes(stream.read(offset, _CHUNK), "little").bit_count()
    return stream.size * 8 - ones
