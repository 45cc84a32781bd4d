"""Staging: whole or not at all, and nothing outside the destination."""

from __future__ import annotations

import contextlib
import inspect
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool.errors import ExitStatus, HostError, ImgtoolError, RefusedError
from imgtool.host import scratch
from imgtool.transfer.staging import Attributes, BadName, Staging
from imgtool.transfer.writes import BLOCK

PATH_MAX = 4096

NOBODY = 65534
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounts a tmpfs or changes owners, which only root may do"
)


def attributes(mode: int, mtime_ns: int = 1_600_000_000_123_456_789) -> Attributes:
    return Attributes(mode, os.geteuid(), os.getegid(), mtime_ns)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def small() -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@pytest.fixture
def others() -> Iterator[Path]:
    """A folder of a user who is not root; the test runs as that user."""
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, NOBODY, NOBODY)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(0)
        os.setegid(0)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name", [b"../out", b"/out", b"a/../../out", b"..", b"a\0b", b"./../out", b"a/.."]
)
def test_a_name_that_leads_elsewhere_is_never_made(tmp_path: Path, name: bytes) -> None:
    with Staging(tmp_path, b"top") as staging:
        staging.directory(b"")
        staging.directory(b"a")
        staging.file(b"inside", [b"x"])
        with pytest.raises(BadName):
            staging.file(name, [b"evil"])
        with pytest.raises(BadName):
            staging.directory(name)
        with pytest.raises(BadName):
            staging.symlink(name, b"x")
        with pytest.raises(BadName):
            staging.hardlink(name, b"inside")
        with pytest.raises(BadName):
            staging.hardlink(b"link", name)
        staging.commit()
    assert names(tmp_path) == {"top"}
    assert names(tmp_path / "top") == {"a", "inside"}


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0"])
def test_the_result_needs_a_name_of_one_component(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(BadName):
        Staging(tmp_path, name)


def test_nothing_goes_through_a_symbolic_link_of_the_content(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    with Staging(tmp_path, b"top") as staging:
        staging.directory(b"")
        staging.symlink(b"way", os.fsencode(outside))
        for call in (
            lambda: staging.file(b"way/new", [b"evil"]),
            lambda: staging.directory(b"way/new"),
            lambda: staging.symlink(b"way/new", b"x"),
            lambda: staging.hardlink(b"copy", b"way/kept"),
            lambda: staging.remove(b"way/kept"),
        ):
            with pytest.raises(BadName):
                call()
        assert not staging.finish(b"way/kept", attributes(0o777))
        staging.file(b"way", [b"in place of the link"])
        staging.commit()
    assert names(outside) == {"kept"} and (outside / "kept").read_bytes() == b"kept"
    assert (tmp_path / "top/way").read_bytes() == b"in place of the link"


def test_a_link_never_gives_its_target_mode_or_time(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"x")
    victim.chmod(0o600)
    before = victim.stat()
    with Staging(tmp_path, b"link") as staging:
        staging.symlink(b"", os.fsencode(victim))
        staging.finish(b"", Attributes(0o120777, 12345, 12345, 5))
        staging.commit()
    after = victim.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime_ns,
    )
    assert (tmp_path / "link").lstat().st_mtime_ns == 5


def test_nothing_is_left_when_something_is_raised(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Staging(tmp_path, b"top") as staging:
        staging.directory(b"")
        staging.directory(b"deep")
        staging.file(b"deep/file", [b"x" * 5000])
        staging.finish(b"deep", attributes(0o000))
        raise KeyError
    assert names(tmp_path) == set()


def test_nothing_is_left_of_a_tree_deeper_than_a_path(tmp_path: Path) -> None:
    name = b"d" * 200
    with pytest.raises(KeyError), Staging(tmp_path, b"top") as staging:
        path = b""
        staging.directory(path)
        while len(path) < 2 * PATH_MAX:
            path += b"/" + name if path else name
            staging.directory(path)
        raise KeyError
    assert names(tmp_path) == set()


def test_killed_copys_remains_alone_go_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [tmp_path / ".imgtool-0123456789ab.txt", tmp_path / ".imgtool-mine"]
    left = tmp_path / ".imgtool-0123456789ab"
    for folder in (left, kept[1]):
        (folder / "content/deep").mkdir(parents=True)
    kept[0].touch()
    with Staging(tmp_path, b"first"):
        assert left.exists()  # it may have been made just now
    monkeypatch.setattr(scratch, "_NEW", -1.0)
    with Staging(tmp_path, b"second") as second:
        assert not left.exists()
        with Staging(tmp_path, b"third"):
            second.directory(b"")
            second.commit()
    assert names(tmp_path) == {"second", *(path.name for path in kept)}


@needs_root
def test_unwritable_result_leaves_nothing(others: Path) -> None:
    with pytest.raises(RefusedError), Staging(others, b"top") as staging:
        staging.directory(b"")
        staging.directory(b"locked")
        staging.directory(b"locked/below")
        staging.file(b"locked/below/file", [b"x"])
        for name in (b"locked/below/file", b"locked/below", b"locked", b""):
            staging.finish(name, attributes(0o555))
        (others / "top").write_bytes(b"first")
        staging.commit()
    assert names(others) == {"top"} and (others / "top").read_bytes() == b"first"


@needs_root
def test_a_folder_that_may_not_be_written_to_is_the_hosts_fault(others: Path) -> None:
    others.chmod(0o555)
    with pytest.raises(HostError, match="permission denied"), Staging(others, b"top"):
        raise AssertionError("it began")
    assert names(others) == set()


@needs_root
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_read_only_directory_is_moved_by_one_who_is_not_root(others: Path, mode: int) -> None:
    for overwrite in (False, True):
        with Staging(others, b"top", overwrite=overwrite) as staging:
            staging.directory(b"")
            staging.directory(b"new" if overwrite else b"old")
            staging.file(b"file", [b"x"])
            for name in (b"new", b"old", b"file", b""):
                staging.finish(name, attributes(mode))
            staging.commit()
        top = others / "top"
        there = top.lstat()
        if not overwrite:  # a directory that is merged into keeps its own mode
            assert stat.S_IMODE(there.st_mode) == mode
            assert there.st_mtime_ns == 1_600_000_000_123_456_789
        top.chmod(0o700)
        assert stat.S_IMODE((top / ("new" if overwrite else "old")).stat().st_mode) == mode
    assert names(others) == {"top"} and names(top) == {"old", "new", "file"}


def test_existing_is_refused_with_status_4(tmp_path: Path) -> None:
    (tmp_path / "top").write_bytes(b"mine")
    with pytest.raises(RefusedError) as refused, Staging(tmp_path, b"top"):
        pass
    assert refused.value.status == ExitStatus.REFUSED and refused.value.hint
    assert names(tmp_path) == {"top"}


def test_what_came_meanwhile_is_refused_and_kept(tmp_path: Path) -> None:
    with pytest.raises(RefusedError), Staging(tmp_path, b"top") as staging:
        staging.file(b"", [b"ours"])
        (tmp_path / "top").symlink_to("nowhere")
        staging.commit()
    assert names(tmp_path) == {"top"} and (tmp_path / "top").is_symlink()


def test_overwrite_merges_directories_and_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "top/sub").mkdir(parents=True)
    (tmp_path / "top/sub/mine").write_bytes(b"mine")
    (tmp_path / "top/sub/both").write_bytes(b"mine")
    with Staging(tmp_path, b"top", overwrite=True) as staging:
        staging.directory(b"")
        staging.directory(b"sub")
        staging.file(b"sub/both", [b"ours"])
        staging.file(b"new", [b"ours"])
        staging.commit()
    assert names(tmp_path) == {"top"} and names(tmp_path / "top/sub") == {"mine", "both"}
    assert (tmp_path / "top/sub/both").read_bytes() == b"ours"
    assert (tmp_path / "top/sub/mine").read_bytes() == b"mine"


def test_overwrite_replaces_a_link_and_never_follows_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"kept")
    (tmp_path / "top").mkdir()
    (tmp_path / "top/link").symlink_to(outside / "file")
    with Staging(tmp_path, b"top", overwrite=True) as staging:
        staging.directory(b"")
        staging.file(b"link", [b"ours"])
        staging.commit()
    assert not (tmp_path / "top/link").is_symlink()
    assert (outside / "file").read_bytes() == b"kept"


