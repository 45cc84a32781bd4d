"""Package lists read from a guest's own database, as libguestfs would list them."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from imgtool.formats.application import Application
from imgtool.formats.files import Undetermined
from imgtool.formats.rpm_database import rpm_header
from imgtool.guest.packages import installed_packages

STATUS = "/var/lib/dpkg/status"
PACMAN = "/var/lib/pacman/local"
RPMDB = "/var/lib/rpm/rpmdb.sqlite"
MACROS = b"%_var /var\n%_dbpath\t\t%{_var}/lib/rpm\n%_dbpath_rebuild %{_dbpath}\n"


class FakeFiles:
    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def read(self, path: str, limit: int) -> bytes | None:
        content = self._files.get(path)
        return None if content is None else content[:limit]

    def file_header(self, path: str, length: int) -> bytes | None:
        return self.read(path, length)

    def is_dir(self, path: str) -> bool:
        return any(name.startswith(path + "/") for name in self._files)

    def names(self, path: str) -> list[bytes]:
        below = (name for name in self._files if name.startswith(path + "/"))
        return sorted({name[len(path) + 1 :].split("/")[0].encode() for name in below})

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        yield io.BytesIO(self._files[path])


def header(tags: dict[int, str | int]) -> bytes:
    index, store = b"", b""
    for tag, value in tags.items():
        if isinstance(value, int):
            store += bytes(-len(store) % 4)
            index += struct.pack(">IIII", tag, 4, len(store), 1)
            store += struct.pack(">I", value)
        else:
            index += struct.pack(">IIII", tag, 6, len(store), 1)
            store += value.encode() + b"\0"
    return struct.pack(">II", len(tags), len(store)) + index + store


def rpm_package(name: str, version: str, release: str, epoch: int | None, arch: str) -> bytes:
    tags: dict[int, str | int] = {1000: name, 1001: version, 1002: release}
    if epoch is not None:
        tags[1003] = epoch
    return header({**tags, 1022: arch, 1004: "a summary"})


def rpm_database(tmp_path: Path, blobs: list[bytes], schema: str | None = None) -> bytes:
    path = tmp_path / "rpmdb.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(
            schema or "CREATE TABLE Packages (hnum INTEGER PRIMARY KEY AUTOINCREMENT, blob BLOB)"
        )
        if schema is None:
            database.executemany("INSERT INTO Packages (blob) VALUES (?)", [(b,) for b in blobs])
        database.commit()
    return path.read_bytes()


def rpm_guest(database: bytes, **files: bytes) -> FakeFiles:
    return FakeFiles({"/usr/lib/rpm/macros": MACROS, RPMDB: database, **files})


def test_dpkg_packages_are_split_and_sorted_as_libguestfs_does():
    status = (
        b"Package: zlib1g\nStatus: install ok installed\nArchitecture: amd64\n"
        b"Version: 1:1.2.13.dfsg-1\nDescription: c\n text\n .\n\n"
        b"Package: adduser\nStatus: deinstall ok config-files\nArchitecture: all\n"
        b"Version: 3.134\n\n"
        b"Package: half\nStatus: install reinstreq half-installed\nArchitecture: all\n"
        b"Version: 3.1-2-3\n\n"
        b"Package: gone\nStatus: purge ok not-installed\nArchitecture: i386\n\n"
        b"Package: zlib1g\nStatus: install ok installed\nArchitecture: i386\n"
        b"Version: 1:1.2.13.dfsg-1\n\n"
        b"Package: Upper\nStatus: install ok installed\nVersion: 5.0~rc1+b2\n\n"
        b"Package: last\nStatus: install ok installed\nVersion: 1\n"
    )
    assert installed_packages(FakeFiles({STATUS: status}), "deb") == (
        Application("Upper", "5.0~rc1+b2"),
        Application("half", "3.1", "2-3", 0, "all"),
        Application("zlib1g", "1.2.13.dfsg", "1", 1, "amd64"),
        Application("zlib1g", "1.2.13.dfsg", "1", 1, "i386"),
    )


def test_dpkg_line_of_1023_bytes_ends_an_entry():
    depends = b"Depends: " + b"x" * (1023 - 9)
    status = (
        b"Package: exact\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1-2\n"
        + depends
        + b"\nVersion: 9\n\n"
    )
    assert installed_packages(FakeFiles({STATUS: status}), "deb") == (
        Application("exact", "1", "2", 0, "amd64"),
    )


def test_a_name_that_is_not_utf8_is_replaced():
    status = b"Package: \xff\nStatus: install ok installed\nVersion: 1\n\n"
    assert installed_packages(FakeFiles({STATUS: status}), "deb") == (Application("�", "1"),)


@pytest.mark.parametrize("version", [b"x:1", b"-1:1", b"99999999999:1", b"\xd9\xa1:1"])
def test_an_epoch_that_is_not_a_number_is_left_to_the_appliance(version):
    status = b"Package: a\nStatus: install ok installed\nVersion: " + version + b"\n\n"
    with pytest.raises(Undetermined):
        installed_packages(FakeFiles({STATUS: status}), "deb")


def test_apk_packages_lose_the_r_of_their_release():
    database = (
        b"C:Q1x=\nP:musl\nV:1.2.4_git20230717-r4\nA:x86_64\nS:3\nF:lib\nR:x\na:0:0:755\n\n"
        b"P:busybox\nV:1.36.1-r15\nA:x86_64\nT:d\n\nP:noversion\n\nP:b\nV:2\nA:noarch\n\n"
        b"P:unfinished\nV:1\n"
    )
    assert installed_packages(FakeFiles({"/lib/apk/db/installed": database}), "apk") == (
        Application("b", "2", "", 0, "noarch"),
        Application("busybox", "1.36.1", "15", 0, "x86_64"),
        Application("musl", "1.2.4_git20230717", "4", 0, "x86_64"),
    )


def test_pacman_packages_need_name_version_release_architecture():
    files = {
        f"{PACMAN}/zlib-1/desc": b"%NAME%\nzlib\n\n%VERSION%\n1:1.3.1-2\n\n%ARCH%\nx86_64\n",
        f"{PACMAN}/acl-1/desc": b"%NAME%\nacl\n\n%VERSION%\n2.3.1-3.1\n\n%ARCH%\nany\n",
        f"{PACMAN}/none-1/desc": b"%NAME%\nnone\n\n%VERSION%\n2.3.1\n\n%ARCH%\nany\n",
        f"{PACMAN}/long-1/desc": b"%NAME%\nlong\n\n%VERSION%\n1-1\n\n%ARCH%\nany\n" + b"x" * 8192,
        f"{PACMAN}/ALPM_DB_VERSION": b"9\n",
    }
    assert installed_packages(FakeFiles(files), "pacman") == (
        Application("acl", "2.3.1", "3.1", 0, "any"),
        Application("zlib", "1.3.1", "2", 1, "x86_64"),
    )


def test_rpm_packages_of_one_name_come_last_one_first(tmp_path):
    database = rpm_database(
        tmp_path,
        [
            rpm_package("kernel", "6.3", "1", None, "x86_64"),
            rpm_package("kernel", "6.1", "1", None, "noarch"),
            rpm_package("beta", "2.5", "3.fc40", 2, "noarch"),
            header({1000: "gpg-pubkey", 1001: "1234", 1002: "5678"}),
            rpm_package("Zeta", "0~rc1", "5^git", 0, "noarch"),
        ],
    )
    assert installed_packages(rpm_guest(database), "rpm") == (
        Application("Zeta", "0~rc1", "5^git", 0, "noarch"),
        Application("beta", "2.5", "3.fc40", 2, "noarch"),
        Application("gpg-pubkey", "1234", "5678", 0, "(none)"),
        Application("kernel", "6.1", "1", 0, "noarch"),
        Application("kernel", "6.3", "1", 0, "x86_64"),
    )


@pytest.mark.parametrize(
    "files",
    [
        {"/var/lib/rpm/Packages": b"bdb"},
        {"/var/lib/rpm/Packages.db": b"RpmP"},
        {RPMDB + "-wal": b"frames"},
        {RPMDB: b"not a database"},
        {"/usr/lib/rpm/macros": b"%_dbpath /elsewhere\n"},
        {"/usr/lib/rpm/macros": b""},
        {"/etc/rpm/macros.local": b"%_dbpath /elsewhere\n"},
    ],
)
def test_rpm_database_in_another_form_or_place_is_undetermined(tmp_path, files):
    database = rpm_database(tmp_path, [rpm_package("a", "1", "1", None, "noarch")])
    assert len(installed_packages(rpm_guest(database), "rpm")) == 1
    with pytest.raises(Undetermined):
        installed_packages(rpm_guest(database, **files), "rpm")


def test_a_hostile_schema_of_the_rpm_database_is_not_run(tmp_path):
    endless = (
        "CREATE VIEW Packages AS WITH RECURSIVE n(hnum) AS"
        " (SELECT 1 UNION ALL SELECT hnum + 1 FROM n) SELECT hnum, x'00' AS blob FROM n"
    )
    with pytest.raises(Undetermined):
        installed_packages(rpm_guest(rpm_database(tmp_path, [], endless)), "rpm")


def test_rpm_header_cut_or_flipped_anywhere_ends_well():
    good = rpm_package("name", "1", "2", 3, "noarch")
    for length in range(len(good)):
        with pytest.raises(Undetermined):
            rpm_header(good[:length])
    for position in range(len(good)):
        bad = good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :]
        with contextlib.suppress(Undetermined):
            assert set(rpm_header(bad)) <= {1000, 1001, 1002, 1003, 1022}


def test_every_flipped_page_of_an_rpm_database_ends_well(tmp_path):
    database = rpm_database(
        tmp_path, [rpm_package(f"p{n}", "1", "1", None, "noarch") for n in range(200)]
    )
    for position in range(0, len(database), 97):
        bad = bytearray(database)
        bad[position] ^= 0xFF
        with contextlib.suppress(Undetermined):
            assert len(installed_packages(rpm_guest(bytes(bad)), "rpm")) <= 200


@pytest.mark.parametrize("package_format", ["deb", "apk", "pacman", "rpm", "something"])
def test_a_database_that_is_not_there_is_left_to_the_appliance(package_format):
    with pytest.raises(Undetermined):
        installed_packages(FakeFiles({}), package_format)


@pytest.mark.parametrize("package_format", [None, "ebuild", "pisi", "xbps"])
def test_formats_that_libguestfs_does_not_list_have_no_packages(package_format):
    assert installed_packages(FakeFiles({}), package_format) == ()
