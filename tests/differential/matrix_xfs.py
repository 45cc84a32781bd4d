"""A matrix of small XFS images, made with mkfs.xfs and filled through loop mounts of the host."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.differential import matrix_xattrs

Fill = Callable[[Path], None]


@contextlib.contextmanager
def mounted(image: Path, *options: str) -> Iterator[Path]:
    """The image's filesystem on the host, for as long as the block runs."""
    folder = image.with_name(image.name + ".mounted")
    folder.mkdir()
    try:
        run("mount", "-t", "xfs", "-o", ",".join(("loop", *options)), str(image), str(folder))
        try:
            yield folder
        finally:
            run("umount", str(folder))
    finally:
        folder.rmdir()


def run(*command: str) -> None:
    """Run a program; its messages are the error's."""
    # mkfs.xfs makes a filesystem below 300 MB, or with a short log, only for its own test suite.
    environment = os.environ | {"TEST_DIR": "/", "TEST_DEV": "none", "QA_CHECK_FS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip().splitlines()[:1]}")


def mkfs(path: Path, *options: str) -> None:
    """A new filesystem in a file that has its size already."""
    run("mkfs.xfs", "-q", "-f", *options, str(path))


def make(
    path: Path, fill: Fill | None, *options: str, mount: str = "rw", size: str = "320M"
) -> Path:
    """One image: made with `options`, filled by `fill`, unmounted."""
    run("truncate", "-s", size, str(path))
    mkfs(path, *options)
    if fill is not None:
        with mounted(path, *mount.split(",")) as folder:
            fill(folder)
    return path


def everything(folder: Path) -> None:
    """A bit of all there is, small enough for every combination of features."""
    for part in (names, nodes, times, contents, attributes, short_lived, links):
        below = folder / part.__name__
        below.mkdir()
        part(below)


def names(folder: Path) -> None:
    """Names of every length, and what no one calls a file."""
    root = os.fsencode(folder)
    odd = [b"\xff\xfe", b"new\nline", b"caf\xe9", "caf\u00e9".encode(), b" ", b"-rf", b"\x1b[31m"]
    for name in [*odd, *(b"n" * length for length in range(1, 256))]:
        with open(os.path.join(root, name), "wb") as file:
            file.write(name)
    few = os.path.join(root, b"few")
    os.mkdir(few)
    for name in odd:
        os.mkdir(os.path.join(few, name))


def nodes(folder: Path) -> None:
    """Devices, pipes, sockets, owners and modes."""
    for major, minor in ((1, 3), (8, 0), (259, 70000), (511, 262143)):
        os.mknod(folder / f"char-{major}-{minor}", 0o020666, os.makedev(major, minor))
        os.mknod(folder / f"block-{major}-{minor}", 0o060660, os.makedev(major, minor))
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
    for uid, gid in ((0, 0), (1000, 100), (65536, 65535), (4294967294, 4294967293)):
        path = folder / f"owned-{uid}"
        path.write_bytes(b"")
        os.chown(path, uid, gid)
        path.chmod(0o7777 if uid else 0)


def times(folder: Path) -> None:
    """Times from the first that the format has to the last, to the nanosecond."""
    bounds = (-(1 << 31), (1 << 31) - 1, 1 << 31, 4102444800, 16299260424)
    for seconds in (*bounds, -1, 0, 1):
        for nanoseconds in (0, 1, 999_999_999):
            path = folder / f"{seconds}.{nanoseconds}"
            path.write_bytes(b"")
            at = seconds * 1_000_000_000 + nanoseconds
            os.utime(path, ns=(at, at))


def contents(folder: Path) -> None:
    """Empty, small, odd, sparse, preallocated, fragmented."""
    for size in (0, 1, 511, 512, 1023, 4095, 4096, 4097, 65537, 3_000_001):
        (folder / f"size-{size}").write_bytes(os.urandom(size))
    with open(folder / "sparse", "wb") as file:
        for at in (5 << 30, 3 << 20, 777):
            file.seek(at)
            file.write(b"island" * 1000)
        file.truncate((6 << 30) + 13)
    with open(folder / "all-hole", "wb") as file:
        file.truncate(1 << 20)
    preallocated(folder)


