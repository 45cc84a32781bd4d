"""copy-in: what is packed for the guest, judged by tar(1) of the host."""

from __future__ import annotations

import gc
import io
import os
import socket
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest

from imgtool.engines.libguestfs.guest.stream import upload
from imgtool.errors import ImgtoolError, NotInGuestError, UsageError
from imgtool.guest.changes import Kept
from imgtool.guest.guest import Guest, Owners
from imgtool.guest.model import Entry
from imgtool.transfer.copy_in import (
    Ownership,
    copy_in,
    find_ownership,
    plan_sources,
    split_owner,
    tar_in,
)

_OF_SOURCE = Ownership(of_source=True)


class Put:
    """In place of the guest: keeps the stream that would be unpacked in it."""

    def __init__(self) -> None:
        self.stream = b""
        self.skipped: list[tuple[bytes, str]] = []
        self.progress: list[tuple[int, int]] = []

    def resolve(self, path: str) -> bytes:
        return os.fsencode(path)

    def lstat(self, path: bytes) -> Entry:
        return Entry(path, stat.S_IFDIR | 0o755, 0, 0, 0, 0)

    def owners(self) -> Owners:
        return Owners({0: "root", 1000: "alice"}, {0: "root", 42: "shadow"})

    def put(
        self, directory: bytes, produce: Any, *, rename: Any = None, kept: Kept = Kept()
    ) -> None:
        self.kept = kept
        received = bytearray()

        def call(name: str) -> None:
            with Path(name).open("rb") as stream:
                while block := stream.read(1 << 20):
                    received.extend(block)

        upload(call, produce)
        self.stream = bytes(received)

    def copy(
        self, *sources: Path, owner: Ownership = Ownership(), mode: int | None = None
    ) -> bytes:
        copy_in(
            self,  # type: ignore[arg-type]
            plan_sources(sources),
            "/dest",
            owner=owner,
            mode=mode,
            on_skipped=lambda path, line: self.skipped.append((path, line)),
            on_progress=lambda done, total: self.progress.append((done, total)),
        )
        return self.stream

    def tar(self, stream: bytes, owner: Ownership = _OF_SOURCE, mode: int | None = None) -> bytes:
        self.stream = b""
        reading = io.BytesIO(stream)
        tar_in(
            self,  # type: ignore[arg-type]
            reading,
            "/dest",
            owner=owner,
            mode=mode,
            on_skipped=lambda path, line: self.skipped.append((path, line)),
        )
        return self.stream


@pytest.fixture
def guest() -> Put:
    return Put()