@pytest.mark.parametrize("top", [b"top", b"link"])
def test_a_conflict_is_found_before_anything_is_replaced(tmp_path: Path, top: bytes) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "top").mkdir()
    (tmp_path / "top/z").symlink_to(outside)  # a directory of ours would go through it
    for number in range(20):
        (tmp_path / f"top/{number}").write_bytes(b"mine")
    with pytest.raises(RefusedError), Staging(tmp_path, top, overwrite=True) as staging:
        staging.directory(b"")
        for number in range(20):
            staging.file(b"%d" % number, [b"ours"])
        staging.directory(b"z")
        staging.file(b"z/file", [b"ours"])
        staging.commit()
    assert {(tmp_path / f"top/{number}").read_bytes() for number in range(20)} == {b"mine"}
    assert names(outside) == set() and names(tmp_path) == {"outside", "link", "top"}


@contextlib.contextmanager
def little_room() -> Iterator[int]:
    """A depth that neither the descriptors that can be opened nor recursion reaches here."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    recursion = sys.getrecursionlimit()
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 100, descriptors[1]))
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    try:
        yield 300
    finally:
        sys.setrecursionlimit(recursion)
        resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)


def test_tree_deeper_than_descriptors_and_recursion_is_merged(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with little_room() as depth:
        for content in (b"old", b"new"):
            with Staging(place, b"top", overwrite=True) as staging:
                path = b""
                staging.directory(path)
                for _ in range(depth):
                    path += b"/d" if path else b"d"
                    staging.directory(path)
                staging.file(path + b"/file", [content])
                staging.commit()
    assert names(place) == {"top"}
    found = os.fsencode(place) + b"/top/" + path + b"/file"
    assert Path(os.fsdecode(found)).read_bytes() == b"new"
    assert len(list(os.walk(place))) == depth + 2


def test_setuid_stays_only_with_its_owner(tmp_path: Path) -> None:
    for owners, bits in ((False, 0o1755), (True, 0o7755)):
        with Staging(tmp_path, b"top%d" % owners, owners=owners) as staging:
            staging.file(b"", [b"x"])
            staging.finish(b"", attributes(0o107755))
            staging.commit()
        assert stat.S_IMODE((tmp_path / f"top{owners:d}").stat().st_mode) == bits


@needs_root
def test_owners_are_the_guests_as_root(tmp_path: Path) -> None:
    with Staging(tmp_path, b"top") as staging:
        staging.file(b"", [b"x"])
        staging.finish(b"", Attributes(0o104755, 4242, 4343, 0))
        staging.commit()
    there = (tmp_path / "top").stat()
    assert (there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode)) == (4242, 4343, 0o4755)


@needs_root
def test_an_owner_or_time_that_no_host_has_is_no_crash(tmp_path: Path) -> None:
    with Staging(tmp_path, b"top") as staging:
        staging.file(b"", [b"x"])
        with pytest.raises(BadName):
            staging.finish(b"", Attributes(0o100644, 1 << 40, 0, 0))
        assert staging.finish(b"", Attributes(0o100640, 0, 0, 1 << 100))
        staging.commit()
    assert stat.S_IMODE((tmp_path / "top").stat().st_mode) == 0o640


def test_holes_stay_holes(tmp_path: Path) -> None:
    size = 1 << 30
    with Staging(tmp_path, b"ranges") as staging:
        staging.file_at(b"", [(4096, b"a" * 4096), (size - 10, b"end")], size=size)
        staging.commit()
    there = (tmp_path / "ranges").stat()
    assert there.st_size == size and there.st_blocks * 512 < 1 << 20
    with (tmp_path / "ranges").open("rb") as file:
        assert file.read(8193) == bytes(4096) + b"a" * 4096 + b"\0"
        file.seek(size - 10)
        assert file.read() == b"end" + bytes(7)
    zeros = bytes(1 << 20)
    with Staging(tmp_path, b"blocks") as staging:
        staging.file(b"", (zeros if number else b"x" for number in range(64)))
        staging.commit()
    there = (tmp_path / "blocks").stat()
    assert there.st_size == (63 << 20) + 1 and there.st_blocks * 512 < 1 << 20


@needs_root
def test_a_full_filesystem_is_explained_and_left_as_it_was(small: Path) -> None:
    with pytest.raises(ImgtoolError) as error, Staging(small, b"top") as staging:
        staging.directory(b"")
        staging.file(b"small", [b"x" * 100_000])
        staging.file(b"large", (b"x" * 100_000 for _ in range(20)))
    assert not isinstance(error.value, BadName)
    assert "no space left" in error.value.message and error.value.hint
    assert error.value.status == ExitStatus.HOST_CANNOT
    assert names(small) == set()
    free = os.statvfs(small)
    assert free.f_bfree == free.f_blocks


def test_name_or_size_that_the_host_cannot_have_fails_alone(tmp_path: Path) -> None:
    with Staging(tmp_path, b"top") as staging:
        staging.directory(b"")
        for call in (
            lambda: staging.file(b"n" * 256, [b"x"]),
            lambda: staging.file_at(b"huge", [], size=(1 << 63) - 1),
            lambda: staging.symlink(b"long", b"t" * 5000),
            lambda: staging.symlink(b"none", b""),
            lambda: staging.symlink(b"nul", b"a\0b"),
            lambda: staging.hardlink(b"link", b"missing"),
        ):
            with pytest.raises(BadName):
                call()
        staging.file(b"n" * 255, [b"x"])
        staging.commit()
    assert "n" * 255 in names(tmp_path / "top")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        with contextlib.suppress(ImgtoolError), Staging(tmp_path, b"%d" % number) as staging:
            staging.directory(b"")
            staging.directory(b"a")
            staging.file(b"a/x", [b"x"])
            staging.hardlink(b"y", b"a/x")
            staging.file(b"no/x", [b"x"])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "blocks", ["0x", "x0", "00", "x", "x0x", "0xx00xzx", "zz", "xx00zz0", "0z"]
)
@pytest.mark.parametrize("tail", [0, 1, 100])
def test_whole_blocks_of_zeros_are_holes_and_nothing_else(
    tmp_path: Path, blocks: str, tail: int
) -> None:
    """x: data; z: data after a zero; 0: zeros. The last block is `tail` bytes short."""
    kinds = {"x": b"x" * BLOCK, "z": bytes(BLOCK - 101) + b"z" * 101, "0": bytes(BLOCK)}
    content = b"".join(kinds[kind] for kind in blocks)[: len(blocks) * BLOCK - tail]
    with Staging(tmp_path, b"file") as staging:
        assert staging.file(b"", [content]) == len(content)
        staging.commit()
    made = tmp_path / "file"
    assert made.read_bytes() == content
    assert made.stat().st_blocks * 512 == sum(kind != "0" for kind in blocks) * BLOCK


def exchange_on_unlink(
    monkeypatch: pytest.MonkeyPatch, name: Path, target: Path, times: list[str]
) -> None:
    """Whoever owns the folder puts a link in the place of a directory, as soon as it is known that
    it is no file."""
    real = os.unlink

    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        try:
            real(path, dir_fd=dir_fd)
        except IsADirectoryError:
            if not times:
                times.append(path)
                name.rename(name.with_name("aside"))
                name.symlink_to(target)
            raise

    monkeypatch.setattr(os, "unlink", unlink)


def test_folder_exchanged_for_a_link_is_unchanged_at_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_NEW", -1.0)
    precious, left = tmp_path / "precious", tmp_path / "to/.imgtool-0123456789ab"
    precious.mkdir(mode=0o755)
    (left / "content").mkdir(parents=True)
    left.chmod(0o700)
    exchanged: list[str] = []
    exchange_on_unlink(monkeypatch, left / "content", precious, exchanged)
    with Staging(tmp_path / "to", b"new"):
        pass
    assert exchanged == ["content"]
    assert stat.S_IMODE(precious.stat().st_mode) == 0o755


@needs_root
def test_root_removes_nothing_that_another_user_calls_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other user owns the destination: he may rename what root has there."""
    monkeypatch.setattr(scratch, "_NEW", -1.0)
    os.chown(tmp_path, NOBODY, NOBODY)
    theirs, renamed, open_to_all = (tmp_path / f".imgtool-{i:012x}" for i in range(3))
    for folder in (theirs, renamed, open_to_all):
        (folder / ("work" if folder == renamed else "content")).mkdir(parents=True)
        folder.chmod(0o755 if folder == open_to_all else 0o700)
    os.chown(theirs, NOBODY, NOBODY)
    killed = tmp_path / f".imgtool-{9:012x}"
    (killed / "content/deep").mkdir(parents=True)
    killed.chmod(0o700)
    with Staging(tmp_path, b"new"):
        pass
    assert names(tmp_path) == {theirs.name, renamed.name, open_to_all.name}


@needs_root
@pytest.mark.parametrize("theirs", ["owner", "mode"])
def test_copy_does_not_begin_in_a_folder_exchanged_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    real = os.mkdir

    def mkdir(path: bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        if b".imgtool-" in path:
            made = tmp_path / os.fsdecode(path)
            made.rename(tmp_path / "aside")
            real(made, 0o777)
            made.chmod(0o777 if theirs == "mode" else 0o700)
            if theirs == "owner":
                os.chown(made, NOBODY, NOBODY)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(RefusedError, match="in the place"), Staging(tmp_path, b"new"):
        pytest.fail("it was begun")