def preallocated(folder: Path) -> None:
    """Unwritten extents: alone, with islands of data, past the end of the file."""
    with open(folder / "unwritten", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
    with open(folder / "part-written", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        for at in (0, 100_000, 900_001):
            file.seek(at)
            file.write(b"written" * 3000)
    run("xfs_io", "-f", "-c", "pwrite -q 0 10000", "-c", "falloc -k 8k 4m", str(folder / "kept"))
    run("xfs_io", "-f", "-c", "pwrite -q 0 3m", "-c", "fzero 1m 1m", str(folder / "zeroed"))


def fragmented(folder: Path) -> None:
    """A file in thousands of pieces: its extents need a tree of blocks."""
    with open(folder / "fragments", "wb") as file:
        for index in range(6000):
            file.seek(index * 8192)
            file.write(index.to_bytes(4, "big") * 1024)
    with open(folder / "half-unwritten", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 12 << 20)
        for index in range(1500):
            file.seek(index * 8192 + 4096)
            file.write(index.to_bytes(4, "big") * 512)


def attributes(folder: Path) -> None:
    """Attributes in the inode, in blocks, and in so many that they need a tree."""
    for name, count, size in (("one", 1, 10), ("large", 1, 60_000), ("many", 200, 3000)):
        path = folder / name
        path.write_bytes(b"with attributes")
        for index in range(count):
            os.setxattr(path, f"user.{name}-{index}", os.urandom(size))
    (folder / "directory").mkdir()
    os.setxattr(folder / "directory", "user.large", os.urandom(60_000))
    (folder / "directory" / "child").write_bytes(b"child")
    for index in range(30):
        (folder / "directory" / f"later-{index}").write_bytes(b"")
    for index in range(0, 200, 3):
        os.removexattr(folder / "many", f"user.many-{index}")
    (folder / "more").mkdir()
    matrix_xattrs.fill(folder / "more")
    link = folder / "link"
    link.symlink_to("t" * 100)
    os.setxattr(link, "trusted.much", os.urandom(3000), follow_symlinks=False)


def links(folder: Path) -> None:
    """Symbolic links of every kind of length, hard links."""
    for length in (1, 50, 155, 156, 157, 336, 337, 412, 413, 967, 968, 969, 1000, 1022, 1023):
        (folder / f"to-{length}").symlink_to("x" * length)
    os.symlink(b"\xff\xfe\n/../..", os.fsencode(folder / "odd"))
    (folder / "file").write_bytes(b"many names")
    for index in range(100):
        os.link(folder / "file", folder / f"hard-{index}")


def short_lived(folder: Path) -> None:
    """What remains where most was deleted."""
    for index in range(3000):
        (folder / f"short-lived-{index}").write_bytes(b"x")
    for index in range(3000):
        if index % 37:
            (folder / f"short-lived-{index}").unlink()
    for index in range(200):
        (folder / f"again-{index}").write_bytes(b"again")


def many(folder: Path) -> None:
    """50,000 names in one directory, and then gaps in it."""
    for index in range(50_000):
        os.close(os.open(folder / f"{index}-name", os.O_CREAT | os.O_WRONLY))
    for index in range(20_000, 30_000):
        os.unlink(folder / f"{index}-name")


def shared(folder: Path) -> None:
    """Extents that several files share, and copies changed in part."""
    everything(folder)
    (folder / "first").write_bytes(os.urandom(2 << 20))
    for index in range(3):
        run("cp", "--reflink=always", str(folder / "first"), str(folder / f"copy-{index}"))
        with open(folder / f"copy-{index}", "r+b") as file:
            for at in range(index * 4096, 2 << 20, 65536):
                file.seek(at)
                file.write(b"changed" * 100)


def projects(folder: Path) -> None:
    """A project id, which the kernel keeps beside the owner."""
    everything(folder)
    run("xfs_io", "-c", "chproj -R 70000", "-c", "chattr +P", str(folder / "names"))


RECIPES: dict[str, tuple[Fill | None, tuple[str, ...], str]] = {
    "empty": (None, (), "rw"),
    "defaults": (everything, (), "rw"),
    "block-1k": (everything, ("-b", "size=1024"), "rw"),
    "block-2k": (everything, ("-b", "size=2048"), "rw"),
    "sector-4k": (everything, ("-s", "size=4096"), "rw"),
    "directory-8k": (everything, ("-n", "size=8192"), "rw"),
    "directory-64k": (everything, ("-n", "size=65536"), "rw"),
    "block-1k-directory-64k-many": (many, ("-b", "size=1024", "-n", "size=65536"), "rw"),
    "many": (many, (), "rw"),
    "bigtime-off": (everything, ("-m", "bigtime=0"), "rw"),
    "nrext64": (everything, ("-i", "nrext64=1"), "rw"),
    "nrext64-fragmented": (fragmented, ("-i", "nrext64=1", "-b", "size=1024"), "rw"),
    "reflink": (shared, ("-m", "reflink=1"), "rw"),
    "reflink-off": (everything, ("-m", "reflink=0"), "rw"),
    "rmapbt": (shared, ("-m", "rmapbt=1,reflink=1"), "rw"),
    "finobt-off": (everything, ("-m", "finobt=0,inobtcount=0"), "rw"),
    "inobtcount-off": (everything, ("-m", "inobtcount=0"), "rw"),
    "sparse-inodes-off": (everything, ("-i", "sparse=0"), "rw"),
    "inodes-1k": (everything, ("-i", "size=1024"), "rw"),
    "inodes-2k": (everything, ("-i", "size=2048"), "rw"),
    "fragmented": (fragmented, (), "rw"),
    "fragmented-inodes-2k": (fragmented, ("-i", "size=2048"), "rw"),
    "log-stripe": (everything, ("-l", "su=32k"), "rw"),
    "striped": (everything, ("-d", "su=64k,sw=4"), "rw"),
    "many-groups": (everything, ("-d", "agcount=17"), "rw"),
    "imaxpct-0": (everything, ("-i", "maxpct=0"), "rw"),
    "imaxpct-1": (everything, ("-i", "maxpct=1"), "rw"),
    "projects": (projects, (), "rw"),
    "inode64-off": (everything, (), "rw,inode32"),
}


def build(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every image that must read as the kernel reads it, one at a time; the caller deletes it."""
    for name, (fill, options, mount) in RECIPES.items():
        yield name, make(folder / f"{name}.img", fill, *options, mount=mount)
    for make_one in (worn_log, worn_log_stripe, full_log, new_uuid):
        yield make_one.__name__, make_one(folder / f"{make_one.__name__}.img")


def wear(path: Path) -> None:
    """Write around a short log more than once."""
    with mounted(path) as folder:
        for turn in range(20):
            for index in range(3000):
                (folder / f"{turn}-{index}").write_bytes(b"x")
            os.sync()
            for index in range(3000):
                (folder / f"{turn}-{index}").unlink()
            os.sync()


def worn_log(path: Path, *options: str) -> Path:
    """A log that has been written around more than once."""
    make(path, everything, "-l", ",".join(options or ("size=20m",)))
    wear(path)
    return path


def worn_log_stripe(path: Path) -> Path:
    """The same, with records rounded up to a stripe."""
    return worn_log(path, "size=24m", "su=256k")


def full_log(path: Path) -> Path:
    """A log whose last record ends where the log does, so that it holds one cycle throughout.

    Records are rounded up to a stripe, so one mount in a hundred or so leaves it so.
    """
    chance = random.Random(7)
    make(path, everything, "-l", "size=24m,su=256k")
    for turn in range(1000):
        with mounted(path) as folder:
            for step in range(chance.randint(1, 3)):
                (folder / f"{turn}-{step}").write_bytes(b"x")
                os.sync()
        first, last = log_cycles(path)
        if first == last:
            return path
    raise OSError(f"{path}: no unmount ended where the log does")


def log_cycles(path: Path) -> tuple[int, int]:
    """The cycles of the first and the last block of the log."""
    names = ("blocksize", "agblocks", "agblklog", "logstart", "logblocks")
    command = ["xfs_db", "-r", "-c", "sb 0", "-c", f"print {' '.join(names)}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (line.split(" = ") for line in done.stdout.splitlines())
    said = {name: int(value) for name, value in lines}
    group, block = divmod(said["logstart"], 1 << said["agblklog"])
    start = (group * said["agblocks"] + block) * said["blocksize"]
    found = []
    with path.open("rb") as file:
        for at in (start, start + said["logblocks"] * said["blocksize"] - 512):
            file.seek(at)
            magic, cycle = struct.unpack(">II", file.read(8))
            found.append(cycle if magic == 0xFEEDBABE else magic)
    return found[0], found[1]


def new_uuid(path: Path) -> Path:
    """A filesystem whose metadata carry another UUID than its superblock."""
    make(path, everything, "-l", "size=13m")
    run("xfs_admin", "-U", "generate", str(path))
    wear(path)
    return path


V4_OPTIONS: dict[str, tuple[str, ...]] = {
    "v4": (),
    "v4-ftype": ("-n", "ftype=1"),
    "v4-block-1k": ("-b", "size=1024", "-i", "size=256"),
    "v4-block-2k": ("-b", "size=2048", "-i", "size=512"),
    "v4-sector-4k": ("-s", "size=4096"),
    "v4-inodes-2k": ("-i", "size=2048"),
    "v4-directory-64k": ("-n", "size=65536"),
    "v4-projid16": ("-i", "projid32bit=0"),
    "v4-attr1": ("-i", "attr=1"),
    "v4-log-stripe": ("-l", "su=64k"),
}


class Planted(NamedTuple):
    """What a prototype file asks for: `data` is a file's content or a link's target."""

    mode: int
    uid: int
    gid: int
    rdev: int
    data: bytes


def plant() -> dict[str, Planted]:
    """What v4 images contain, by path. Kernels without v4 cannot fill them, mkfs.xfs can."""
    tree = {}
    for size in (0, 1, 511, 4096, 4097, 65537, 3_000_001):
        tree[f"size-{size}"] = Planted(0o100644 | size % 8, size % 70000, 7, 0, os.urandom(size))
    for length in (1, 100, 155, 156, 157, 400, 412, 413, 1000, 1023):
        tree[f"to-{length}"] = Planted(0o120777, 0, 0, 0, b"t" * length)
    tree["setuid"] = Planted(0o106755, 4294967294, 4294967293, 0, b"setuid")
    tree["null"] = Planted(0o020666, 0, 0, os.makedev(1, 3), b"")
    tree["block"] = Planted(0o060660, 0, 6, os.makedev(259, 70000), b"")
    tree["fifo"] = Planted(0o010600, 1, 1, 0, b"")
    for parent, count in (("few", 3), ("some", 60), ("many", 9000)):
        tree[parent] = Planted(0o040755, 5, 6, 0, b"")
        for index in range(count):
            tree[f"{parent}/{index}-{'n' * (index % 200)}"] = Planted(0o100600, 0, 0, 0, b"")
    tree["some/deep"] = Planted(0o042755, 0, 0, 0, b"")
    tree["some/deep/" + "l" * 255] = Planted(0o100400, 0, 0, 0, b"deep")
    return tree


def make_v4(path: Path, tree: dict[str, Planted], *options: str) -> Path:
    """A version 4 image with that tree, which mkfs.xfs plants."""
    letters = {0o10: "-", 0o12: "l", 0o02: "c", 0o06: "b", 0o01: "p", 0o04: "d"}
    content = path.with_name("content")
    lines = ["/", "0 0", "d--755 0 0"]

    def add(folder: str) -> None:
        for name, planted in tree.items():
            parent, _, own = name.rpartition("/")
            if parent != folder:
                continue
            bits = planted.mode & 0o7777
            special = ("u" if bits & 0o4000 else "-") + ("g" if bits & 0o2000 else "-")
            letter = letters[planted.mode >> 12]
            line = f"{own} {letter}{special}{bits & 0o777:03o} {planted.uid} {planted.gid}"
            if letter == "-":
                source = content / str(len(lines))
                source.write_bytes(planted.data)
                line += f" {source}"
            elif letter == "l":
                line += f" {planted.data.decode()}"
            elif letter in "cb":
                line += f" {os.major(planted.rdev)} {os.minor(planted.rdev)}"
            lines.append(line)
            if letter == "d":
                add(name)
                lines.append("$")

    content.mkdir()
    add("")
    prototype = path.with_name(path.name + ".proto")
    prototype.write_text("\n".join([*lines, "$", ""]))
    run("truncate", "-s", "320M", str(path))
    mkfs(path, "-m", "crc=0", *options, "-p", str(prototype))
    shutil.rmtree(content)
    prototype.unlink()
    return path


def database_fields(image: Path, inodes: list[int], fields: list[str]) -> list[list[int]]:
    """Fields of inodes as xfs_db, which is the kernel's code, prints them in decimal."""
    script = "".join(
        f"inode {inode}\nprint {' '.join(f'core.{field}' for field in fields)}\n"
        for inode in inodes
    )
    done = subprocess.run(
        ["xfs_db", "-r", str(image)], input=script, capture_output=True, text=True, check=True
    )
    values = [
        int(line.partition(" = ")[2], 0)
        for line in done.stdout.replace("xfs_db> ", "").splitlines()
        if " = " in line
    ]
    return [values[at : at + len(fields)] for at in range(0, len(values), len(fields))]


def build_refused(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every image that must be refused."""
    yield "dirty-log", dirty(folder / "dirty-log.img")
    yield "dirty-log-stripe", dirty(folder / "dirty-log-stripe.img", "-l", "su=64k")
    yield "dirty-full-log", dirty_full_log(folder / "dirty-full-log.img")
    ci = folder / "case-insensitive.img"
    yield "case-insensitive", make(ci, None, "-n", "version=ci")
    realtime = folder / "realtime.img"
    run("truncate", "-s", "64M", str(folder / "device.img"))
    yield "realtime", make(realtime, None, "-r", f"rtdev={folder / 'device.img'},size=32m")
    log = folder / "external-log.img"
    yield "external-log", make(log, None, "-l", f"logdev={folder / 'device.img'},size=32m")


def dirty(path: Path, *options: str) -> Path:
    """The image as it is in the middle of work."""
    live = path.with_name("live-" + path.name)
    make(live, None, *options)
    with mounted(live) as folder:
        everything(folder)
        os.sync()
        run("xfs_freeze", "-f", str(folder))
        run("xfs_freeze", "-u", str(folder))
        (folder / "after").write_bytes(b"x")
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.sync()
        shutil.copyfile(live, path)
    live.unlink()
    return path


def dirty_full_log(path: Path) -> Path:
    """The image in the middle of work, when its last record has just reached the log's end."""
    live = path.with_name("live-" + path.name)
    make(live, None, "-l", "size=24m,su=256k")
    with mounted(live) as folder:
        for turn in range(1000):
            (folder / f"{turn}").write_bytes(b"x")
            os.sync()
            first, last = log_cycles(live)
            if first == last:
                shutil.copyfile(live, path)
                break
    live.unlink()
    return path
