"""Named streams of NTFS are the extended attributes that ntfs-3g, mounted on the host, gives."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgtool.engines.direct.worker.fs.ntfs.reader import NtfsFilesystem
from tests.differential import matrix_xattrs
from tests.differential.test_ext import FileSource
from tests.unmounting import unmount

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists() or shutil.which("ntfs-3g") is None,
    reason="needs root, FUSE and ntfs-3g, which is the reference",
)


@contextmanager
def _mounted(image: Path, *options: str) -> Iterator[Path]:
    folder = image.with_suffix(".mounted")
    folder.mkdir(exist_ok=True)
    subprocess.run(["ntfs-3g", *options, image, folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        unmount(folder)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "ntfs.img"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkntfs", "-q", "-Q", "-F", path], check=True, capture_output=True)
    with _mounted(path) as root:
        (root / "folder").mkdir()
        (root / "link").symlink_to("file")
        for name in ("file", "none", "too large"):
            (root / name).write_text(name)
        for path_of in (root / "file", root / "folder"):
            os.setxattr(path_of, "user.Zone.Identifier", b"[ZoneTransfer]\r\nZoneId=3\r\n")
            os.setxattr(path_of, "user.large", os.urandom(60_000))
            os.setxattr(path_of, "user.empty", b"")
            os.setxattr(path_of, "user.żółw", b"x" * 3000)
        for number in range(60):  # more than one record has room for
            os.setxattr(root / "file", f"user.{number}", bytes([number]) * number * 20)
        os.setxattr(root / "too large", "user.x", b"x" * 65_536)
    return path


def test_every_stream_is_the_attribute_that_ntfs_3g_gives(image: Path) -> None:
    source = FileSource(image)
    ntfs = NtfsFilesystem.open(source)
    ours = {name: ntfs.xattrs(inode) for name, inode in ntfs.names(ntfs.root)}
    assert ntfs.xattrs(ntfs.root) == ()
    with _mounted(image, "-o", "ro") as root:
        theirs = {
            name: matrix_xattrs.of_kernel(os.path.join(os.fsencode(root), name)) for name in ours
        }
    assert ours == theirs
    assert {name: len(values) for name, values in ours.items()} == {
        b"file": 64, b"folder": 4, b"link": 0, b"none": 0, b"too large": 1,
    }  # fmt: skip
    source.close()


def test_a_stream_that_is_too_long_for_an_attribute_is_counted(image: Path, tmp_path) -> None:
    longer = tmp_path / "longer.img"
    longer.write_bytes(image.read_bytes())
    with (
        _mounted(longer, "-o", "streams_interface=windows") as root,
        (root / "too large:x").open("ab") as file,
    ):
        file.write(b"y")
    source = FileSource(longer)
    ntfs = NtfsFilesystem.open(source)
    inode = dict(ntfs.names(ntfs.root))[b"too large"]
    assert (ntfs.xattrs(inode), ntfs.oversized_xattrs(inode)) == ((), 1)
    source.close()
