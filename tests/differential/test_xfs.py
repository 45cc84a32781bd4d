"""The XFS reader gives what the host's kernel gives of the same image, or refuses it."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Node, ReadFailed
from imgtool.engines.direct.worker.fs.xfs.reader import XfsFilesystem
from tests.differential import matrix_xattrs, matrix_xfs

_STEP = 3 << 20


class FileSource:
    """An image file as a volume."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length:
            raise ReadFailed("past the end")
        return data

    def close(self) -> None:
        self._file.close()


@pytest.fixture(autouse=True)
def _loop_mounts() -> None:
    if os.geteuid():
        pytest.skip("needs root: the kernel's own mount is the reference")
    subprocess.run(["modprobe", "--quiet", "xfs"], check=False)
    if "\txfs\n" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no XFS: its own mount is the reference")


def _kernel_data(path: bytes, size: int) -> list[tuple[int, int]]:
    found = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while at < size:
            try:
                begin = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(descriptor, begin, os.SEEK_HOLE)
            found.append((begin, at - begin))
    finally:
        os.close(descriptor)
    return found


def _kernel_node(status: os.stat_result) -> Node:
    return Node(
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_size,
        status.st_mtime_ns,
        status.st_blocks,
        status.st_nlink,
        status.st_rdev,
    )


