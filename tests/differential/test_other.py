"""FAT, NTFS, ISO 9660 and exFAT: everything the direct readers say is what the appliance says.

The appliance also writes most images of exFAT. `test_tools` runs without it, and asks for less.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG
from typing import Any

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Filesystem, ReadFailed, Usage
from imgtool.engines.direct.worker.fs.exfat.reader import ExfatFilesystem
from imgtool.engines.direct.worker.fs.fat.reader import FatFilesystem
from imgtool.engines.direct.worker.fs.iso.reader import IsoFilesystem
from imgtool.engines.direct.worker.fs.ntfs.reader import NtfsFilesystem
from imgtool.engines.direct.worker.tree import Tree
from imgtool.engines.direct.worker.tree_files import pieces
from imgtool.engines.libguestfs.appliance.launch import launch_appliance
from tests.differential.matrix import Image
from tests.differential.matrix_exfat import part_written
from tests.differential.matrix_other import make_images

pytestmark = pytest.mark.appliance
READERS: Mapping[str, type[Filesystem]] = {
    "vfat": FatFilesystem,
    "ntfs": NtfsFilesystem,
    "iso9660": IsoFilesystem,
    "exfat": ExfatFilesystem,
}
Walk = dict[bytes, tuple[Any, ...]]
_BATCH = 500


class FileSource:
    """A raw image as a source."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        if min(offset, length) < 0 or offset + length > self.size:
            raise ReadFailed("past the end")
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def direct_walk(found: Filesystem) -> Walk:
    """All that a reader says of every name, each also looked up."""
    walked: Walk = {}
    waiting = [(b"/", found.root)]
    while waiting:
        path, inode = waiting.pop()
        node = found.stat(inode)
        kind, target, checksum = S_IFMT(node.mode), b"", ""
        if kind == S_IFLNK:
            target = found.target(inode)
        if kind == S_IFREG:
            checksum = _checksum(found, inode, node.size)
        walked[path] = (
            node.mode,
            node.uid,
            node.gid,
            node.size,
            node.mtime_ns,
            node.blocks,
            node.nlink,
            node.rdev,
            target,
            checksum,
        )
        if kind == S_IFDIR:
            for name, child in found.names(inode):
                assert found.lookup(inode, name) == child
                waiting.append((os.path.join(path, name), child))
    return walked


def _checksum(found: Filesystem, inode: int, size: int) -> str:
    """The content in pieces of an odd size; what is outside of the ranges must be zeros."""
    content = bytearray()
    while piece := found.read(inode, len(content), 100_003):
        content += piece
    assert len(content) == size
    end = 0
    for start, length in found.ranges(inode):
        assert not any(content[end:start])
        end = start + length
    assert end <= size and not any(content[end:])
    return hashlib.sha256(content).hexdigest()


def appliance_walk(g: Any, work: Path) -> Walk:
    """The same of what is mounted in the appliance."""
    g.find0("/", str(work / "names"))
    g.checksums_out("sha256", "/", str(work / "sums"))
    sums: dict[bytes, str] = {}
    for line in (work / "sums").read_bytes().splitlines():
        assert not line.startswith(b"\\")
        checksum, name = line.split(b"  ", 1)
        sums[b"/" + name.removeprefix(b"./")] = checksum.decode()
    folders: dict[bytes, list[bytes]] = defaultdict(list)
    for name in (work / "names").read_bytes().split(b"\0"):
        if name:
            folder, base = os.path.split(b"/" + name)
            folders[folder].append(base)
    walked: Walk = {b"/": _said(g.lstatns("/"), b"", "")}
    for folder, names in folders.items():
        for start in range(0, len(names), _BATCH):
            part = [os.fsdecode(name) for name in names[start : start + _BATCH]]
            stats = g.lstatnslist(os.fsdecode(folder), part)
            targets = g.readlinklist(os.fsdecode(folder), part)
            for text, stat, target in zip(part, stats, targets, strict=True):
                path = os.path.join(folder, os.fsencode(text))
                walked[path] = _said(stat, os.fsencode(target), sums.get(path, ""))
    return walked


def _said(stat: Mapping[str, int], target: bytes, checksum: str) -> tuple[Any, ...]:
    return (
        stat["st_mode"],
        stat["st_uid"],
        stat["st_gid"],
        stat["st_size"],
        stat["st_mtime_sec"] * 10**9 + stat["st_mtime_nsec"],
        stat["st_blocks"],
        stat["st_nlink"],
        stat["st_rdev"],
        target,
        checksum,
    )


