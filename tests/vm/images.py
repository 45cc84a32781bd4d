"""The disks that the mounts in the virtual machine are tested on, made on the host, where it is
quick: one of each filesystem in partitions and in logical volumes, in three formats, and alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

MIB = 1 << 20
GROUP = "guest-vg"
SNAPSHOT = "before"
KINDS = ("ext4", "xfs", "btrfs", "vfat", "ntfs")
SIZES = {"ext4": 32, "xfs": 48, "btrfs": 112, "vfat": 40, "ntfs": 16}  # MiB
PARTITIONS = {"ext4": 1, "xfs": 5, "vfat": 6, "ntfs": 7, "btrfs": 8}
FILES = {
    "plain.txt": b"plain\n",
    "a name with spaces": b"spaces\n",
    "not so na\u00efve.txt": b"not ASCII\n",
    "nested/deeper/file": b"deep\n",
    "data": bytes(range(256)) * 4096,
    "empty": b"",
}
_EXTENT = 4 * MIB
_LVM = ("--config", 'devices{scan="/dev" use_devicesfile=0}', "--driverloaded", "n")
# mkfs.xfs makes a filesystem below 300 MB only for its own test suite.
_SMALL_XFS = {"TEST_DIR": "/", "TEST_DEV": "none", "QA_CHECK_FS": "1"}


def _run(*words: str | Path, env: Mapping[str, str] | None = None) -> str:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", **(env or {})},
    )
    assert done.returncode == 0, f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _tree(folder: Path) -> Path:
    """The files, and the directories that the others are mounted at."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for kind in KINDS[1:]:
        (folder / kind).mkdir()
    return folder


def _mounted(image: Path, at: Path, tree: Path, *mount: str) -> None:
    """Fill a filesystem through a mount."""
    device = _run("losetup", "--find", "--show", image).strip()
    try:
        at.mkdir(exist_ok=True)
        _run(*mount, device, at)
        try:
            shutil.copytree(tree, at, dirs_exist_ok=True)
        finally:
            _run("umount", at)
    finally:
        _run("losetup", "--detach", device)


def _filesystem(path: Path, kind: str, tree: Path, at: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SIZES[kind] * MIB)
    if kind == "ext4":
        _run("mke2fs", "-q", "-t", "ext4", "-d", tree, path)
    elif kind == "btrfs":
        _run("mkfs.btrfs", "-q", "--rootdir", tree, path)
    elif kind == "vfat":
        _run("mkfs.vfat", path)
        for entry in sorted(tree.iterdir()):
            _run("mcopy", "-s", "-i", path, entry, "::")
    elif kind == "xfs":
        _run("mkfs.xfs", "-q", path, env=_SMALL_XFS)
        _mounted(path, at, tree, "mount", "-o", "nouuid")
    else:
        _run("mkfs.ntfs", "--quick", "--force", path)
        _mounted(path, at, tree, "ntfs-3g")


def _write(disk: Path, offset: int, piece: Path) -> None:
    where = ("conv=notrunc,sparse", "bs=1M", "oflag=seek_bytes", f"seek={offset}")
    _run("dd", f"if={piece}", f"of={disk}", *where)


def _in_group(stretch: Path, pieces: Mapping[str, Path]) -> None:
    """A physical volume with a logical volume for each piece, without device-mapper."""
    device = _run("losetup", "--find", "--show", stretch).strip()
    try:
        _run("lvm", "pvcreate", *_LVM, "-ff", "-y", device)
        _run("lvm", "vgcreate", *_LVM, GROUP, device)
        for kind in pieces:
            size = f"{SIZES[kind]}m"
            _run("lvm", "lvcreate", *_LVM, "-an", "-Zn", "-Wn", "-L", size, "-n", kind, GROUP)
        fields = ("--noheadings", "--separator", " ", "-o", "lv_name,seg_pe_ranges")
        listed = _run("lvm", "lvs", *_LVM, "--segments", *fields, GROUP)
    finally:
        _run("losetup", "--detach", device)
    for line in listed.splitlines():
        kind, ranges = line.split()
        first = int(ranges.rpartition(":")[2].partition("-")[0])
        _write(stretch, MIB + first * _EXTENT, pieces[kind])


def build(folder: Path) -> None:
    """`disk.raw`, `disk.qcow2`, `overlay.qcow2`, and `KIND.raw` for each filesystem; the same disk
    at the snapshot SNAPSHOT of `saved.qcow2`, which holds nothing but zeros since."""
    (folder / "tree").mkdir()
    tree = _tree(folder / "tree")
    pieces = {}
    for kind in KINDS:
        pieces[kind] = folder / f"{kind}.raw"
        _filesystem(pieces[kind], kind, tree, folder / "at")
    group_size = sum(SIZES.values()) + 16
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        file.truncate((2 * sum(SIZES.values()) + 64) * MIB)
    lines = ["label: dos", f"size={SIZES['ext4']}MiB", f"size={group_size}MiB, type=8e", "type=5"]
    logical = sorted((number, kind) for kind, number in PARTITIONS.items() if number > 4)
    lines += [f"size={SIZES[kind]}MiB" for _, kind in logical]
    table = "\n".join(lines)
    subprocess.run(["/usr/sbin/sfdisk", "--quiet", raw], input=table, text=True, check=True)
    starts = {}
    for line in _run("sfdisk", "--dump", raw).splitlines():
        if line.startswith(str(raw)):
            name, _, rest = line.partition(" : ")
            start = rest.split(",")[0].partition("=")[2]
            starts[int(name.strip().removeprefix(str(raw)))] = int(start) * 512
    for kind, number in PARTITIONS.items():
        _write(raw, starts[number], pieces[kind])
    stretch = folder / "group"
    with stretch.open("wb") as file:
        file.truncate(group_size * MIB)
    _in_group(stretch, pieces)
    _write(raw, starts[2], stretch)
    stretch.unlink()
    qcow2 = folder / "disk.qcow2"
    _run("qemu-img", "convert", "-O", "qcow2", raw, qcow2)
    for overlay in ("overlay.qcow2", "saved.qcow2"):
        on_it = ("-b", qcow2, "-F", "qcow2", folder / overlay)
        _run("qemu-img", "create", "-q", "-f", "qcow2", *on_it)
    saved = folder / "saved.qcow2"
    _run("qemu-img", "snapshot", "-c", SNAPSHOT, saved)
    _run("qemu-io", "-f", "qcow2", "-c", f"write -q -z 0 {raw.stat().st_size}", saved)
    shutil.rmtree(tree)
    (folder / "at").rmdir()
    # How many blocks a file takes is settled when they are written back; the tests look at it.
    os.sync()
