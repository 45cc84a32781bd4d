"""FAT, NTFS, ISO 9660 and exFAT: what the direct readers say is what other programs say.

The programs are mtools, ntfs-3g, xorriso and exfat-fuse. They say less than Linux does, which
`test_other` asks in the appliance: names, kinds, sizes, contents, whole seconds, targets of links.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG

import pytest

from imgtool.engines.direct.worker.fs.base import Filesystem
from imgtool.engines.direct.worker.fs.exfat.reader import ExfatFilesystem
from imgtool.engines.direct.worker.fs.fat.reader import FatFilesystem
from imgtool.engines.direct.worker.fs.iso.reader import IsoFilesystem
from imgtool.engines.direct.worker.fs.ntfs.reader import NtfsFilesystem
from tests.differential import matrix_exfat, matrix_other
from tests.differential.matrix import Image, tree_of_files
from tests.differential.test_ext import FileSource
from tests.unmounting import unmount

_PROGRAMS = ("mcopy", "ntfs-3g", "xorriso", "mount.exfat-fuse")
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or not Path("/dev/fuse").exists()
    or not Path("/dev/loop-control").exists()
    or not all(map(shutil.which, _PROGRAMS)),
    reason=f"needs root, FUSE, loop devices, and {', '.join(_PROGRAMS)}, which are the reference",
)
# The kind, the size of a file, whole seconds (xorriso keeps none of a link), and the SHA-256 of a
# file or the target of a link.
Said = tuple[int, int, int | None, bytes]
_ENVIRONMENT = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"}


def _direct(reader: Filesystem) -> dict[bytes, Said]:
    """What a reader says, by path from the root."""
    said: dict[bytes, Said] = {}
    waiting = [(b"", reader.root)]
    while waiting:
        folder, number = waiting.pop()
        for name, child in reader.names(number):
            path, node = os.path.join(folder, name), reader.stat(child)
            kind, seconds = S_IFMT(node.mode), node.mtime_ns // 10**9
            if kind == S_IFREG:
                content = b"".join(
                    reader.read(child, at, 1 << 20) for at in range(0, node.size, 1 << 20)
                )
                said[path] = (kind, node.size, seconds, hashlib.sha256(content).digest())
            elif kind == S_IFLNK:
                said[path] = (kind, 0, None, reader.target(child))
            else:
                said[path] = (kind, 0, seconds, b"")
            if kind == S_IFDIR:
                waiting.append((path, child))
    return said


def _shown(root: Path) -> dict[bytes, Said]:
    """What a folder of the host shows, by path from it."""
    said: dict[bytes, Said] = {}
    shown: Said
    top = os.fsencode(root)
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            kind, seconds = S_IFMT(status.st_mode), status.st_mtime_ns // 10**9
            if kind == S_IFREG:
                content = Path(os.fsdecode(path)).read_bytes()
                shown = (kind, status.st_size, seconds, hashlib.sha256(content).digest())
            elif kind == S_IFLNK:
                shown = (kind, 0, None, os.readlink(path))
            else:
                shown = (kind, 0, seconds, b"")
            said[os.path.relpath(path, top)] = shown
    return said


@contextmanager
def _mounted(folder: Path, *command: object) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run([*map(str, command), str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        unmount(folder)


@contextmanager
def _taken_out(folder: Path, *command: object) -> Iterator[Path]:
    folder.mkdir()
    words = [*map(str, command), str(folder)]
    subprocess.run(words, check=True, capture_output=True, env=_ENVIRONMENT)
    yield folder


def _differences(image: Image, reader: type[Filesystem], shown: Path) -> list[str]:
    ours, theirs = _direct(reader.open(FileSource(image.path))), _shown(shown)
    assert len(theirs) > 8 or image.path.name.endswith("-empty")
    return [
        f"{image.path.name} {path!r}: {ours.get(path)} not {theirs.get(path)}"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    return matrix_other.make_without_appliance(tmp_path_factory.mktemp("matrix"))


def test_fat_is_what_mtools_copies(images, tmp_path):
    found, compared = [], 0
    for image in images:
        # An entry behind the end of a directory is listed by Linux, not by mtools.
        if image.type != "vfat" or image.path.name == "fat12-behind":
            continue
        command = ("mcopy", "-s", "-m", "-n", "-i", image.path, "::/*")
        with _taken_out(tmp_path / image.path.name, *command) as folder:
            found += _differences(image, FatFilesystem, folder)
        compared += 1
    assert found == []
    assert compared == 8


def test_ntfs_is_what_ntfs_3g_shows(images, tmp_path):
    found, compared = [], 0
    for image in images:
        if image.type == "ntfs":
            command = ("ntfs-3g", "-o", "ro", image.path)
            with _mounted(tmp_path / image.path.name, *command) as folder:
                found += _differences(image, NtfsFilesystem, folder)
            compared += 1
    assert found == []
    assert compared == 5


def test_rock_ridge_is_what_xorriso_takes_out(images, tmp_path):
    found, compared = [], 0
    for image in images:
        if image.path.name in ("iso-rock", "iso-rock-joliet", "iso-xorriso"):
            command = ("xorriso", "-osirrox", "on", "-indev", image.path, "-extract", "/")
            with _taken_out(tmp_path / image.path.name, *command) as folder:
                found += _differences(image, IsoFilesystem, folder)
            compared += 1
    assert found == []
    assert compared == 3


def test_exfat_is_what_exfat_fuse_shows(tmp_path):
    tree = tree_of_files(tmp_path / "tree", 60)
    found = []
    for image in matrix_exfat.make_without_appliance(tmp_path, tree):
        with (
            matrix_exfat.loop_device(image.path) as device,
            _mounted(
                tmp_path / f"{image.path.name}.shown", "mount.exfat-fuse", "-o", "ro", device
            ) as folder,
        ):
            found += _differences(image, ExfatFilesystem, folder)
    assert found == []
