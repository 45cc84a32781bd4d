"""Extended attributes and ACLs through both engines: what the host's kernel says of the same."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgtool import open_guest
from imgtool.formats.xattrs import Xattrs
from imgtool.guest.model import Mount
from imgtool.transfer.copy_out import Report, copy_out, tar_out
from imgtool.transfer.keeping import Keeping
from tests.differential import matrix_xattrs, matrix_xfs

pytestmark = [
    pytest.mark.appliance,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/loop-control").exists(),
        reason="needs root and loop devices: the attributes are set through the kernel",
    ),
]

Said = dict[bytes, Xattrs]
MOUNTS = [Mount("/dev/sda", "/"), Mount("/dev/sdb", "/xfs")]


def _walked(root: Path, prefix: bytes) -> Said:
    found = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            below = prefix + path[len(os.fsencode(root)) :]
            found[below] = matrix_xattrs.of_kernel(path)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Said]:
    """An ext4 with a folder for an XFS, and what the host's kernel says of both."""
    folder = tmp_path_factory.mktemp("attributes")
    ext, xfs = folder / "ext.img", folder / "xfs.img"
    with ext.open("wb") as file:
        file.truncate(64 << 20)
    options = ("-t", "ext4", "-O", "ea_inode", ext)
    subprocess.run(["mke2fs", "-q", "-F", *options], check=True, capture_output=True)
    said: Said = {}
    mounted = folder / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-o", "loop", ext, mounted], check=True)
    try:
        matrix_xattrs.fill(mounted)
        (mounted / "xfs").mkdir()
        said |= _walked(mounted, b"")
    finally:
        subprocess.run(["umount", mounted], check=True)
    with xfs.open("wb") as file:
        file.truncate(320 << 20)
    matrix_xfs.mkfs(xfs)
    with matrix_xfs.mounted(xfs) as root:
        matrix_xattrs.fill(root)
        for number in range(300):  # more than one message of libguestfs takes
            path = root / f"file {number}"
            path.touch()
            os.setxattr(path, "user.large", os.urandom(20_000))
        said |= _walked(root, b"/xfs")
    return [ext, xfs], said


@pytest.fixture(scope="module", params=["direct", "libguestfs"])
def guest(request: pytest.FixtureRequest, made: tuple[list[Path], Said]) -> Iterator[Any]:
    (ext, xfs), _ = made
    with open_guest(ext, add=[xfs], mounts=MOUNTS, engine=request.param) as opened:
        yield opened


def test_a_walk_says_what_the_kernel_says(guest, made) -> None:
    _, said = made
    found = {entry.path: entry.xattrs for entry in guest.walk("/", xattrs=True)}
    assert {path for path in said if found[path] != said[path]} == set()
    assert len(found) == len(said)


def test_single_paths_and_folders_say_it_too(guest, made) -> None:
    _, said = made
    for path in (b"/one", b"/xfs/link", b"/xfs/folder", b"/null", b"/huge"):
        assert guest.xattrs(path) == said[path]
    listed = {entry.path: entry.xattrs for entry in guest.entries("/xfs", xattrs=True)}
    assert {path for path, values in listed.items() if said[path] != values} == set()


def test_a_copy_has_what_the_guest_has(guest, made, tmp_path) -> None:
    _, said = made
    lines: list[str] = []
    report = Report(
        lambda path, line: lines.append(line), lambda path, line: None, xattrs=Keeping(True)
    )
    copy_out(guest, "/xfs", tmp_path, report)
    copy_out(guest, "/one", tmp_path, report)
    assert lines == []
    found = _walked(tmp_path / "xfs", b"/xfs")
    # What the filesystem of the host has no room for is counted.
    for path in (b"one", b"link", b"short link", b"some", b"several", b"several again", b"folder"):
        assert found[b"/xfs/" + path] == said[b"/xfs/" + path]
    assert matrix_xattrs.of_kernel(os.fsencode(tmp_path / "one")) == said[b"/one"]


def test_a_tar_stream_has_them_as_gnu_tar_takes_them(guest, made, tmp_path) -> None:
    _, said = made
    stream = io.BytesIO()
    tar_out(guest, "/", stream)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as archive:
        records = {member.name: member.pax_headers for member in archive}
    assert "SCHILY.acl.access" in records["./some"]
    assert "SCHILY.acl.default" in records["./folder"]
    words = ["tar", "-x", "-p", "-C", tmp_path, "--xattrs", "--xattrs-include=*", "--acls"]
    names = ["./one", "./some", "./folder", "./link", "./none", "./xfs/one", "./xfs/some"]
    subprocess.run([*words, *names], input=stream.getvalue(), check=True, capture_output=True)
    for name in names:
        path = os.fsencode(tmp_path / name)
        assert matrix_xattrs.of_kernel(path) == said[os.fsencode(name[1:])]


def test_a_stream_of_ntfs_that_is_no_attribute_is_counted(tmp_path):
    disk, host = tmp_path / "ntfs.img", tmp_path / "host"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkntfs", "-q", "-Q", "-F", disk], check=True, capture_output=True)
    odd = "a=b 'c'"
    for stream, size in (("", 5), (odd, 10), ("long", 100_000), ("longer", 200_000)):
        host.write_bytes(b"x" * size)
        named = ["-N", stream] if stream else []
        words = ["ntfscp", "-f", *named, disk, host, "it's"]
        subprocess.run(words, check=True, capture_output=True)
    told: list[str] = []
    with open_guest(disk, engine="libguestfs", notice=told.append) as guest:
        (entry,) = guest.entries("/", xattrs=True)
        assert guest.xattrs("/it's") == entry.xattrs == ((f"user.{odd}".encode(), b"x" * 10),)
    assert told[-1] == "extended attributes (streams of NTFS) of more than 64 KiB are left out: 4"