def _usage(said: Mapping[str, int]) -> Usage:
    unit = said["frsize"]
    return Usage(
        said["blocks"] * unit,
        (said["blocks"] - said["bfree"]) * unit,
        said["bavail"] * unit,
        said["files"],
        said["files"] - said["ffree"],
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    made = make_images(tmp_path_factory.mktemp("matrix"))
    return {image.path.name: image for image in made}


@pytest.fixture(scope="module")
def reference(
    images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Walk, Usage]]]:
    """What the appliance says of every image, from one launch."""
    work = tmp_path_factory.mktemp("reference")
    read = [image for image in images.values() if image.refused is None]

    def add(handle: Any) -> None:
        for image in read:
            handle.add_drive_opts(str(image.path), format="raw", readonly=True)

    with launch_appliance(add, notice=print) as g:
        said: dict[str, tuple[Walk, Usage]] = {}
        for image, device in zip(read, g.list_devices(), strict=True):
            assert g.vfs_type(device) == image.type
            g.mount_ro(device, "/")
            said[image.path.name] = appliance_walk(g, work), _usage(g.statvfs("/"))
            g.umount_all()
        yield said


def test_every_name_attribute_and_byte_is_the_appliances(images, reference):
    differences: list[str] = []
    for name, (walk, _) in reference.items():
        image = images[name]
        ours = direct_walk(READERS[image.type].open(FileSource(image.path)))
        assert len(walk) > 4 or name in ("ntfs-empty", "exfat-empty")
        if image.type == "exfat":
            _without_time_of_the_root(ours)
            walk = _without_time_of_the_root(dict(walk))
        for path in sorted(ours.keys() | walk.keys()):
            if ours.get(path) != walk.get(path):
                differences.append(f"{name} {path!r}: {ours.get(path)} not {walk.get(path)}")
    assert not differences, "\n".join(differences[:40])
    assert len(reference) >= 20


_MTIME = 4


def _without_time_of_the_root(walk: Walk) -> Walk:
    """The root directory of exFAT has none on disk: it is the time of the mount or the opening."""
    said = walk[b"/"]
    walk[b"/"] = (*said[:_MTIME], None, *said[_MTIME + 1 :])
    return walk


def test_the_root_of_exfat_dates_from_its_opening(images, reference):
    before = time.time_ns()
    node = ExfatFilesystem.open(FileSource(images["exfat"].path)).stat(ExfatFilesystem.root)
    assert before - 10**7 <= node.mtime_ns <= time.time_ns()
    assert node.mtime_ns % 10**7 == 0
    said = reference["exfat"][0][b"/"][_MTIME]
    assert said % 10**7 == 0
    assert images["exfat"].path.stat().st_mtime_ns < said < time.time_ns() + 5 * 10**9


def test_exfat_file_not_written_to_its_end_is_unsupported(images, tmp_path):
    image = tmp_path / "image"
    shutil.copyfile(images["exfat"].path, image)
    part_written(image)
    found = ExfatFilesystem.open(FileSource(image))
    with pytest.raises(Unsupported, match="not written to its end"):
        found.stat(found.lookup(found.root, b"lower.txt"))
    assert found.stat(found.lookup(found.root, b"UPPER.TXT")).size == 9


def test_fat_names_are_found_by_alias_and_with_dots(images, reference):
    found = FatFilesystem.open(FileSource(images["fat16"].path))
    many = found.lookup(found.root, b"many")
    first = next(name for name, _ in found.names(many))
    tree, walk = Tree(found), reference["fat16"][0]
    for path, alias in (
        (b"/many/" + first, b"/MANY/filewi~1.tex"),
        (b"/UPPER.TXT", b"/Upper.Txt.."),
    ):
        entry = tree.lstat(alias)
        content = b"".join(pieces(found, entry, 0, entry.node.size))
        assert hashlib.sha256(content).hexdigest() == walk[path][-1]


def test_names_of_exfat_are_looked_up_by_the_volumes_own_table(images):
    found = ExfatFilesystem.open(FileSource(images["exfat"].path))
    fish = found.lookup(found.root, "\U0001f41f \U0001f427...".encode())
    names = dict(found.names(fish))
    (name,) = names
    assert name.decode() == "éÉıß фЖ.txt"
    assert found.lookup(fish, "Éé\u0131ß ФЖ.TXT".encode()) == names[name]


def test_space_is_the_appliances(images, reference):
    for name, (_, usage) in reference.items():
        image = images[name]
        assert READERS[image.type].open(FileSource(image.path)).usage() == usage, name


def test_what_was_never_compared_is_left_to_the_appliance(images):
    refused = [image for image in images.values() if image.refused]
    assert refused
    for image in refused:
        with pytest.raises(Unsupported, match=image.refused):
            READERS[image.type].open(FileSource(image.path))
