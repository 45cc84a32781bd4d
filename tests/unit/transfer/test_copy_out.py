"""copy-out of a hostile guest: made of tar bytes and entries, no appliance."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import posixpath
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from imgtool.errors import (
    EngineError,
    ExitStatus,
    ImgtoolError,
    NotInGuestError,
    RefusedError,
    UsageError,
)
from imgtool.guest.model import Entry
from imgtool.host.scratch import large_files
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.guest_files import GuestFiles
from imgtool.transfer import copy_out as outward
from imgtool.transfer.copy_out import (
    Report,
    check_destination,
    copy_out,
    refuse_guest_files,
)
from imgtool.transfer.staging import BadName

MTIME = 1_500_000_000_987_654_321


class Breaking(io.RawIOBase):
    """Bytes, then an error."""

    def __init__(self, content: bytes, error: Exception | None = None) -> None:
        self._rest = io.BytesIO(content)
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._rest.read(len(buffer))
        if not block and self._error is not None:
            raise self._error
        buffer[: len(block)] = block
        return len(block)


class Generated(io.RawIOBase):
    """A stream of blocks that are made when they are read; `given` counts their bytes."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._rest = b""
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        block, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(block)] = block
        self.given += len(block)
        return len(block)


@dataclass
class FakeGuest:
    """A guest of `files` (path: entry, content); its tar stream is what the test says."""

    files: dict[bytes, tuple[Entry, bytes]] = field(default_factory=dict)
    stream: Any = None
    unreadable: dict[bytes, Exception] = field(default_factory=dict)
    tar_error: Exception | None = None
    excluded: list[bytes] = field(default_factory=list)
    opened: list[bytes] = field(default_factory=list)
    chains: tuple[Chain, ...] = ()

    def add(
        self, path: bytes, content: bytes = b"", *, mode: int = 0o100644, **more: Any
    ) -> FakeGuest:
        size = more.pop("size", len(content))
        blocks = more.pop("blocks", -(-size // 512))
        owner = (os.geteuid(), os.getegid())
        entry = Entry(path, mode, *owner, size, MTIME, blocks, **more)
        self.files[path] = entry, content
        return self

    def directory(self, path: bytes, mode: int = 0o40755) -> FakeGuest:
        return self.add(path, mode=mode)

    def path(self, typed: str | bytes) -> bytes:
        return posixpath.normpath(os.fsencode(typed))

    def resolve(self, path: str | bytes) -> bytes:
        found = self.path(path)
        for _ in range(5):
            entry = self.lstat(found)
            if entry.type != "symlink":
                return found
            found = posixpath.join(posixpath.dirname(found), entry.target or b"")
        raise NotInGuestError("loop")

    def lstat(self, path: str | bytes) -> Entry:
        found = self.path(path)
        if found == b"/":
            return Entry(b"/", 0o40755, 0, 0, 0, MTIME)
        try:
            return self.files[found][0]
        except KeyError:
            raise NotInGuestError("no such file", subject=found) from None

    def entries(self, path: str | bytes, *, on_problem: object = None) -> Iterator[Entry]:
        below = self.path(path).rstrip(b"/") + b"/"
        for name in sorted(self.files):
            if name.startswith(below) and b"/" not in name[len(below) :]:
                yield self.files[name][0]

    def with_xattrs(self, entry: Entry, on_problem: Any) -> Entry:
        return entry

    def walk(self, path: bytes, *, xattrs: bool = False, on_problem: Any = None) -> Iterator[Entry]:
        below = path.rstrip(b"/") + b"/"
        for name in sorted(self.files, key=lambda name: name.replace(b"/", b"\0")):
            if name.startswith(below):
                yield self.files[name][0]

    @contextlib.contextmanager
    def open(self, path: bytes) -> Iterator[Any]:
        self.opened.append(path)
        entry, content = self.files[path]
        assert entry.type == "file"
        yield io.BytesIO(content)
        if path in self.unreadable:  # as an engine says it: after what could be read
            raise self.unreadable[path]

    @contextlib.contextmanager
    def open_range(self, path: bytes, offset: int, length: int) -> Iterator[Any]:
        if path in self.unreadable:
            raise self.unreadable[path]
        yield io.BytesIO(b"d" * length)

    def data_ranges(self, path: bytes) -> Sequence[tuple[int, int]]:
        size = self.files[path][0].size
        return [(0, 4096), (size - 4096, 4096)]

    @contextlib.contextmanager
    def tar(
        self, path: bytes, excludes: Sequence[bytes] = (), *, xattrs: bool = False
    ) -> Iterator[Any]:
        self.excluded = list(excludes)
        if self.stream is None:
            content = self.honest(path, excludes)
        elif isinstance(self.stream, io.RawIOBase):
            yield io.BufferedReader(self.stream)
            return
        else:
            content = self.stream
        stream = io.BufferedReader(Breaking(content, None))
        yield stream
        if self.tar_error is not None:
            raise self.tar_error

    def honest(self, path: bytes, excludes: Sequence[bytes]) -> bytes:
        """What tar(1) would write of these files."""
        out = [member("./", kind=tarfile.DIRTYPE)]
        first: dict[tuple[int, int], bytes] = {}
        for entry in self.walk(path):
            name = b"./" + entry.path[len(path.rstrip(b"/")) + 1 :]
            if name in excludes:
                continue
            text = name.decode("utf-8", "surrogateescape")
            inode = (entry.device, entry.inode)
            if entry.type == "directory":
                out.append(member(text, kind=tarfile.DIRTYPE))
            elif entry.type == "symlink":
                target = os.fsdecode(entry.target or b"")
                out.append(member(text, kind=tarfile.SYMTYPE, link=target))
            elif entry.type != "file":
                out.append(member(text, kind=tarfile.FIFOTYPE))
            elif entry.nlink > 1 and inode in first:
                out.append(member(text, kind=tarfile.LNKTYPE, link=os.fsdecode(first[inode])))
            else:
                first[inode] = name
                content = self.files[entry.path][1]
                if entry.path in self.unreadable:  # tar(1) pads what it cannot read
                    content = content.ljust(entry.size, b"\0")
                out.append(member(text, content))
        return archive(*out)


def member(
    name: str,
    content: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    size: int | None = None,
    form: Literal[0, 1, 2] = tarfile.GNU_FORMAT,
    pax: dict[str, str] | None = None,
    mode: int = 0o644,
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    info.size = len(content) if size is None else size
    info.pax_headers = pax or {}
    return info.tobuf(form, "utf-8", "surrogateescape") + padded(content)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def archive(*parts: bytes) -> bytes:
    whole = b"".join(parts) + bytes(1024)
    return whole + bytes(-len(whole) % 10240)


class Lines:
    """What was reported."""

    def __init__(self) -> None:
        self.problems: list[tuple[bytes, str]] = []
        self.skipped: list[tuple[bytes, str]] = []

    @property
    def report(self) -> Report:
        return Report(
            lambda path, line: self.problems.append((path, line)),
            lambda path, line: self.skipped.append((path, line)),
        )


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder `outside` with something to attack, and an empty one `dest`."""
    folder = Path(tempfile.mkdtemp())
    (folder / "dest").mkdir()
    (folder / "outside").mkdir()
    (folder / "outside/victim").write_bytes(b"victim")
    before = snapshot(folder / "outside")
    try:
        yield folder
        assert snapshot(folder / "outside") == before
        assert {path.name for path in folder.iterdir()} == {"dest", "outside"}
        assert not [name for name in os.listdir(folder / "dest") if name.startswith(".imgtool")]
    finally:
        shutil.rmtree(folder)


def snapshot(folder: Path) -> list[tuple[Any, ...]]:
    found = []
    for path in sorted([folder, *folder.rglob("*")]):
        there = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found.append((path, there.st_mode, there.st_uid, there.st_mtime_ns, content))
    return found


def hostile(*parts: bytes) -> FakeGuest:
    """A guest whose walk has one good file, and whose tar has that and whatever else."""
    guest = FakeGuest().directory(b"/top").add(b"/top/good", b"good")
    guest.stream = archive(member("./", kind=tarfile.DIRTYPE), *parts, member("./good", b"good"))
    return guest


def copied(guest: FakeGuest, place: Path, lines: Lines, **more: Any) -> Path:
    copy_out(guest, "/top", place / "dest", lines.report, **more)  # type: ignore[arg-type]
    return place / "dest/top"


# Hostile streams

HOSTILE: dict[str, Callable[[str], list[bytes]]] = {
    "parent": lambda out: [member("../evil", b"x")],
    "deep parent": lambda out: [
        member("./a", kind=tarfile.DIRTYPE),
        member("./a/../../../outside/evil", b"x"),
    ],
    "absolute": lambda out: [member(f"{out}/evil", b"x"), member("/evil-imgtool", b"x")],
    "absolute folder": lambda out: [member(f"{out}/evil", kind=tarfile.DIRTYPE)],
    "absolute link": lambda out: [member(f"{out}/evil", kind=tarfile.SYMTYPE, link="x")],
    "file through link": lambda out: [
        member("./a", kind=tarfile.SYMTYPE, link=out),
        member("./a/evil", b"x"),
        member("./a/victim", b"x"),
    ],
    "file through relative link": lambda out: [
        member("./a", kind=tarfile.SYMTYPE, link="../../outside"),
        member("./a/victim", b"x"),
        member("./a", kind=tarfile.DIRTYPE),
        member("./a/evil", b"x"),
    ],
    "file over link": lambda out: [
        member("./a", kind=tarfile.SYMTYPE, link=f"{out}/victim"),
        member("./a", b"evil"),
    ],
    "hard link outside": lambda out: [
        member("./a", kind=tarfile.LNKTYPE, link=f"{out}/victim"),
        member("./a", b"evil"),
        member("./b", kind=tarfile.LNKTYPE, link="../../outside/victim"),
    ],
    "hard link through link": lambda out: [
        member("./l", kind=tarfile.SYMTYPE, link=out),
        member("./a", kind=tarfile.LNKTYPE, link="./l/victim"),
        member("./m", kind=tarfile.SYMTYPE, link=f"{out}/victim"),
        member("./b", kind=tarfile.LNKTYPE, link="./m"),
        member("./b", b"evil"),
    ],
    "hard link to folder": lambda out: [member("./a", kind=tarfile.LNKTYPE, link="./")],
    "hard link to itself": lambda out: [member("./a", kind=tarfile.LNKTYPE, link="./a")],
    "devices": lambda out: [
        member("./a", kind=tarfile.CHRTYPE),
        member("./b", kind=tarfile.BLKTYPE),
        member("./c", kind=tarfile.FIFOTYPE),
    ],
    "link becomes folder": lambda out: [
        member("./a", kind=tarfile.SYMTYPE, link=out),
        member("./a", kind=tarfile.DIRTYPE),
        member("./a/evil", b"x"),
    ],
    "folder becomes link": lambda out: [
        member("./a", kind=tarfile.DIRTYPE),
        member("./a/f", b"x"),
        member("./a", kind=tarfile.SYMTYPE, link=out),
        member("./a/victim", b"x"),
    ],
    "the top becomes something else": lambda out: [
        member("./", kind=tarfile.SYMTYPE, link=out),
        member(".", b"x"),
        member("./", kind=tarfile.LNKTYPE, link="./good"),
    ],
    "duplicates": lambda out: [member("./good", b"first"), member("./good", b"second")],
    "empty name": lambda out: [member("", b"x")],
    "name too long": lambda out: [member("./" + "n" * 300, b"x")],
    "missing folder": lambda out: [member("./no/such/file", b"x")],
    "pax": lambda out: [
        member("x", b"x", form=tarfile.PAX_FORMAT, pax={"path": "../evil"}),
        member("y", kind=tarfile.SYMTYPE, form=tarfile.PAX_FORMAT, pax={"linkpath": "a\0b"}),
    ],
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_stream_writes_nothing_outside(place: Path, lines: Lines, attack: str) -> None:
    top = copied(hostile(*HOSTILE[attack](str(place / "outside"))), place, lines)
    assert (top / "good").read_bytes() == b"good"
    assert not Path("/evil-imgtool").exists()
    for path in top.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        assert not stat.S_ISREG(mode) or path.lstat().st_nlink == 1
    if attack not in ("devices", "duplicates", "file over link", "the top becomes something else"):
        assert lines.problems
    assert not [line for line in lines.skipped if "file by file" in line[1]]


def sparse_old() -> bytes:
    """A GNU sparse member with a hole of nearly 8 EiB."""
    head = bytearray(member("./sparse", size=512, kind=b"S"))
    head[386:398] = b"%011o\0" % 0
    head[398:410] = b"%011o\0" % 512
    head[483:495] = b"\x80" + (1 << 62).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(512)


def sparse_pax(**fields: str) -> bytes:
    pax = {"GNU.sparse." + name.replace("_", "."): value for name, value in fields.items()}
    return member("./sparse", b"1\n" * 256, form=tarfile.PAX_FORMAT, pax=pax)


BROKEN: dict[str, bytes] = {
    "long name of a terabyte": member("././@LongLink", kind=b"L", size=1 << 40),
    "long link of a terabyte": member("././@LongLink", kind=b"K", size=1 << 40),
    "pax header of a terabyte": member("./x", kind=b"x", size=1 << 40),
    "global header of a terabyte": member("./x", kind=b"g", size=1 << 40),
    "long names without an end": member("././@LongLink", b"x", kind=b"L") * 5000,
    "pax headers without an end": member("./x", b"6 a=b\n", kind=b"x") * 5000,
    "pax header that is none": member("./x", b"abc", kind=b"x"),
    "global headers": member("./x", b"6 a=b\n", kind=b"g"),
    "negative size": member("./x", b"", size=-512),
    "skipped to the end of time": member("../x", size=1 << 60),
    "unknown kind of a terabyte": member("./x", kind=b"Z", size=1 << 40),
    "damaged header": b"garbage!" * 64,
    "sparse": sparse_old(),
    "sparse 0.1": sparse_pax(map="0,512", size=str(1 << 62)),
    "sparse 0.1 that is none": sparse_pax(map="a,b", size="c"),
    "sparse 1.0": sparse_pax(major="1", minor="0", realsize=str(1 << 62)),
}


@pytest.mark.parametrize("attack", BROKEN)
def test_a_broken_stream_costs_neither_memory_nor_files(
    place: Path, lines: Lines, attack: str
) -> None:
    guest = hostile(BROKEN[attack])
    tracemalloc.start()
    top = copied(guest, place, lines)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
    assert [path.name for path in top.iterdir()] == ["good"]
    assert (top / "good").read_bytes() == b"good"
    assert guest.opened == [b"/top/good"] and "file by file" in lines.skipped[0][1]


def test_a_huge_header_is_refused_without_being_read(place: Path, lines: Lines) -> None:
    head = member("./", kind=tarfile.DIRTYPE) + member("././@LongLink", kind=b"L", size=1 << 33)
    stream = Generated(block for part in ([head], [bytes(1 << 20)] * 8192) for block in part)
    guest = FakeGuest(stream=stream).directory(b"/top").add(b"/top/good", b"good")
    assert (copied(guest, place, lines) / "good").read_bytes() == b"good"
    assert stream.given < 4 << 20


@pytest.mark.parametrize("cut", [512, 1024, 1536, 1700, 2048, 2560])
def test_a_stream_that_ends_early_loses_no_file(place: Path, lines: Lines, cut: int) -> None:
    guest = FakeGuest().directory(b"/top")
    for name in (b"a", b"b"):
        guest.add(b"/top/" + name, b"content of " + name)
    guest.stream = guest.honest(b"/top", ())[:cut]
    top = copied(guest, place, lines)
    assert {path.name: path.read_bytes() for path in top.iterdir()} == {
        "a": b"content of a",
        "b": b"content of b",
    }
    assert lines.problems == [] and len(lines.skipped) == 1


def test_what_the_walk_saw_and_the_stream_lacks_is_a_problem(place: Path, lines: Lines) -> None:
    guest = hostile()
    guest.add(b"/top/lost", b"x")
    top = copied(guest, place, lines)
    assert (top / "good").exists() and lines.problems == [(b"/top/lost", "was not copied")]


@pytest.mark.parametrize(
    "name", [b"new\nline", b"\x1b[31mred", b"\xff\xfe\x80", b"n" * 255, b" ", b"-rf", b"*?[\\"]
)
@pytest.mark.parametrize("broken", [False, True])
def test_a_name_of_any_bytes_stays_as_it_is(
    place: Path, lines: Lines, name: bytes, broken: bool
) -> None:
    guest = FakeGuest().directory(b"/top").directory(b"/top/" + name)
    guest.add(b"/top/" + name + b"/" + name, b"content")
    guest.add(b"/top/z", mode=0o120777, target=name)
    if broken:
        guest.tar_error = EngineError("tar failed")
    top = os.fsencode(copied(guest, place, lines))
    assert os.listdir(top) in ([name, b"z"], [b"z", name])
    assert (Path(os.fsdecode(top)) / os.fsdecode(name) / os.fsdecode(name)).read_bytes()
    assert os.readlink(top + b"/z") == name and lines.problems == []


# What is kept


def test_modes_and_times_are_the_walks_on_read_only_folders_too(place: Path, lines: Lines) -> None:
    guest = FakeGuest().directory(b"/top", 0o40555).directory(b"/top/locked", 0o40500)
    guest.directory(b"/top/locked/deep", 0o41777).add(b"/top/locked/deep/f", b"x", mode=0o100400)
    guest.add(b"/top/link", mode=0o120777, target=b"/etc/passwd")
    top = copied(guest, place, lines)
    for path, mode in {"": 0o555, "locked": 0o500, "locked/deep": 0o1777}.items():
        there = (top / path).lstat()
        assert (stat.S_IMODE(there.st_mode), there.st_mtime_ns) == (mode, MTIME)
    there = (top / "locked/deep/f").stat()
    assert (stat.S_IMODE(there.st_mode), there.st_mtime_ns) == (0o400, MTIME)
    assert (top / "link").lstat().st_mtime_ns == MTIME and os.readlink(top / "link")


@pytest.mark.parametrize("broken", [False, True])
def test_hard_links_stay_hard_links(place: Path, lines: Lines, broken: bool) -> None:
    guest = FakeGuest().directory(b"/top").directory(b"/top/d")
    for name in (b"a", b"d/b", b"c"):
        guest.add(b"/top/" + name, b"same", nlink=3, inode=7, device=1)
    for name in (b"s1", b"s2"):  # large and with holes: not through the stream
        guest.add(b"/top/" + name, nlink=2, inode=8, device=1, size=64 << 20, blocks=16)
    if broken:
        guest.tar_error = EngineError("tar failed")
    top = copied(guest, place, lines)
    assert (top / "a").stat().st_ino == (top / "d/b").stat().st_ino == (top / "c").stat().st_ino
    assert (top / "s1").stat().st_ino == (top / "s2").stat().st_ino
    assert (top / "a").read_bytes() == b"same" and lines.problems == []


@pytest.mark.parametrize("name", [b"plain", b"a*[b]?\\", b"x\n*", b"trailing ", b"tab\t"])
@pytest.mark.parametrize("single", [False, True])
def test_a_sparse_file_stays_sparse_whatever_its_name(
    place: Path, lines: Lines, name: bytes, single: bool
) -> None:
    size = 1 << 30
    guest = FakeGuest().directory(b"/top").add(b"/top/" + name, size=size, blocks=16)
    for other in (name.strip(), b"bystander", b"*"):
        if other != name:
            guest.add(b"/top/" + other, b"x")
    source = os.fsdecode(b"/top/" + name) if single else "/top"
    copy_out(guest, source, place / "dest", lines.report)  # type: ignore[arg-type]
    result = place / "dest" / ("" if single else "top") / os.fsdecode(name)
    there = result.stat()
    assert there.st_size == size and there.st_blocks * 512 < 1 << 20 and lines.problems == []
    with result.open("rb") as file:
        assert file.read(4097) == b"d" * 4096 + b"\0"
    # tar(1) reads its patterns a line each, without the blanks at their ends.
    assert all(b"\n" not in pattern and pattern == pattern.rstrip() for pattern in guest.excluded)


def test_special_files_are_left_out_with_a_line(place: Path, lines: Lines) -> None:
    guest = FakeGuest().directory(b"/top").add(b"/top/f", b"x")
    for name, kind in {b"fifo": stat.S_IFIFO, b"null": stat.S_IFCHR, b"sda": stat.S_IFBLK}.items():
        guest.add(b"/top/" + name, mode=kind | 0o666)
    top = copied(guest, place, lines)
    assert [path.name for path in top.iterdir()] == ["f"]
    assert len(lines.skipped) == 3 and lines.problems == []


def test_a_special_file_that_was_named_is_an_error(place: Path, lines: Lines) -> None:
    guest = FakeGuest().add(b"/null", mode=stat.S_IFCHR | 0o666)
    with pytest.raises(ImgtoolError, match="a character device is not copied"):
        copy_out(guest, "/null", place / "dest", lines.report)  # type: ignore[arg-type]
    assert list((place / "dest").iterdir()) == []


@pytest.fixture
def disks(tmp_path: Path) -> FakeGuest:
    """A guest of two disks in the folder `images`: an overlay on a base in a folder that a link
    leads to, and a raw one with a record of work beside it."""
    folder = tmp_path / "images"
    (folder / "bases").mkdir(parents=True)
    (folder / "link").symlink_to("bases")
    (folder / "bases/base.raw").write_bytes(b"base" * 1024)
    (folder / "second.raw").write_bytes(b"second" * 1024)
    words = ["create", "-q", "-f", "qcow2", "-b", "link/base.raw", "-F", "raw", "disk.qcow2"]
    subprocess.run(["qemu-img", *words], cwd=folder, check=True)
    (folder / "name.qcow2").symlink_to("disk.qcow2")
    (folder / "hard.raw").hardlink_to(folder / "bases/base.raw")
    chains = (open_chain(folder / "name.qcow2"), open_chain(folder / "second.raw", format="raw"))
    (folder / ".second.raw.imgtool-record").touch()
    return FakeGuest(chains=chains)


def content(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


RECORD = ".second.raw.imgtool-record"
FILES_OF_DISKS = [
    *("bases/base.raw", "second.raw", "disk.qcow2", "name.qcow2", "hard.raw", "link"),
]


def test_no_record_is_replaced_whose_name_is_imgtools_own(
    tmp_path: Path, disks: FakeGuest, lines: Lines
) -> None:
    disks.add(b"/images", mode=stat.S_IFDIR | 0o755)
    disks.add(os.fsencode(f"/images/{RECORD}"), b"from the guest")
    before = content(tmp_path)
    with pytest.raises(BadName, match="for its own"):
        copy_out(
            disks,  # type: ignore[arg-type]
            f"/images/{RECORD}",
            tmp_path / "images",
            lines.report,
            overwrite=True,
        )
    copy_out(disks, "/images", tmp_path, lines.report, overwrite=True)  # type: ignore[arg-type]
    assert content(tmp_path) == before
    assert [path for path, _ in lines.problems] == [os.fsencode(f"/images/{RECORD}")]


@pytest.mark.parametrize("name", FILES_OF_DISKS)
def test_no_file_is_replaced_that_the_guest_is_read_from(
    tmp_path: Path, disks: FakeGuest, lines: Lines, name: str
) -> None:
    disks.add(b"/file", b"from the guest")
    before, dest = content(tmp_path), tmp_path / "images" / name
    with pytest.raises(RefusedError, match="the guest is read from"):
        if name == "link":  # to a directory, which `dest` would lead into
            disks.add(b"/link", b"from the guest")
            copy_out(disks, "/link", dest.parent, lines.report, overwrite=True)  # type: ignore[arg-type]
        else:
            copy_out(disks, "/file", dest, lines.report, overwrite=True)  # type: ignore[arg-type]
    assert content(tmp_path) == before
    assert disks.opened == []


@pytest.mark.parametrize("name", FILES_OF_DISKS)
def test_none_is_replaced_in_a_directory_that_is_merged(
    tmp_path: Path, disks: FakeGuest, lines: Lines, name: str
) -> None:
    path = os.fsencode(f"/images/{name}")
    disks.add(b"/images", mode=stat.S_IFDIR | 0o755)
    if b"bases" in path:
        disks.add(b"/images/bases", mode=stat.S_IFDIR | 0o755)
    disks.add(path, b"from the guest")
    disks.add(b"/images/a", b"comes first")
    before = content(tmp_path)
    with pytest.raises(RefusedError, match="the guest is read from"):
        copy_out(disks, "/images", tmp_path, lines.report, overwrite=True)  # type: ignore[arg-type]
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["a.raw", "bases/a.raw"])
def test_files_beside_those_of_the_guest_are_replaced(
    tmp_path: Path, disks: FakeGuest, lines: Lines, name: str
) -> None:
    disks.add(b"/file", b"from the guest")
    (tmp_path / "images" / name).touch()
    copy_out(disks, "/file", tmp_path / "images" / name, lines.report, overwrite=True)  # type: ignore[arg-type]
    assert (tmp_path / "images" / name).read_bytes() == b"from the guest"


def test_sources_that_would_replace_a_file_are_not_copied(tmp_path: Path, disks: FakeGuest) -> None:
    folder = tmp_path / "images"
    for sources, dest in ((["/a", "/second.raw"], folder), (["/a"], folder / "bases/base.raw")):
        with pytest.raises(RefusedError, match="the guest is read from"):
            refuse_guest_files(disks, sources, dest)  # type: ignore[arg-type]
    refuse_guest_files(disks, ["/bases"], folder)  # type: ignore[arg-type]


def test_a_destination_that_ends_with_a_slash_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImgtoolError, match="no such directory") as caught:
        check_destination(["/a"], f"{tmp_path}/new/", overwrite=False)
    assert caught.value.hint == f"mkdir -p {tmp_path}/new"
    with pytest.raises(ImgtoolError, match="not a directory"):
        check_destination(["/a"], f"{tmp_path}/file/", overwrite=True)
    with pytest.raises(ImgtoolError, match="not a directory") as caught:
        check_destination(["/a"], f"{tmp_path}/file/x", overwrite=True)
    assert caught.value.subject == tmp_path / "file" and caught.value.hint is None


def test_sources_of_one_name_are_told_before_any_is_copied(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two sources"):
        check_destination(["/a/x", "/b/x/"], tmp_path, overwrite=True)


# What cannot be read


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("error", [EngineError("I/O error"), NotInGuestError("vanished")])
def test_an_unreadable_file_is_a_problem_and_the_rest_is_copied(
    place: Path, lines: Lines, keep: bool, error: Exception
) -> None:
    guest = FakeGuest(tar_error=EngineError("tar: Read error")).directory(b"/top")
    guest.add(b"/top/a", b"a").add(b"/top/bad", b"part", size=9000).add(b"/top/c", b"c")
    guest.unreadable[b"/top/bad"] = error
    top = copied(guest, place, lines, keep_partial=keep)
    assert (top / "a").read_bytes() == b"a" and (top / "c").read_bytes() == b"c"
    assert [path for path, _ in lines.problems] == [b"/top/bad"]
    assert (top / "bad").exists() == keep
    if keep:
        assert (top / "bad").read_bytes() == b"part"


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_single_unreadable_file_leaves_nothing_but_its_part(
    place: Path, lines: Lines, keep: bool, sparse: bool
) -> None:
    guest = FakeGuest(unreadable={b"/bad": EngineError("I/O error")})
    guest.add(b"/bad", b"part", **({"size": 1 << 30, "blocks": 1} if sparse else {}))
    copy_out(guest, "/bad", place / "dest", lines.report, keep_partial=keep)  # type: ignore[arg-type]
    assert (place / "dest/bad").exists() == keep and len(lines.problems) == 1


def test_stream_that_breaks_in_an_unseen_file_leaves_no_part(place: Path, lines: Lines) -> None:
    guest = hostile()
    head = member("./", kind=tarfile.DIRTYPE) + member("./unseen", size=9000)
    guest.stream = Breaking(head + b"x" * 1000, EngineError("appliance lost"))
    top = copied(guest, place, lines)
    assert [path.name for path in top.iterdir()] == ["good"]


@pytest.mark.parametrize("broken", [False, True])
def test_file_that_the_host_cannot_hold_is_a_problem_of_its_own(
    place: Path, lines: Lines, broken: bool
) -> None:
    guest = FakeGuest().directory(b"/top").add(b"/top/good", b"x")
    long = "ü".encode() * 200  # 200 characters of NTFS, 400 bytes here
    guest.add(b"/top/" + long, b"x").directory(b"/top/" + long + b"d")
    guest.add(b"/top/" + long + b"d/f", b"x")
    guest.add(b"/top/huge", size=(1 << 63) - 4096, blocks=8)
    guest.add(b"/top/empty", mode=0o120777, target=b"")
    if broken:
        guest.tar_error = EngineError("tar failed")
    top = copied(guest, place, lines)
    left = {path.name for path in top.iterdir()} - {"huge"}
    assert left == {"good"}
    assert {path.rpartition(b"/")[2] for path, _ in lines.problems} >= {long, b"empty"}


# Destinations


def test_existing_is_refused_with_status_4_unless_overwritten(place: Path, lines: Lines) -> None:
    guest = FakeGuest().directory(b"/top").add(b"/top/f", b"theirs")
    (place / "dest/top").mkdir()
    (place / "dest/top/mine").write_bytes(b"mine")
    (place / "dest/top/f").symlink_to(place / "outside/victim")
    with pytest.raises(RefusedError) as refused:
        check_destination(["/top"], place / "dest", overwrite=False)
    assert refused.value.status == ExitStatus.REFUSED
    with pytest.raises(RefusedError):
        copied(guest, place, lines)
    check_destination(["/top"], place / "dest", overwrite=True)
    top = copied(guest, place, lines, overwrite=True)
    assert (top / "f").read_bytes() == b"theirs" and not (top / "f").is_symlink()
    assert (top / "mine").read_bytes() == b"mine"


def test_a_full_disk_is_an_error_and_leaves_nothing(lines: Lines) -> None:
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
    try:
        guest = FakeGuest().directory(b"/top").add(b"/top/large", b"x" * (3 << 20))
        with pytest.raises(ImgtoolError, match="no space left"):
            copy_out(guest, "/top", folder, lines.report)  # type: ignore[arg-type]
        with pytest.raises(ImgtoolError, match="no space left"):
            copy_out(guest, "/top/large", folder, lines.report)  # type: ignore[arg-type]
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def test_the_root_is_copied_into_a_folder_or_under_a_new_name(place: Path, lines: Lines) -> None:
    guest = FakeGuest().directory(b"/bin").add(b"/bin/sh", b"sh").add(b"/init", b"init")
    for dest in (place / "dest", place / "dest/new"):
        copy_out(guest, "/", dest, lines.report)  # type: ignore[arg-type]
        assert (dest / "bin/sh").read_bytes() == b"sh" and (dest / "init").read_bytes() == b"init"


def test_link_is_copied_as_one_and_with_a_slash_as_its_target(place: Path, lines: Lines) -> None:
    guest = FakeGuest().directory(b"/top").add(b"/top/f", b"x")
    guest.add(b"/link", mode=0o120777, target=b"/top")
    copy_out(guest, "/link", place / "dest", lines.report)  # type: ignore[arg-type]
    assert os.readlink(place / "dest/link") == "/top"
    (place / "dest/more").mkdir()
    copy_out(guest, "/link/", place / "dest/more", lines.report)  # type: ignore[arg-type]
    assert (place / "dest/more/link/f").read_bytes() == b"x"


@pytest.mark.parametrize("target", [b"/.ssh", b"/"])
def test_a_copy_is_called_what_was_typed_wherever_a_link_leads(
    place: Path, lines: Lines, target: bytes
) -> None:
    guest = FakeGuest().directory(b"/.ssh").add(b"/.ssh/authorized_keys", b"mallory")
    guest.add(b"/data", mode=0o120777, target=target)
    copy_out(guest, "/data/", place / "dest", lines.report)  # type: ignore[arg-type]
    assert os.listdir(place / "dest") == ["data"]
    found = {path.name for path in (place / "dest/data").rglob("*") if path.is_file()}
    assert found == {"authorized_keys"} and lines.problems == []


def test_a_guest_that_names_another_file_does_not_name_the_copy(place: Path, lines: Lines) -> None:
    guest = FakeGuest().add(b"/small", b"evil").add(b"/Data", b"x")
    guest.files[b"/small"] = dataclasses.replace(guest.files[b"/small"][0], path=b"/.login"), b"x"
    guest.files[b"/.login"] = guest.files[b"/small"]
    copy_out(guest, "/small", place / "dest", lines.report)  # type: ignore[arg-type]
    assert os.listdir(place / "dest") == ["small"]
    guest.files[b"/data"] = guest.files[b"/Data"]  # as a guest that ignores case finds it
    copy_out(guest, "/data", place / "dest", lines.report)  # type: ignore[arg-type]
    assert set(os.listdir(place / "dest")) == {"small", "Data"}


@pytest.mark.parametrize("start", [(1 << 63) - 10, 1 << 62, (64 << 20) - 10])
@pytest.mark.parametrize("single", [False, True])
def test_data_past_the_end_of_a_file_is_a_problem_of_that_file(
    place: Path, lines: Lines, start: int, single: bool
) -> None:
    guest = FakeGuest().directory(b"/top").add(b"/top/good", b"good")
    guest.add(b"/top/bad", size=64 << 20, blocks=8)
    guest.data_ranges = lambda path: [(start, 4096)]  # type: ignore[method-assign]
    source = "/top/bad" if single else "/top"
    copy_out(guest, source, place / "dest", lines.report)  # type: ignore[arg-type]
    assert [path for path, _ in lines.problems] == [b"/top/bad"]
    assert "past its end" in lines.problems[0][1]
    left = [path.name for path in (place / "dest").rglob("*") if path.is_file()]
    assert left == ([] if single else ["good"])


# Memory


def test_sparse_files_are_named_only_if_they_are_few(
    place: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = FakeGuest().directory(b"/top").add(b"/top/z", b"z")
    for number in range(50):
        guest.add(b"/top/%d" % number, size=64 << 20, blocks=16)
    monkeypatch.setattr(outward, "_MOST_SPARSE", 10_000)
    top = copied(guest, place, lines)
    assert guest.excluded == [] and b"/top/z" in guest.opened  # each file alone
    assert len(list(top.iterdir())) == 51 and lines.problems == [] and lines.skipped == []
    assert (top / "7").stat().st_size == 64 << 20 and (top / "7").stat().st_blocks < 1000


def test_more_hard_links_than_there_is_room_for_become_copies(
    place: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = FakeGuest(tar_error=EngineError("tar failed")).directory(b"/top")
    for name in (b"a", b"b"):
        for number in range(20):
            guest.add(b"/top/%b%d" % (name, number), b"same", nlink=2, inode=number, device=1)
    monkeypatch.setattr(outward, "_MOST_REMEMBERED", 10 * 210)
    top = copied(guest, place, lines)
    linked = [path for path in top.iterdir() if path.stat().st_nlink == 2]
    assert len(linked) == 20 and len(list(top.iterdir())) == 40
    assert all(path.read_bytes() == b"same" for path in top.iterdir())
    assert [line for _, line in lines.skipped if "become copies" in line] != []
    assert len(lines.skipped) == 2 and lines.problems == []


def test_failed_files_are_all_said_and_not_all_remembered(
    place: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = FakeGuest(tar_error=EngineError("tar failed")).directory(b"/top")
    for number in range(10):
        path = b"/top/%d" % number
        guest.add(path, b"x").unreadable[path] = EngineError("I/O error")
    monkeypatch.setattr(outward, "_MOST_REMEMBERED", 5 * 205)
    copied(guest, place, lines)
    failed = [path for path, line in lines.problems if "cannot be read" in line]
    missing = [path for path, line in lines.problems if line == "was not copied"]
    assert failed == [b"/top/%d" % number for number in range(10)] and missing == failed[5:]


def test_memory_does_not_grow_with_the_root_of_a_guest(place: Path, lines: Lines) -> None:
    class Wide(FakeGuest):
        def lstat(self, path: str | bytes) -> Entry:
            found = self.path(path)
            return super().lstat(path) if found == b"/" else self.pipe(found)

        def pipe(self, path: bytes) -> Entry:
            return Entry(path, 0o10644, 0, 0, 0, MTIME)

        def entries(self, path: str | bytes, *, on_problem: object = None) -> Iterator[Entry]:
            for number in range(20_000):
                yield self.pipe(b"/a name of a pipe at the root %d" % number)

    count = 0

    def skipped(path: bytes, line: str) -> None:
        nonlocal count
        count += 1

    report = Report(lines.report.problem, skipped)
    tracemalloc.start()
    copy_out(Wide(), "/", place / "dest", report)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 1 << 20


@pytest.mark.parametrize("chosen", [None, "/dev/shm"])
def test_temporary_files_are_in_memory_only_if_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    assert large_files() == "/var/tmp"
    if chosen:
        monkeypatch.setenv("TMPDIR", chosen)
        assert large_files() is None


def peak_memory() -> int:
    """The most memory held since the last call, in bytes (tracemalloc would take a minute)."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_memory_does_not_grow_with_the_stream(place: Path, lines: Lines) -> None:
    def blocks() -> Iterator[bytes]:
        yield member("./", kind=tarfile.DIRTYPE)
        # Pipes are not made: the time goes into reading them.
        pipes = b"".join(member(f"./{number}", kind=tarfile.FIFOTYPE) for number in range(100))
        for _ in range(1000):
            yield pipes
        yield member("./good", b"good") + bytes(10240)

    guest = FakeGuest(stream=Generated(blocks())).directory(b"/top").add(b"/top/good", b"good")
    peak_memory()
    before = peak_memory()
    copied(guest, place, lines)
    grown = peak_memory() - before
    assert grown < 8 << 20 and lines.problems == [] and lines.skipped == []


def test_the_fake_stream_is_one_that_tar_reads() -> None:
    guest = FakeGuest().directory(b"/top").add(b"/top/a", b"x")
    content = guest.honest(b"/top", ())
    listed = subprocess.run(["tar", "-tf", "-"], input=content, capture_output=True, check=True)
    assert listed.stdout == b"./\n./a\n"


@pytest.fixture
def on_base(tmp_path: Path) -> Path:
    """An overlay on a raw base with an ext2, and a second disk."""
    folder, base = tmp_path / "root", tmp_path / "base.raw"
    (folder / "tmp").mkdir(parents=True)
    (folder / "file").write_bytes(b"one")
    (folder / "tmp/base.raw").write_bytes(b"of the guest")
    subprocess.run(["mke2fs", "-q", "-d", folder, base, "1M"], check=True)
    for name in ("disk.qcow2", "other.qcow2"):
        words: list[str | Path] = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            base,
            "-F",
            "raw",
            tmp_path / name,
        ]
        subprocess.run(["qemu-img", *words], check=True)
    words = ["create", "-q", "-f", "qcow2", tmp_path / "second.qcow2", "1M"]
    subprocess.run(["qemu-img", *words], check=True)
    return tmp_path / "disk.qcow2"


@pytest.mark.parametrize("dest", ["base.raw", "disk.qcow2", "second.qcow2", "."])
def test_copy_out_refuses_to_replace_what_it_reads(
    on_base: Path, imgtool_cli: Any, dest: str
) -> None:
    folder = on_base.parent
    before = content(folder)
    source = "/tmp/base.raw" if dest == "." else "/file"
    words = [on_base, source, folder / dest, "--overwrite", "--engine", "direct"]
    words += ["-A", folder / "second.qcow2", "-m", "/dev/sda"]
    done = imgtool_cli("copy-out", *words)
    assert done.status == 4, done.err
    assert "the guest is read from" in done.err and "hint: choose another destination" in done.err
    assert content(folder) == before


APART = {
    "data file": ("qcow2", "data_file=part.raw,data_file_raw=on"),
    "flat": ("vmdk", "subformat=monolithicFlat"),
    "sparse parts": ("vmdk", "subformat=twoGbMaxExtentSparse"),
    "flat parts": ("vmdk", "subformat=twoGbMaxExtentFlat"),
}


@pytest.fixture(params=APART.values(), ids=list(APART))
def apart(request: pytest.FixtureRequest, tmp_path: Path) -> FakeGuest:
    """A guest whose disk is in other files than the one that names it."""
    format, options = request.param
    words = ["create", "-q", "-f", format, "-o", options, "disk", "3G"]
    subprocess.run(["qemu-img", *words], cwd=tmp_path, check=True, capture_output=True)
    chain = open_chain(tmp_path / "disk")
    assert len(chain.files) == (3 if "twoGb" in options else 2)
    return FakeGuest(chains=(chain,)).directory(b"/" + os.fsencode(tmp_path.name))


def identity(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {
        name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found.items()
    }


def test_no_file_is_replaced_that_holds_a_part_of_a_disk(
    tmp_path: Path, apart: FakeGuest, lines: Lines
) -> None:
    before = identity(tmp_path)
    for path in apart.chains[0].files:
        apart.add(b"/file", b"from the guest")
        with pytest.raises(RefusedError, match="the guest is read from"):
            copy_out(apart, "/file", path, lines.report, overwrite=True)  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match="the guest is read from"):
            refuse_guest_files(apart, ["/file"], path)  # type: ignore[arg-type]
        inside = b"/" + os.fsencode(tmp_path.name)
        apart.add(inside + b"/" + os.fsencode(path.name), b"from the guest")
        with pytest.raises(RefusedError, match="the guest is read from"):
            copy_out(
                apart,  # type: ignore[arg-type]
                os.fsdecode(inside),
                tmp_path.parent,
                lines.report,
                overwrite=True,
            )
        del apart.files[inside + b"/" + os.fsencode(path.name)]
        with path.open("ab") as out, pytest.raises(RefusedError, match="standard output"):
            GuestFiles(apart.chains).refuse_output(out)
    assert identity(tmp_path) == before and apart.opened == []


def test_the_data_file_of_an_image_is_not_written_over(on_base: Path, imgtool_cli: Any) -> None:
    image, data = on_base.with_name("split.qcow2"), on_base.with_name("split.raw")
    words = ["convert", "-O", "qcow2", "-o", f"data_file={data},data_file_raw=on"]
    subprocess.run(["qemu-img", *words, on_base, image], check=True)
    before = content(on_base.parent)
    done = imgtool_cli("copy-out", image, "/file", data, "--overwrite", "--engine", "direct")
    assert done.status == 4 and "the guest is read from" in done.err, done.err
    argv = (sys.executable, "-m", "imgtool", "cat", image, "/file", "--engine", "direct")
    with data.open("ab") as out:
        shown = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, text=True)
    assert shown.returncode == 4 and "standard output" in shown.stderr, shown.stderr
    assert content(on_base.parent) == before


@pytest.mark.parametrize("words", [["cat", "/file"], ["copy-out", "/", "-"]])
def test_nothing_is_written_to_a_standard_output_that_is_read(
    on_base: Path, words: list[str]
) -> None:
    command, *rest = words
    argv: list[str | Path] = [
        sys.executable,
        "-m",
        "imgtool",
        command,
        on_base,
        *rest,
        "--engine",
        "direct",
    ]
    before = content(on_base.parent)
    with on_base.with_name("base.raw").open("ab") as out:
        done = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4, done.stderr
    assert "standard output" in done.stderr
    assert content(on_base.parent) == before


@pytest.mark.parametrize("command", ["create", "convert", "overlay create", "copy-in --clone"])
def test_no_image_is_given_a_name_that_imgtool_removes(
    on_base: Path, imgtool_cli: Any, command: str
) -> None:
    new = on_base.with_name(".disk.qcow2.imgtool-01234567")
    given = {
        "create": ["create", new, "1M"],
        "convert": ["convert", on_base, new],
        "overlay create": ["overlay", "create", on_base, new],
        "copy-in --clone": ["copy-in", on_base, on_base.with_name("second.qcow2"), "/", "--clone"],
    }
    words = given[command] + ([new] if command.endswith("--clone") else [])
    done = imgtool_cli(*words)
    assert done.status == 4 and "a name that imgtool gives" in done.err
    assert not new.exists()


def test_record_of_work_alone_does_not_come_out_of_a_guest(place: Path, lines: Lines) -> None:
    """What lies beside an image under such a name would be taken for imgtool's own."""
    planted, folder = b".disk.qcow2.imgtool-record", b".imgtool-0123456789ab"
    guest = FakeGuest().directory(b"/top").add(b"/top/good", b"good")
    guest.add(b"/top/" + planted, b"{}").directory(b"/top/" + folder)
    guest.add(b"/top/" + folder + b"/inside", b"x")
    guest.stream = archive(
        member("./", kind=tarfile.DIRTYPE),
        member(f"./{planted.decode()}", b"{}"),
        member(f"./{folder.decode()}", kind=tarfile.DIRTYPE),
        member(f"./{folder.decode()}/inside", b"x"),
        member("./good", b"good"),
    )
    there = copied(guest, place, lines)
    assert [path.name for path in there.iterdir()] == ["good"]
    said = {line for _, line in lines.problems if "for its own" in line}
    assert len(said) == 1 and "left out" in said.pop()
    with pytest.raises(ImgtoolError, match="for its own"):
        copy_out(guest, "/top/good", place / "dest" / os.fsdecode(planted), lines.report)  # type: ignore[arg-type]
