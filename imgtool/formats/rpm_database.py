"""The packages in rpm's database, where that is SQLite.

SQLite gets a copy of the file, in a temporary directory, under limits: the database is the guest's.

Facts: the format of rpm's headers, rpm's docs/manual/format_header.md; the tags' numbers,
rpm's include/rpm/rpmtag.h; the behaviour of libguestfs 1.48.
"""

from __future__ import annotations

import contextlib
import re
import struct
from typing import BinaryIO

from imgtool.formats.application import Application
from imgtool.formats.files import Files, Undetermined, small, text

MOST_PACKAGES = 200_000
DATABASE_LIMIT = 512 << 20
HEADER_LIMIT = 64 << 20
# SQLite calls every so many steps, and may do so this often.
_STEPS, _CALLS = 100_000, 20_000

# Packages with the name as bytes, by which they are sorted.
Rows = list[tuple[bytes, Application]]


def add_package(
    rows: Rows, name: bytes, epoch: int, version: bytes, release: bytes, arch: bytes
) -> None:
    """Add a package to the list, which may not grow for ever."""
    if len(rows) >= MOST_PACKAGES:
        raise Undetermined("very many packages")
    rows.append((name, Application(text(name), text(version), text(release), epoch, text(arch))))


# Tags of an rpm header, and the types of their values.
_NAME, _VERSION, _RELEASE, _EPOCH, _ARCH = 1000, 1001, 1002, 1003, 1022
_STRING, _INT32 = 6, 4
_TYPES = {_NAME: _STRING, _VERSION: _STRING, _RELEASE: _STRING, _EPOCH: _INT32, _ARCH: _STRING}
_NONE = b"(none)"


def rpm_header(blob: bytes) -> dict[int, bytes | int]:
    """Name, version, release, epoch and architecture, by tag, of an rpm header without its magic.

    `Undetermined` if the header is damaged, or not as rpm writes it.
    """
    if len(blob) < 8:
        raise Undetermined("an rpm header is short")
    count, size = struct.unpack_from(">II", blob)
    store = 8 + 16 * count
    if not 0 < count <= 0xFFFF or store + size != len(blob):
        raise Undetermined("an rpm header has the wrong length")
    found: dict[int, bytes | int] = {}
    for entry in range(8, store, 16):
        tag, kind, offset, items = struct.unpack_from(">IIII", blob, entry)
        if tag not in _TYPES:
            continue
        if kind != _TYPES[tag] or items != 1 or tag in found or offset >= size:
            raise Undetermined(f"an rpm header has an odd tag {tag}")
        start = store + offset
        if kind == _INT32:
            if offset + 4 > size:
                raise Undetermined("an rpm header is cut")
            found[tag] = struct.unpack_from(">I", blob, start)[0]
        else:
            end = blob.find(b"\0", start)
            if end < 0:
                raise Undetermined("an rpm header is cut")
            found[tag] = blob[start:end]
    return found


def _header_application(rows: Rows, blob: bytes) -> None:
    found = rpm_header(blob)

    def string(tag: int) -> bytes:
        value = found.get(tag, _NONE)
        return value if isinstance(value, bytes) else _NONE

    epoch = found.get(_EPOCH, 0)
    if not isinstance(epoch, int) or epoch >= 1 << 31:
        raise Undetermined("an rpm header has a very large epoch")
    add_package(rows, string(_NAME), epoch, string(_VERSION), string(_RELEASE), string(_ARCH))


_RPM_PLACES = ("/var/lib/rpm", "/usr/lib/sysimage/rpm")
_RPM_MACROS = "/usr/lib/rpm/macros"
_PLACE_MACROS = {
    b"%{_var}/lib/rpm": "/var/lib/rpm",
    b"/var/lib/rpm": "/var/lib/rpm",
    b"%{_localstatedir}/lib/rpm": "/var/lib/rpm",
    b"%{_usr}/lib/sysimage/rpm": "/usr/lib/sysimage/rpm",
    b"%{_prefix}/lib/sysimage/rpm": "/usr/lib/sysimage/rpm",
    b"/usr/lib/sysimage/rpm": "/usr/lib/sysimage/rpm",
}


def _rpm_place(files: Files) -> str:
    """Where rpm's own macros put the database: libguestfs asks rpm, and rpm asks them."""
    macros = small(files, _RPM_MACROS)
    if macros is None:
        raise Undetermined(f"there is no {_RPM_MACROS}")
    for folder in ("/etc/rpm", "/usr/lib/rpm/macros.d"):
        for name in files.names(folder)[:1000]:
            path = f"{folder}/{name.decode('utf-8', 'surrogateescape')}"
            other = small(files, path)
            if other is not None and re.search(rb"_dbpath|_db_backend", other):
                raise Undetermined(f"{text(name)} says where rpm's database is")
    named = re.findall(rb"^%_dbpath[ \t]+(\S+)[ \t]*$", macros, re.MULTILINE)
    if len(named) != 1 or named[0] not in _PLACE_MACROS:
        raise Undetermined("rpm's macros do not say where its database is")
    return _PLACE_MACROS[named[0]]


def rpm_packages(files: Files) -> Rows:
    """The packages in rpm's database, the last one first."""
    place = _rpm_place(files)
    for folder in _RPM_PLACES:
        for name in ("Packages", "Packages.db"):
            if files.file_header(f"{folder}/{name}", 1) is not None:
                raise Undetermined(f"rpm's database is {folder}/{name}, not SQLite")
    if files.file_header(f"{place}/rpmdb.sqlite-wal", 1):
        raise Undetermined("rpm's database was not closed: it has a log")
    if files.file_header(f"{place}/rpmdb.sqlite", 16) != b"SQLite format 3\0":
        raise Undetermined(f"there is no SQLite database in {place}")
    with files.open(f"{place}/rpmdb.sqlite") as stream:
        return _sqlite_packages(stream)


def _sqlite_packages(stream: BinaryIO) -> Rows:
    import sqlite3
    import tempfile

    calls = 0

    def give_up() -> int:
        nonlocal calls
        calls += 1
        return int(calls > _CALLS)

    rows: Rows = []
    try:
        with tempfile.NamedTemporaryFile(prefix="rpmdb") as copy:
            size = 0
            while piece := stream.read(1 << 20):
                size += len(piece)
                if size > DATABASE_LIMIT:
                    raise Undetermined("rpm's database is very large")
                copy.write(piece)
            copy.flush()
            uri = f"file:{copy.name}?mode=ro&immutable=1"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
                database.execute("PRAGMA trusted_schema=off")
                database.execute("PRAGMA query_only=on")
                database.execute("PRAGMA cell_size_check=on")
                database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, HEADER_LIMIT)
                database.set_progress_handler(give_up, _STEPS)
                tables = database.execute(
                    "SELECT count(*) FROM sqlite_schema WHERE name='Packages' AND type='table'"
                )
                if tables.fetchone() != (1,):
                    raise Undetermined("rpm's database has no table of packages")
                for (blob,) in database.execute("SELECT blob FROM Packages ORDER BY hnum DESC"):
                    if not isinstance(blob, bytes):
                        raise Undetermined("rpm's database holds something else than headers")
                    _header_application(rows, blob)
    except (sqlite3.Error, OSError, UnicodeError, MemoryError) as error:
        raise Undetermined(f"rpm's database cannot be read: {error}") from error
    return rows
