"""A matrix of small ext images: one for each feature that changes how they are read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.differential import matrix_xattrs

Fill = Callable[[Path], None]

# Images that the direct reader must refuse, by name.
REFUSED = {
    "bigalloc",
    "encrypt",
    "casefold",
    "verity",
    "inline-data",
    "journal-to-replay",
    "not-clean",
    "blocks-64k",
    "mmp-in-use",
}


def _revision_0() -> list[str]:
    """The oldest kind of superblock, as the mke2fs that is here takes it."""
    said = subprocess.run(["mke2fs", "-V"], capture_output=True, text=True, check=True).stderr
    version = tuple(int(word) for word in said.split()[1].split("."))
    return ["-r", "0"] if version < (1, 47, 1) else ["-E", "revision=0"]


# name: arguments of mke2fs, without the size.
_VARIANTS: dict[str, list[str]] = {
    "ext2-1k": ["-t", "ext2", "-b", "1024"],
    "ext2-2k": ["-t", "ext2", "-b", "2048"],
    "ext2-4k": ["-t", "ext2", "-b", "4096"],
    "ext2-rev0": ["-t", "ext2", "-b", "1024", *_revision_0()],
    "ext2-inode128": ["-t", "ext2", "-I", "128"],
    "ext3-1k": ["-t", "ext3", "-b", "1024"],
    "ext3-4k": ["-t", "ext3", "-b", "4096"],
    "ext3-inode128": ["-t", "ext3", "-I", "128"],
    "ext4-1k": ["-t", "ext4", "-b", "1024"],
    "ext4-2k": ["-t", "ext4", "-b", "2048"],
    "ext4-4k": ["-t", "ext4", "-b", "4096"],
    "ext4-inode128": ["-t", "ext4", "-I", "128"],
    "ext4-inode512": ["-t", "ext4", "-I", "512"],
    "ext4-32bit": ["-t", "ext4", "-O", "^64bit"],
    "no-checksums": ["-t", "ext4", "-O", "^metadata_csum"],
    "uninit-bg": ["-t", "ext4", "-O", "^metadata_csum,uninit_bg"],
    "uninit-bg-32bit": ["-t", "ext4", "-O", "^metadata_csum,^64bit,uninit_bg", "-b", "1024"],
    "checksum-seed": ["-t", "ext4", "-O", "metadata_csum_seed"],
    "meta-bg": ["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"],
    "meta-bg-many": ["-t", "ext4", "-b", "1024", "-g", "256", "-O", "meta_bg,^resize_inode"],
    "extents-off": ["-t", "ext4", "-O", "^extents,^64bit"],
    "flex-bg-off": ["-t", "ext4", "-b", "1024", "-O", "^flex_bg"],
    "sparse-super2": ["-t", "ext4", "-b", "1024", "-O", "sparse_super2,^resize_inode"],
    "every-group-backup": ["-t", "ext4", "-b", "1024", "-O", "^sparse_super,^resize_inode"],
    "no-dir-index": ["-t", "ext4", "-O", "^dir_index"],
    "no-filetype": ["-t", "ext4", "-O", "^filetype"],
    "no-journal": ["-t", "ext4", "-O", "^has_journal"],
    "no-huge-file": ["-t", "ext4", "-O", "^huge_file"],
    "no-resize-inode": ["-t", "ext4", "-O", "^resize_inode"],
    "reserved-none": ["-t", "ext4", "-m", "0"],
    "reserved-much": ["-t", "ext4", "-m", "40"],
    "orphan-file": ["-t", "ext4", "-O", "orphan_file"],
    "fast-commit": ["-t", "ext4", "-O", "fast_commit"],
    "stable-inodes": ["-t", "ext4", "-O", "stable_inodes"],
    "ea-inode": ["-t", "ext4", "-O", "ea_inode"],
    "large-dir": ["-t", "ext4", "-O", "large_dir"],
    "mmp": ["-t", "ext4", "-O", "mmp"],
    "bigalloc": ["-t", "ext4", "-O", "bigalloc"],
    "encrypt": ["-t", "ext4", "-O", "encrypt"],
    "casefold": ["-t", "ext4", "-O", "casefold"],
    "verity": ["-t", "ext4", "-O", "verity"],
    "inline-data": ["-t", "ext4", "-O", "inline_data"],
}


def images(folder: Path) -> Iterator[tuple[str, Path]]:
    """Build the images one by one; needs root and loop devices, as the kernel fills them."""
    for name, arguments in _VARIANTS.items():
        image = folder / f"{name}.img"
        _make(image, "32M", arguments)
        _fill(image, _contents)
        yield name, image

    # Filled first: a kernel may read quotas but not keep them.
    for name, features in (("quota", "quota"), ("project", "quota,project")):
        image = folder / f"{name}.img"
        _make(image, "32M", ["-t", "ext4", "-I", "256"])
        _fill(image, _contents)
        _run("tune2fs", "-O", features, image)
        yield name, image

    for name, block in (("htree-4k", "4096"), ("htree-1k", "1024")):
        image = folder / f"{name}.img"
        _make(image, "128M", ["-t", "ext4", "-b", block, "-N", "60000"])
        _fill(image, _many_names)
        yield name, image

    image = folder / "resized.img"
    _make(image, "16M", ["-t", "ext4", "-b", "1024"])
    _fill(image, _contents)
    os.truncate(image, 80 << 20)
    _run("resize2fs", "-f", image)
    yield "resized", image

    image = folder / "fragmented.img"
    _make(image, "64M", ["-t", "ext4", "-b", "1024"])
    _fill(image, _fragments)
    yield "fragmented", image

    image = folder / "fragmented-ext3.img"
    _make(image, "64M", ["-t", "ext3", "-b", "1024"])
    _fill(image, _fragments)
    yield "fragmented-ext3", image

    image = folder / "blocks-64k.img"
    _make(image, "64M", ["-t", "ext4", "-b", "65536", "-F"])
    yield "blocks-64k", image

    image = folder / "journal-to-replay.img"
    _make(image, "32M", ["-t", "ext4"])
    _run("debugfs", "-w", "-R", "feature needs_recovery", image)
    yield "journal-to-replay", image

    image = folder / "not-clean.img"
    _make(image, "32M", ["-t", "ext2"])
    _run("debugfs", "-w", "-R", "set_super_value state 0", image)
    yield "not-clean", image

    image = folder / "mmp-in-use.img"
    _make(image, "32M", ["-t", "ext4", "-b", "4096", "-O", "mmp"])
    with open(image, "r+b") as file:
        file.seek(1024 + 0x168)
        mmp = int.from_bytes(file.read(8), "little")
        file.seek(mmp * 4096 + 4)
        file.write((17).to_bytes(4, "little"))
    yield "mmp-in-use", image


def _make(image: Path, size: str, arguments: list[str]) -> None:
    _run("mke2fs", "-q", "-F", *arguments, image, size)


def _fill(image: Path, fill: Fill) -> None:
    mountpoint = image.with_suffix(".mnt")
    mountpoint.mkdir()
    mounted = subprocess.run(
        ["mount", "-o", "loop", image, mountpoint], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        try:
            fill(mountpoint)
        finally:
            _run("umount", mountpoint)
    elif image.stem not in REFUSED:
        raise RuntimeError(f"this kernel does not mount {image.stem}: {mounted.stderr!r}")
    mountpoint.rmdir()


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _contents(root: Path) -> None:
    place = os.fsencode(root)
    for name in (b"plain", b"not utf-8 \xff\xfe", b"new\nline", b"n" * 255, "Zoë".encode()):
        with open(place + b"/" + name, "wb") as file:
            file.write(name * 50)
    folder = root / "folder" / "deeper"
    folder.mkdir(parents=True)
    (folder / "empty").touch()
    (root / "fast").symlink_to("t" * 59)
    (root / "slow").symlink_to("t" * 60)
    (root / "slowest").symlink_to("t" * 1000)
    os.symlink(b"bad \xff", place + b"/link")
    os.link(root / "plain", root / "second")
    for mode, device, major, minor in (
        (0o020600, "char-old", 1, 3),
        (0o060660, "block-new", 259, 70000),
        (0o020644, "char-new", 4000, 5),
    ):
        os.mknod(root / device, mode, os.makedev(major, minor))
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", 0o140755)
    (root / "owned").touch()
    os.chown(root / "owned", 4_000_000_000, 3_000_000_000)
    os.chmod(root / "owned", 0o7751)
    for year, seconds in (
        ("y1901", -(2**31)),
        ("y1969", -1),
        ("y2037", 2**31 - 1),
        ("y2100", 4_102_444_800),
        ("y2446", 15_000_000_000),
    ):
        (root / year).touch()
        os.utime(root / year, ns=(0, seconds * 10**9 + 123_456_789))
    with open(root / "sparse", "wb") as file:
        file.write(b"head")
        file.seek(700_001)
        file.write(b"tail")
        file.truncate(900_000)
    _far(root / "far")
    _unwritten(root / "unwritten")
    for number in range(300):
        (folder / f"file {number}").write_bytes(b"%d" % number * number)
    for number in range(0, 300, 3):
        (folder / f"file {number}").unlink()
    os.truncate(root / "plain", 100)
    (root / "big").write_bytes(bytes(range(256)) * 8000)
    (root / "attributes").mkdir()
    matrix_xattrs.fill(root / "attributes")
    try:
        for number in range(20):
            os.setxattr(root / "big", f"user.a{number}", b"v" * 40)
        os.setxattr(root / "fast", "trusted.a", b"v" * 300, follow_symlinks=False)
    except OSError:
        return  # the inodes and the one block have no room for more


def _far(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"start")
        for position in (20_000_000, 300_000_000, 5_000_000_000):
            try:
                file.seek(position)
                file.write(b"at %d" % position)
            except OSError:
                return  # beyond what block maps of small blocks reach


def _unwritten(path: Path) -> None:
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 300_000)
        except OSError:
            return
        file.seek(100_000)
        file.write(b"written")
    beyond = ["fallocate", "-n", "-o", "300000", "-l", "100000", str(path)]
    subprocess.run(beyond, check=False, capture_output=True)  # block maps cannot


def _many_names(root: Path) -> None:
    folder = root / "many"
    folder.mkdir()
    for number in range(50_000):
        os.mknod(folder / f"a name that is rather long {number}")
    for number in range(0, 50_000, 7):
        os.unlink(folder / f"a name that is rather long {number}")


def _fragments(root: Path) -> None:
    with open(root / "holes", "wb") as file:
        for number in range(4000):
            file.seek(number * 3000)
            file.write(b"%d" % number)
    with ExitStack() as stack:
        files = [
            stack.enter_context(open(root / f"interleaved {number}", "wb")) for number in range(3)
        ]
        for turn in range(400):
            for file in files:
                file.write(b"%d" % turn * 500)
                file.flush()
                if turn % 20 == 0:
                    os.fdatasync(file.fileno())
