"""Small images of every filesystem that the kernel here mounts, on every table, in every format."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mount.host import run

MIB = 1 << 20
FILESYSTEMS = ("ext4", "xfs", "btrfs")
TABLES = ("gpt", "logical", "whole")
FORMATS = ("raw", "qcow2", "chain")
_SIZES = {"ext4": 32, "xfs": 48, "btrfs": 64}
_START = 3 * MIB  # of the partition
_SECTOR = 512
# mkfs.xfs makes a filesystem below 300 MB only for its own test suite.
_SMALL_XFS = {"TEST_DIR": "/", "TEST_DEV": "none", "QA_CHECK_FS": "1"}


@dataclass(frozen=True)
class Image:
    """An image with one filesystem.

    `files` are all those of its chain, active first; `partition` is None without a table; `offset`
    and `size` are the filesystem's, in bytes.
    """

    path: Path
    filesystem: str
    table: str
    format: str
    files: tuple[Path, ...]
    partition: int | None
    offset: int
    size: int

    @property
    def device(self) -> str:
        """The filesystem's device in the guest."""
        return f"/dev/sda{self.partition or ''}"

    @property
    def chosen(self) -> tuple[str, ...]:
        """The options of `mount` that name the filesystem, so that nothing has to be looked for."""
        return ("-p", str(self.partition)) if self.partition else ("-m", self.device)


def plant(folder: Path) -> None:
    """A tree with what a copy, or a wrong mount option, would get wrong."""
    noise = random.Random(11)
    top = os.fsencode(folder)
    for name in (b"new\nline", b"\xff\xfe not UTF-8", b"n" * 255, "żółw".encode(), b" ", b"-rf"):
        with open(os.path.join(top, name), "wb") as file:
            file.write(name * 3)
    deep = folder / "one" / "two" / "three"
    deep.mkdir(parents=True)
    (deep / "deep").write_bytes(b"down here\n")
    (folder / "noise").write_bytes(noise.randbytes(5 * MIB))
    with (folder / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"island")
        file.truncate(20 * MIB)
    (folder / "empty").write_bytes(b"")
    (folder / "absolute").symlink_to("/etc/passwd")
    (folder / "relative").symlink_to("one/two/three/deep")
    (folder / "out").symlink_to("../../../../etc")
    os.symlink(b"\xfe\n", os.path.join(top, b"odd link"))
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "null", 0o020666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("socket")
    program = folder / "program"
    program.write_bytes(b"#!/bin/sh\necho run\n")
    program.chmod(0o4755)
    (folder / "secret").write_bytes(b"theirs\n")
    (folder / "secret").chmod(0o600)
    os.chown(folder / "secret", 4321, 8765)
    os.utime(folder / "empty", ns=(10**18 + 1, 10**18 + 1))


@contextlib.contextmanager
def attached(image: Path, *options: object) -> Iterator[str]:
    """A loop device over the image, by losetup."""
    device = run("losetup", "--find", "--show", *options, image).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(image: Path, options: str = "rw") -> Iterator[Path]:
    """The filesystem in an image, mounted by mount(8), to be filled or looked at."""
    place = image.with_name(image.name + ".mounted")
    place.mkdir()
    try:
        with attached(image) as device:
            run("mount", "-o", options, device, place)
            try:
                yield place
            finally:
                run("umount", place)
    finally:
        place.rmdir()