def extracted(stream: bytes, folder: Path) -> Path:
    folder.mkdir()
    argv = ("tar", "-C", folder, "-xpf", "-", "--numeric-owner")
    done = subprocess.run(argv, input=stream, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def listed(stream: bytes) -> list[str]:
    argv = ["tar", "-tvf", "-", "--numeric-owner", "--quoting-style=escape"]
    done = subprocess.run(argv, input=stream, capture_output=True, env={"LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode("ascii").splitlines()


def archive(*members: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 3 if kind == tarfile.REGTYPE else 0
    info.pax_headers = {key.replace("_", "."): value for key, value in pax.items()}
    return info


@pytest.mark.parametrize(
    "mtime", [0, 1, 999_999_999, 1_700_000_000_123_456_789, -1, -500_000_000, -1_500_000_000]
)
def test_times_arrive_to_the_nanosecond(guest: Put, tmp_path: Path, mtime: int) -> None:
    source = tmp_path / "top"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    (source / "link").symlink_to("file")
    for path in (source / "file", source / "link", source):
        os.utime(path, ns=(mtime, mtime), follow_symlinks=False)
    there = extracted(guest.copy(source), tmp_path / "out") / "top"
    for path in (there, there / "file", there / "link"):
        assert path.lstat().st_mtime_ns == mtime


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"new\nline", b"\x1b[31m", "ü".encode() * 127, b"\xff" * 255, b"-rf"]
)
def test_names_and_targets_of_any_bytes_arrive_exactly(
    guest: Put, tmp_path: Path, name: bytes
) -> None:
    source = tmp_path / "top"
    folder = source / os.fsdecode(name)
    folder.mkdir(parents=True)
    (folder / os.fsdecode(name)).write_bytes(b"content")
    (folder / "link").symlink_to(os.fsdecode(name))
    os.link(folder / os.fsdecode(name), source / "hard")
    stream = guest.copy(source)
    listed(stream)
    there = extracted(stream, tmp_path / "out") / "top"
    assert sorted(os.listdir(os.fsencode(there))) == sorted([name, b"hard"])
    assert os.readlink(os.fsencode(there / os.fsdecode(name) / "link")) == name
    first = there / os.fsdecode(name) / os.fsdecode(name)
    assert (
        first.read_bytes() == b"content" and first.stat().st_ino == (there / "hard").stat().st_ino
    )


@pytest.mark.parametrize("target", ["./x", "a//b/./c", "dir/", "//server", "..", "x" * 4000])
def test_the_target_of_a_link_is_not_tidied(guest: Put, tmp_path: Path, target: str) -> None:
    source = tmp_path / "top"
    source.mkdir()
    os.symlink(target, source / "link")
    there = extracted(guest.copy(source), tmp_path / "out") / "top"
    assert os.readlink(there / "link") == target


def test_the_owner_is_the_given_one_or_that_of_the_host(guest: Put, tmp_path: Path) -> None:
    source = tmp_path / "top"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    os.chown(source / "file", 3_000_000_000, 77)
    assert {line.split()[1] for line in listed(guest.copy(source))} == {"0/0"}
    given = listed(guest.copy(source, owner=Ownership(4_000_000_000, 5)))
    assert {line.split()[1] for line in given} == {"4000000000/5"}
    assert listed(guest.copy(source, owner=_OF_SOURCE))[1].split()[1] == "3000000000/77"


def test_the_mode_is_given_to_files_only(guest: Put, tmp_path: Path) -> None:
    source = tmp_path / "top"
    (source / "sub").mkdir(parents=True)
    (source / "file").write_bytes(b"x")
    (source / "file").chmod(0o4755)
    (source / "sub").chmod(0o1711)
    kept = [line.split()[0] for line in listed(guest.copy(source))]
    assert kept == ["drwxr-xr-x", "-rwsr-xr-x", "drwx--x--t"]
    given = [line.split()[0] for line in listed(guest.copy(source, mode=0o600))]
    assert given == ["drwxr-xr-x", "-rw-------", "drwx--x--t"]


def test_what_is_no_file_is_left_out_with_a_line(guest: Put, tmp_path: Path) -> None:
    source = tmp_path / "top"
    source.mkdir()
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "socket"))
    (source / "z").write_bytes(b"x")
    names = [line.split()[-1] for line in listed(guest.copy(source))]
    assert names == ["top/", "top/z"]
    assert [os.path.basename(path) for path, _ in guest.skipped] == [b"fifo", b"socket"]


def test_progress_ends_at_what_was_planned(guest: Put, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 100_000)
    guest.copy(tmp_path / "a", tmp_path / "b")
    assert guest.progress[-1] == (200_000, 200_000)


def test_file_that_shrinks_is_an_error_and_a_growing_one_is_cut(
    guest: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 50_000)
    real, size = os.fstat, [60_000]

    def fstat(descriptor: int) -> os.stat_result:
        there = real(descriptor)
        if not stat.S_ISREG(there.st_mode) or there.st_ino != source.stat().st_ino:
            return there
        fields = list(there)
        fields[6] = size[0]
        return os.stat_result(fields, {"st_mtime_ns": 0})

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ImgtoolError, match="became shorter") as error:
        guest.copy(source)
    assert error.value.subject == source
    size[0] = 40_000
    stream = guest.copy(source)
    monkeypatch.undo()
    assert listed(stream)[0].split()[2] == "40000"


