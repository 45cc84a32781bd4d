"""The direct reader of ext2, ext3 and ext4 says what the kernel says, or refuses."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import NeedsReplay, Node, ReadFailed
from imgtool.engines.direct.worker.fs.ext.reader import ExtFilesystem
from tests.differential import matrix_ext, matrix_xattrs

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(),
    reason="needs root and loop devices: the kernel's own mount is the reference",
)

Seen = dict[bytes, tuple[object, ...]]


class FileSource:
    """An image file as a volume."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise ReadFailed("past the end")
        return os.pread(self._file.fileno(), length, offset)

    def close(self) -> None:
        self._file.close()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each image's outcome: equal, refused, or the first differences."""
    outcomes = {}
    for name, image in matrix_ext.images(tmp_path_factory.mktemp("ext")):
        outcomes[name] = _compare(image)
        image.unlink()
    return outcomes


def test_every_walk_equals_the_kernels_or_is_refused(compared: dict[str, str]) -> None:
    wrong = {
        name: outcome
        for name, outcome in compared.items()
        if outcome.partition(":")[0] != ("refused" if name in matrix_ext.REFUSED else "equal")
    }
    assert wrong == {}
    assert len(compared) >= 25


def test_a_journal_to_replay_is_told_from_other_refusals(compared: dict[str, str]) -> None:
    assert compared["journal-to-replay"] == "refused: journal"


def _compare(image: Path) -> str:
    source = FileSource(image)
    try:
        filesystem = ExtFilesystem.open(source)
        ours = _direct_walk(filesystem)
        usage = filesystem.usage()
    except NeedsReplay:
        return "refused: journal"
    except Unsupported as refusal:
        return "refused" if str(refusal) else "refused without a reason"
    finally:
        source.close()
    with _mounted(image) as root:
        theirs = _kernel_walk(root)
        numbers = os.statvfs(root)
    differences = [
        f"{name!r}: {ours.get(name)} is not {theirs.get(name)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    expected = (
        numbers.f_blocks * numbers.f_frsize,
        (numbers.f_blocks - numbers.f_bfree) * numbers.f_frsize,
        numbers.f_bavail * numbers.f_frsize,
        numbers.f_files,
        numbers.f_files - numbers.f_ffree,
    )
    if tuple(usage) != expected:
        differences.append(f"statvfs: {tuple(usage)} is not {expected}")
    return "; ".join(differences[:5]) or "equal"


@contextmanager
def _mounted(image: Path) -> Iterator[bytes]:
    mountpoint = image.with_suffix(".ro")
    mountpoint.mkdir()
    subprocess.run(["mount", "-o", "loop,ro", image, mountpoint], check=True)
    try:
        yield os.fsencode(mountpoint)
    finally:
        subprocess.run(["umount", mountpoint], check=True)
        mountpoint.rmdir()


def _direct_walk(filesystem: ExtFilesystem) -> Seen:
    seen: Seen = {b"": _of_node(filesystem, filesystem.stat(filesystem.root))}
    waiting = [(b"", filesystem.root)]
    while waiting:
        path, folder = waiting.pop()
        for name, inode in filesystem.names(folder):
            node = filesystem.stat(inode)
            child = path + b"/" + name
            assert child not in seen
            seen[child] = _of_node(filesystem, node)
            if stat.S_ISDIR(node.mode):
                waiting.append((child, inode))
    return seen


def _of_node(filesystem: ExtFilesystem, node: Node) -> tuple[object, ...]:
    extra: object = None
    if stat.S_ISREG(node.mode):
        # Data ranges alone, holes as known zeros: so a range that is missing changes the checksum.
        whole, digest = hashlib.sha256(), hashlib.sha256()
        position = 0
        for start, length in filesystem.ranges(node.inode):
            _zeros(digest, start - position)
            digest.update(filesystem.read(node.inode, start, length))
            position = start + length
            assert position <= node.size
        _zeros(digest, node.size - position)
        if node.size < 50_000_000:
            step = 77_777
            for start in range(0, node.size, step):
                whole.update(filesystem.read(node.inode, start, step))
            assert whole.digest() == digest.digest()
        extra = digest.hexdigest()
    elif stat.S_ISLNK(node.mode):
        extra = filesystem.target(node.inode)
    return (*node, filesystem.xattrs(node.inode), extra)


def _kernel_walk(root: bytes) -> Seen:
    seen: Seen = {}
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        status = os.lstat(root + path)
        extra: object = None
        if stat.S_ISDIR(status.st_mode):
            waiting += [path + b"/" + name for name in os.listdir(root + path)]
        elif stat.S_ISREG(status.st_mode):
            extra = _checksum(root + path)
        elif stat.S_ISLNK(status.st_mode):
            extra = os.readlink(root + path)
        seen[path] = (
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_size,
            status.st_mtime_ns,
            status.st_blocks,
            status.st_nlink,
            status.st_rdev,
            matrix_xattrs.of_kernel(root + path),
            extra,
        )
    return seen


def _checksum(path: bytes) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                start = size
            _zeros(digest, start - position)
            if start >= size:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            digest.update(os.pread(file.fileno(), position - start, start))
    return digest.hexdigest()


def _zeros(digest: hashlib._Hash, count: int) -> None:
    """Long holes count by their length: a sparse file is not hashed for minutes."""
    if count > 50_000_000:
        digest.update(b"hole %d" % count)
        return
    digest.update(bytes(count))
