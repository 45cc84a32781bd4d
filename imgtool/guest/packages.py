"""The packages installed in a guest, from its package database: as libguestfs lists them.

dpkg's status file, apk's and pacman's databases, and rpm's where it is SQLite. The list is sorted
by name as bytes; packages of one name stay in the order of the database, rpm's the other way round.

Facts: guestfs(3), `inspect_list_applications2`, and the behaviour of libguestfs 1.48.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from imgtool.formats.application import Application
from imgtool.formats.files import Files, Undetermined, text
from imgtool.formats.rpm_database import MOST_PACKAGES, Rows, add_package, rpm_packages

TEXT_LIMIT = 300_000_000
# libguestfs reads dpkg's status in pieces of this many bytes; the rest of a longer line counts as
# a line.
_PIECE = 1023
_LINE_LIMIT = 1 << 20
_DESCRIPTION_LIMIT = 8192


def _lines(stream: BinaryIO, longest: int) -> Iterator[bytes]:
    """Lines, or pieces of lines of the longest length, without their newline."""
    total = 0
    while line := stream.readline(longest):
        total += len(line)
        if total > TEXT_LIMIT:
            raise Undetermined("the package database is very long")
        if b"\0" in line:
            raise Undetermined("the package database has a NUL byte")
        yield line.removesuffix(b"\n")


def _epoch(digits: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,9}", digits):
        raise Undetermined(f"a package has the epoch {text(digits[:20])!r}")
    return int(digits)


def _version(whole: bytes) -> tuple[int, bytes, bytes]:
    """Epoch, version and release of `[EPOCH:]VERSION[-RELEASE]`, cut at the first hyphen."""
    epoch, colon, rest = whole.partition(b":")
    if not colon:
        epoch, rest = b"0", whole
    version, _, release = rest.partition(b"-")
    return _epoch(epoch), version, release


def _dpkg(stream: BinaryIO) -> Rows:
    rows: Rows = []
    fields: dict[bytes, bytes] = {}
    for line in _lines(stream, _PIECE):
        if not line:
            # "not-installed" and "half-installed" are installed to libguestfs.
            if b"installed" in fields.get(b"Status", b"") and b"Package" in fields:
                whole = fields.get(b"Version")
                if whole is not None:
                    arch = fields.get(b"Architecture", b"")
                    add_package(rows, fields[b"Package"], *_version(whole), arch)
            fields.clear()
            continue
        key, separator, value = line.partition(b": ")
        if separator and key in (b"Package", b"Status", b"Version", b"Architecture"):
            fields[key] = value
    return rows


def _apk(stream: BinaryIO) -> Rows:
    rows: Rows = []
    fields: dict[bytes, bytes] = {}
    for line in _lines(stream, _LINE_LIMIT):
        if len(line) >= _LINE_LIMIT - 1 or len(line) == 1:
            raise Undetermined("apk's database has an odd line")
        if not line:
            if b"P" in fields and b"V" in fields:
                epoch, version, release = _version(fields[b"V"])
                arch = fields.get(b"A", b"")
                add_package(rows, fields[b"P"], epoch, version, release.removeprefix(b"r"), arch)
            fields.clear()
        elif line[1:2] == b":":
            fields[line[:1]] = line[2:]
    return rows


def _parse_description(content: bytes) -> dict[bytes, bytes]:
    fields: dict[bytes, bytes] = {}
    key = b""
    for line in content.split(b"\n"):
        if key and line:
            fields[key] = line
            key = b""
        else:
            key = line if line in (b"%NAME%", b"%VERSION%", b"%ARCH%") else b""
    return fields


def _pacman(files: Files) -> Rows:
    folder = "/var/lib/pacman/local"
    if not files.is_dir(folder):
        raise Undetermined(f"there is no {folder}")
    rows: Rows = []
    names = files.names(folder)
    if len(names) > MOST_PACKAGES:
        raise Undetermined("very many packages")
    for name in names:
        path = f"{folder}/{name.decode('utf-8', 'surrogateescape')}/desc"
        content = files.read(path, _DESCRIPTION_LIMIT + 1)
        if content is None or len(content) > _DESCRIPTION_LIMIT:
            continue
        if b"\0" in content:
            raise Undetermined(f"{text(name)} has a NUL byte")
        fields = _parse_description(content)
        if len(fields) < 3:
            continue
        epoch, version, release = _version(fields[b"%VERSION%"])
        if version and release:
            add_package(rows, fields[b"%NAME%"], epoch, version, release, fields[b"%ARCH%"])
    if len({name for name, _ in rows}) < len(rows):
        raise Undetermined("pacman's database has a package twice")
    return rows


def installed_packages(files: Files, package_format: str | None) -> tuple[Application, ...]:
    """The packages, in libguestfs's order; none for a format that libguestfs cannot list.

    Raises `Undetermined` where the database is missing, damaged, or in a form not known here.
    """
    if package_format == "deb":
        rows = _from_text(files, "/var/lib/dpkg/status")
    elif package_format == "apk":
        rows = _from_text(files, "/lib/apk/db/installed")
    elif package_format == "pacman":
        rows = _pacman(files)
    elif package_format == "rpm":
        rows = rpm_packages(files)
    elif package_format in (None, "ebuild", "pisi", "xbps"):
        rows = []
    else:
        raise Undetermined(f"packages of the format {package_format}")
    rows.sort(key=lambda row: row[0])
    return tuple(application for _, application in rows)


def _from_text(files: Files, path: str) -> Rows:
    if files.file_header(path, 1) is None:
        raise Undetermined(f"there is no {path}")
    with files.open(path) as stream:
        return _dpkg(stream) if "dpkg" in path else _apk(stream)