def _kernel_digest(path: bytes, ranges: list[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for begin, length in ranges:
            for at in range(begin, begin + length, _STEP):
                step = min(_STEP, begin + length - at)
                digest.update(os.pread(file.fileno(), step, at))
    return digest.hexdigest()


def _our_digest(xfs: XfsFilesystem, inode: int, ranges: list[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    for begin, length in ranges:
        for at in range(begin, begin + length, _STEP):
            digest.update(xfs.read(inode, at, min(_STEP, begin + length - at)))
    return digest.hexdigest()


def _differences(xfs: XfsFilesystem, inode: int, path: bytes) -> Iterator[str]:
    """What differs below a directory; one line each."""
    ours = dict(xfs.names(inode))
    theirs = {entry.name: entry.inode() for entry in os.scandir(path)}
    if ours != theirs:
        yield f"{path!r}: names {set(ours.items()) ^ set(theirs.items())}"
    for name, child in ours.items():
        if name not in theirs:
            continue
        below = os.path.join(path, name)
        status = os.lstat(below)
        if xfs.xattrs(child) != (kernel := matrix_xattrs.of_kernel(below)):
            found = {name for name, _ in {*xfs.xattrs(child)} ^ {*kernel}}
            yield f"{below!r}: attributes {sorted(found)[:5]}"
        if xfs.stat(child) != _kernel_node(status):
            yield f"{below!r}: {xfs.stat(child)} instead of {_kernel_node(status)}"
        elif stat.S_ISLNK(status.st_mode):
            if xfs.target(child) != os.readlink(below):
                yield f"{below!r}: target {xfs.target(child)!r}"
        elif stat.S_ISDIR(status.st_mode):
            yield from _differences(xfs, child, below)
        elif stat.S_ISREG(status.st_mode):
            yield from _differences_in_content(xfs, child, below, status.st_size)


def _differences_in_content(
    xfs: XfsFilesystem, inode: int, path: bytes, size: int
) -> Iterator[str]:
    # The kernel is asked before anything is read: pages in its cache count as data.
    theirs = _kernel_data(path, size)
    if list(xfs.ranges(inode)) != theirs:
        yield f"{path!r}: data at {xfs.ranges(inode)} instead of {theirs}"
    # All of it where it is small: what is no data must read as zeros.
    compared = [(0, size)] if size < 64 << 20 else [(0, 8 << 20), *theirs, (size - 4096, 9999)]
    if _our_digest(xfs, inode, compared) != _kernel_digest(path, compared):
        yield f"{path!r}: content"
    for begin, length in ((1, 5000), (size // 2 + 3, 70_001), (size - 1, 10), (size, 10)):
        if xfs.read(inode, max(begin, 0), length) != _kernel_read(path, max(begin, 0), length):
            yield f"{path!r}: content at {begin}"


def _kernel_read(path: bytes, offset: int, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def compare(image: Path) -> list[str]:
    """Every difference between the reader and a read-only mount of the host."""
    source = FileSource(image)
    try:
        xfs = XfsFilesystem.open(source)
        usage = xfs.usage()
        with matrix_xfs.mounted(image, "ro") as folder:
            numbers = os.statvfs(folder)
            size = numbers.f_blocks * numbers.f_frsize
            theirs = (
                size,
                size - numbers.f_bfree * numbers.f_frsize,
                numbers.f_bavail * numbers.f_frsize,
                numbers.f_files,
                numbers.f_files - numbers.f_ffree,
            )
            found = [] if theirs == usage else [f"{usage} instead of {theirs}"]
            if xfs.stat(xfs.root) != _kernel_node(os.lstat(folder)):
                found.append(f"root: {xfs.stat(xfs.root)}")
            return [*found, *_differences(xfs, xfs.root, os.fsencode(folder))]
    finally:
        source.close()


def test_every_image_of_the_matrix_reads_as_the_kernel_reads_it(tmp_path: Path) -> None:
    read, differences = [], []
    for name, image in matrix_xfs.build(tmp_path):
        differences += [f"{name}: {each}" for each in compare(image)]
        read.append(name)
        image.unlink()
    assert differences == []
    assert len(read) >= 30


def _planted_differences(image: Path, tree: dict[str, matrix_xfs.Planted]) -> Iterator[str]:
    source = FileSource(image)
    xfs = XfsFilesystem.open(source)
    found: dict[str, int] = {}
    block_size = int.from_bytes(source.read(4, 4), "big")

    def walk(inode: int, prefix: str) -> None:
        for name, child in xfs.names(inode):
            found[prefix + name.decode()] = child
            if stat.S_ISDIR(xfs.stat(child).mode):
                walk(child, prefix + name.decode() + "/")

    walk(xfs.root, "")
    if found.keys() != tree.keys():
        yield f"names {sorted(found.keys() ^ tree.keys())[:5]}"
    # xfs_db takes milliseconds an inode: one in fifty of the thousands that are alike.
    asked = [
        path for index, path in enumerate(found) if not path.startswith("many/") or index % 50 == 0
    ]
    inodes = [found[path] for path in asked]
    fields = ["nlinkv2", "size", "nblocks", "mtime.nsec"]
    database = matrix_xfs.database_fields(image, inodes, fields)
    said = dict(zip(asked, database, strict=True))
    for path, inode in found.items():
        node, planted = xfs.stat(inode), tree[path]
        if node[1:4] != planted[:3] or node.rdev != planted.rdev:
            yield f"{path}: {node} instead of {planted[:4]}"
        ours = [node.nlink, node.size, node.blocks * 512 // block_size, node.mtime_ns % 10**9]
        if ours != said.get(path, ours):
            yield f"{path}: {ours} instead of {said[path]}"
        if abs(node.mtime_ns / 1e9 - os.stat(image).st_mtime) > 60:
            yield f"{path}: time {node.mtime_ns}"
        data = planted.data
        if stat.S_ISLNK(node.mode) and xfs.target(inode) != data:
            yield f"{path}: target"
        if stat.S_ISREG(node.mode):
            whole = [(0, len(data))] if data else []
            if xfs.read(inode, 0, 1 << 30) != data or list(xfs.ranges(inode)) != whole:
                yield f"{path}: content"
    source.close()


def test_version_4_reads_as_it_was_planted_and_as_xfs_db_says(tmp_path: Path) -> None:
    # The hosts' kernels have long been built without version 4: libxfs is the reference here.
    differences, read = [], []
    tree = matrix_xfs.plant()
    for name, options in matrix_xfs.V4_OPTIONS.items():
        image = matrix_xfs.make_v4(tmp_path / f"{name}.img", tree, *options)
        differences += [f"{name}: {each}" for each in _planted_differences(image, tree)]
        read.append(name)
        image.unlink()
    assert differences == []
    assert len(read) == 10


def test_what_was_not_tried_or_not_unmounted_is_refused(tmp_path: Path) -> None:
    accepted, refused = [], []
    for name, image in matrix_xfs.build_refused(tmp_path):
        source = FileSource(image)
        try:
            XfsFilesystem.open(source)
            accepted.append(name)
        except Unsupported as refusal:
            refused.append((name, str(refusal)))
        finally:
            source.close()
            image.unlink()
    assert accepted == []
    assert len(refused) == 6