def blank(path: Path, size: int) -> Path:
    """A file of zeros that takes no space."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make_filesystem(
    path: Path, kind: str, fill: Callable[[Path], None] | None, *, size: int = 0, uuid: str = ""
) -> Path:
    """A filesystem of `size` bytes that `fill` fills; ext4 without a mount, the others with one."""
    blank(path, size or _SIZES[kind] * MIB)
    if kind == "ext4":
        contents = path.with_name(path.name + ".contents")
        contents.mkdir()
        if fill is not None:
            fill(contents)
        named = ("-U", uuid) if uuid else ()
        run("mke2fs", "-q", "-F", "-t", "ext4", *named, "-d", contents, path)
        shutil.rmtree(contents)
        return path
    if kind == "xfs":
        named = ("-m", f"uuid={uuid}") if uuid else ()
        run("mkfs.xfs", "-q", "-f", *named, path, env=_SMALL_XFS)
    else:
        named = ("-U", uuid) if uuid else ()
        run("mkfs.btrfs", "-q", "--mixed", *named, path)
    if fill is not None:
        with mounted(path) as place:
            fill(place)
    return path


def with_subvolume(folder: Path) -> None:
    """The tree, and a subvolume with a file in it."""
    plant(folder)
    run("btrfs", "-q", "subvolume", "create", folder / "inner")
    (folder / "inner" / "inside").write_bytes(b"in the subvolume\n")


def put(source: Path, disk: Path, offset: int) -> None:
    """Copy a filesystem into a disk; holes stay holes."""
    run(
        *("dd", f"if={source}", f"of={disk}", f"seek={offset}", "oflag=seek_bytes", "bs=1M"),
        *("conv=notrunc,sparse", "status=none"),
    )


def divide(disk: Path, lines: Sequence[str], *, sector: int = 0) -> None:
    """Write a partition table, as sfdisk(8) is told; with sectors of `sector` bytes if given."""
    words = ("--quiet", "--no-reread", "--no-tell-kernel", "--wipe=never")
    text = "\n".join((*lines, "")).encode()
    if not sector:
        run("sfdisk", *words, disk, input=text)
        return
    with attached(disk, "--sector-size", sector) as device:
        run("sfdisk", *words, device, input=text)


def on_disk(path: Path, filesystem: Path, table: str) -> tuple[Path, int | None, int]:
    """A raw disk with the filesystem on it: its path, the partition's number and offset."""
    size = filesystem.stat().st_size
    if table == "whole":
        shutil.copyfile(filesystem, path)
        return path, None, 0
    blank(path, size + 8 * MIB)
    start, sectors = _START // _SECTOR, size // _SECTOR
    if table == "gpt":
        divide(path, ["label: gpt", "start=2048,size=2048", f"start={start},size={sectors}"])
        number = 2
    else:
        outer = start - 2048
        lines = [f"1 : start={outer},size={sectors + 4096},type=5"]
        divide(path, ["label: dos", *lines, f"5 : start={start},size={sectors},type=83"])
        number = 5
    put(filesystem, path, _START)
    return path, number, _START


def to_qcow2(raw: Path, path: Path) -> Path:
    """The same disk as qcow2."""
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def overlay(path: Path, base: Path, format: str = "qcow2") -> Path:
    """A new, empty overlay."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", base.name, path)
    return path


def _chain(raw: Path, path: Path) -> tuple[Path, ...]:
    """The disk as a base with garbage in its second half, an overlay that puts it right, and an
    empty overlay: read without its overlay, it is wrong."""
    wrong = path.with_name("wrong.raw")
    shutil.copyfile(raw, wrong)
    half = raw.stat().st_size // 2
    with wrong.open("r+b") as file:
        file.seek(half)
        for _ in range(half // MIB):
            file.write(b"\xaa" * MIB)
    base = to_qcow2(wrong, path.with_name("base.qcow2"))
    wrong.unlink()
    middle = path.with_name("middle.qcow2")
    run(
        *("qemu-img", "convert", "-f", "raw", "-O", "qcow2"),
        *("-B", base.name, "-F", "qcow2", raw.name, middle.name),
        folder=path.parent,
    )
    return overlay(path, middle), middle, base


class Images:
    """All combinations, each made when it is asked for first, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._filesystems: dict[str, Path] = {}
        self._made: dict[tuple[str, str, str], Image] = {}

    def filesystem(self, kind: str) -> Path:
        """The filesystem alone."""
        if kind not in self._filesystems:
            fill = with_subvolume if kind == "btrfs" else plant
            self._filesystems[kind] = make_filesystem(self._folder / f"{kind}.fs", kind, fill)
        return self._filesystems[kind]

    def get(self, filesystem: str, table: str = "gpt", format: str = "raw") -> Image:
        """An image that tests share, and so leave as it is."""
        key = (filesystem, table, format)
        if key not in self._made:
            folder = self._folder / "-".join(key)
            folder.mkdir()
            raw, number, offset = on_disk(folder / "disk.raw", self.filesystem(filesystem), table)
            files: tuple[Path, ...] = (raw,)
            if format == "qcow2":
                files = (to_qcow2(raw, folder / "disk.qcow2"),)
            elif format == "chain":
                files = _chain(raw, folder / "active.qcow2")
            if format != "raw":
                raw.unlink()
            size = self.filesystem(filesystem).stat().st_size
            self._made[key] = Image(
                files[0], filesystem, table, format, files, number, offset, size
            )
        return self._made[key]

    def copy(self, image: Image, folder: Path) -> Image:
        """The same image in another folder, to be written to."""
        files = tuple(Path(shutil.copy2(file, folder)) for file in image.files)
        return Image(
            files[0],
            image.filesystem,
            image.table,
            image.format,
            files,
            image.partition,
            image.offset,
            image.size,
        )