@pytest.mark.parametrize("change", ["gone", "fifo", "folder", "link"])
def test_a_file_that_is_swapped_meanwhile_is_an_error(
    guest: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x")
    real = os.open

    def swapped(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if path == source:
            source.unlink()
            if change == "fifo":
                os.mkfifo(source)
            elif change == "folder":
                source.mkdir()
            elif change == "link":
                source.symlink_to("/etc/passwd")
        return real(path, flags, *more, **named)

    plan_sources([source])
    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(ImgtoolError) as error:
        guest.copy(source)
    assert str(error.value.subject) == str(source)


def test_an_unreadable_source_is_found_before_anything_starts(tmp_path: Path) -> None:
    source = tmp_path / "top"
    source.mkdir()
    (source / "secret").write_bytes(b"x")
    (source / "secret").chmod(0)
    with pytest.raises(ImgtoolError, match="no such file"):
        plan_sources([tmp_path / "missing"])
    for path in [tmp_path, *tmp_path.parents]:
        if path != Path(tempfile.gettempdir()) and path.is_relative_to(tempfile.gettempdir()):
            path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ImgtoolError, match="permission denied") as error:
            plan_sources([source])
    finally:
        os.seteuid(0)
    assert error.value.subject == source / "secret"


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_failure_says_nothing_but_its_error(guest: Put) -> None:
    bad = member("../evil")
    with pytest.raises(ImgtoolError):
        guest.tar(archive(member("good"), bad))
    gc.collect()
    assert guest.stream == b""


def test_two_sources_with_the_same_name_are_refused(tmp_path: Path) -> None:
    for name in ("a/same", "b/same"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="same name"):
        plan_sources([tmp_path / "a/same", tmp_path / "b/same"])


# Streams of the user's


@pytest.mark.parametrize(
    "bad",
    [
        member("../evil"),
        member("/evil"),
        member("a/../../evil"),
        member("..", tarfile.DIRTYPE),
        member("a", tarfile.LNKTYPE, "../evil"),
        member("a", tarfile.LNKTYPE, "/etc/shadow"),
        member("a", path="../evil"),
        member("a", path="/evil"),
    ],
    ids=lambda info: f"{info.name} {info.linkname}",
)
def test_a_name_that_leads_elsewhere_refuses_the_whole_stream(
    guest: Put, bad: tarfile.TarInfo
) -> None:
    with pytest.raises(ImgtoolError, match="outside"):
        guest.tar(archive(member("good"), bad))
    assert guest.stream == b""


def test_extended_headers_cannot_undo_checks_or_requests(guest: Put) -> None:
    stream = guest.tar(
        archive(
            # Two headers give a name: the harmless one was checked.
            member("a", path="../evil", GNU_sparse_name="harmless"),
            member("b", uid="4000000000", gid="4000000000", uname="root"),
            member("c", mtime="nan"),
            member("d", mtime="inf"),
            member("e", mtime="1700000000.123456789"),
        ),
        owner=Ownership(7, 8),
        mode=0o640,
    )
    lines = listed(stream)
    assert [line.split()[-1] for line in lines] == ["harmless", "b", "c", "d", "e"]
    assert {(line.split()[0], line.split()[1]) for line in lines} == {("-rw-r-----", "7/8")}
    assert b"evil" not in stream and b"1700000000.123456789" in stream


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_stream_arrives_whole(guest: Put, tmp_path: Path, form: str) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    argv = ("tar", "-C", tmp_path, f"--format={form}", "-cSf", "-", "sparse")
    made = subprocess.run(argv, capture_output=True, check=True).stdout
    assert len(made) < 100_000
    there = extracted(guest.tar(made), tmp_path / "out")
    assert (there / "sparse").read_bytes() == bytes(1 << 20) + b"end"


@pytest.mark.parametrize("flags", ["", "z", "j", "J"])
def test_a_real_tar_stream_arrives_as_it_was(guest: Put, tmp_path: Path, flags: str) -> None:
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / os.fsdecode(b"\xff" * 200)).write_bytes(b"1")
    (source / ("n" * 150)).write_bytes(b"2" * 30_000)
    (source / "link").symlink_to("/etc/../x")
    os.link(source / ("n" * 150), source / "hard")
    argv = ("tar", "-C", source, f"-c{flags}f", "-", ".")
    made = subprocess.run(argv, capture_output=True, check=True).stdout
    there = extracted(guest.tar(made), tmp_path / "out")
    compared = subprocess.run(["diff", "-r", "--no-dereference", source, there])
    assert compared.returncode == 0
    assert (there / "hard").stat().st_nlink == 2


@pytest.mark.parametrize("cut", [0, 100, 512, 900, 1024, 1536, 2000, 2048])
def test_a_stream_that_ends_early_is_no_whole_stream(guest: Put, cut: int) -> None:
    with pytest.raises(ImgtoolError, match="not a whole tar stream"):
        guest.tar(archive(member("a"), member("b"), form=tarfile.GNU_FORMAT)[:cut])
    assert guest.stream == b""


@pytest.mark.parametrize("flags", ["z", "j", "J"])
def test_a_compressed_stream_that_ends_early_is_no_whole_stream(
    guest: Put, tmp_path: Path, flags: str
) -> None:
    (tmp_path / "random").write_bytes(os.urandom(100_000))
    argv = ("tar", "-C", tmp_path, f"-c{flags}f", "-", "random")
    made = subprocess.run(argv, capture_output=True, check=True).stdout
    with pytest.raises(ImgtoolError, match="not a whole tar stream"):
        guest.tar(made[: len(made) // 2])


def test_what_is_no_tar_or_is_damaged_in_the_middle_is_an_error(guest: Put) -> None:
    good = archive(member("a"), member("b"), form=tarfile.GNU_FORMAT)
    for stream in (b"no tar at all " * 100, good[:1024] + b"garbage!" * 64 + good[1536:]):
        with pytest.raises(ImgtoolError, match="not a whole tar stream"):
            guest.tar(stream)


def test_an_empty_archive_is_one(guest: Put) -> None:
    assert listed(guest.tar(archive())) == []


def test_extended_attributes_not_copied_are_counted_once(guest: Put, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("one", "two"):
        (source / name).touch()
        os.setxattr(source / name, "user.comment", b"here")
    subprocess.run(["setfacl", "-m", "u:1000:r", source / "one"], check=True)
    guest.copy(source)
    line = "extended attributes are not copied (ACLs: 1, user.*: 2)"
    assert guest.skipped == [(b"/dest", line)]
    guest.skipped.clear()
    words = ("tar", "-C", tmp_path, "--xattrs", "--acls", "-cf", "-", "source")
    guest.tar(subprocess.run(words, check=True, capture_output=True).stdout)
    assert guest.skipped == [(b"/dest", line)]
    guest.skipped.clear()
    guest.tar(subprocess.run([*words[:3], *words[5:]], check=True, capture_output=True).stdout)
    assert guest.skipped == []


def test_a_file_keeps_the_owner_and_mode_of_what_it_replaces(guest: Put, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.touch()
    guest.copy(source)
    assert guest.kept == Kept(user=True, group=True, mode=True)
    guest.copy(source, mode=0o600)
    assert guest.kept == Kept(user=True, group=True)
    guest.copy(source, owner=Ownership(user=7))
    assert guest.kept == Kept(group=True, mode=True)
    guest.copy(source, owner=_OF_SOURCE)
    assert guest.kept == Kept()


def test_a_stream_brings_its_owners_and_modes(guest: Put) -> None:
    stream = archive(member("file", uid="5"))
    guest.tar(stream)
    assert guest.kept == Kept()
    guest.tar(stream, owner=Ownership(user=7))
    assert guest.kept == Kept(group=True)


@pytest.mark.parametrize(
    ("owner", "group", "meant"),
    [
        (None, None, (None, None)),
        ("alice", None, (1000, None)),
        ("alice:shadow", None, (1000, 42)),
        (":shadow", None, (None, 42)),
        ("7:8", None, (7, 8)),
        ("0", "0", (0, 0)),
        ("alice", "shadow", (1000, 42)),
        (None, "4294967294", (None, 4294967294)),
    ],
)
def test_owners_are_names_or_numbers(guest: Put, owner, group, meant) -> None:
    found = find_ownership(cast(Guest, guest), *split_owner(owner, group))
    assert (found.user, found.group) == meant


@pytest.mark.parametrize(
    ("owner", "group", "error", "said"),
    [
        ("", None, UsageError, "--owner takes"),
        (":", None, UsageError, "--owner takes"),
        (None, "", UsageError, "--group takes"),
        ("alice:", None, UsageError, "a group is missing"),
        ("alice:shadow", "root", UsageError, "given twice"),
        ("alcie", None, NotInGuestError, "no user of this name"),
        ("alice:shadwo", None, NotInGuestError, "no group of this name"),
        ("4294967295", None, NotInGuestError, "no user of this name"),
        ("-1", None, NotInGuestError, "no user of this name"),
    ],
)
def test_owners_that_are_none_are_refused(guest: Put, owner, group, error, said) -> None:
    with pytest.raises(error, match=said) as caught:
        find_ownership(cast(Guest, guest), *split_owner(owner, group))
    if owner == "alcie":
        assert caught.value.hint == "did you mean alice?"
