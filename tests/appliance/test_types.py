"""What `filesystems` calls a volume: without `--engine` never less than either engine alone."""

from __future__ import annotations

import json
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

from imgtool.guest.blocks import UNKNOWN
from tests.support.marked_volumes import MIB, STRICT, bitlocker, erofs_beside_minix, udf, vmfs

pytestmark = pytest.mark.appliance
Types = dict[str, set[str]]

_LUKS = ("cryptsetup", "luksFormat", "-q", "--pbkdf-force-iterations=1000")
# What each is made by, and its size in MiB.
MADE = {
    "ext2": (["mke2fs", "-q", "-t", "ext2"], 8),
    "ext4": (["mke2fs", "-q", "-t", "ext4", "-L", "data"], 16),
    "xfs": (["mkfs.xfs", "-q"], 320),
    "btrfs": (["mkfs.btrfs", "-q"], 128),
    "vfat": (["mkfs.vfat", "-n", "DATA"], 16),
    "exfat": (["mkfs.exfat"], 16),
    "ntfs": (["mkfs.ntfs", "-q", "-F", "-f"], 16),
    "f2fs": (["mkfs.f2fs", "-q"], 128),
    "minix": (["mkfs.minix"], 8),
    "bfs": (["mkfs.bfs"], 8),
    "swap": (["mkswap", "-q", "-L", "swap"], 16),
    "luks1": ([*_LUKS, "--type=luks1"], 8),
    "luks2": ([*_LUKS, "--type=luks2", "--pbkdf=pbkdf2"], 32),
}
PACKED = {
    "squashfs": ["mksquashfs", "TREE", "IMAGE", "-quiet", "-no-progress"],
    "iso9660": ["genisoimage", "-quiet", "-R", "-V", "CD", "-o", "IMAGE", "TREE"],
    "cramfs": ["mkfs.cramfs", "TREE", "IMAGE"],
}
MARKED = {
    "udf": lambda: bytes(udf(2048, 8 * MIB).data),
    "BitLocker": lambda: bytes(bitlocker().data),
    "VMFS": lambda: bytes(vmfs().data),
    "erofs": lambda: bytes(erofs_beside_minix().data),
    "noise": lambda: random.Random(1).randbytes(8 * MIB),
    "zeros": lambda: bytes(8 * MIB),
}
# In one launch, with libguestfs itself.
IN_APPLIANCE = ("pv", "raid1", "raid2")
_MAKE = """
import sys, guestfs
handle = guestfs.GuestFS(python_return_dict=True)
handle.set_backend("direct")
handle.set_backend_settings(["force_tcg"])
for path in sys.argv[1:]:
    handle.add_drive_opts(path, format="raw")
handle.launch()
handle.pvcreate("/dev/sda")
handle.md_create("one", ["/dev/sdb", "/dev/sdc"], level="raid1")
handle.debug("sh", ["mdadm --stop --scan; true"])
handle.shutdown()
"""
NAMES = (*MADE, *PACKED, *MARKED, *IN_APPLIANCE)
# What nothing names.
NAMELESS = ("noise", "zeros", *(("udf", "erofs") if STRICT else ()))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("volumes")
    tree = folder / "tree"
    tree.mkdir()
    (tree / "file").write_text("text\n")
    found = {name: folder / f"{name}.raw" for name in NAMES}
    for name, (words, size) in MADE.items():
        with found[name].open("wb") as file:
            file.truncate(size * MIB)
        key = b"secret" if "cryptsetup" in words else None
        subprocess.run([*words, found[name]], input=key, check=True, capture_output=True)
    for name, words in PACKED.items():
        given = {"TREE": tree, "IMAGE": found[name]}
        subprocess.run([given.get(w, w) for w in words], check=True, capture_output=True)
        with found[name].open("ab") as file:
            file.truncate(-(-file.tell() // MIB) * MIB)
    for name, make in MARKED.items():
        found[name].write_bytes(make())
    for name in IN_APPLIANCE:
        with found[name].open("wb") as file:
            file.truncate(64 * MIB)
    subprocess.run([sys.executable, "-c", _MAKE, *(found[n] for n in IN_APPLIANCE)], check=True)
    return found


def filesystems(*words: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "imgtool", "filesystems", "--all", "-o", "jsonl"]
    return subprocess.run([*argv, *words], capture_output=True, text=True, check=False)


def types(done: subprocess.CompletedProcess[str]) -> Types:
    """What is said of each device of a guest: its types, and as what it holds others up."""
    assert done.returncode == 0, done.stderr
    found: Types = {}
    for row in map(json.loads, done.stdout.splitlines()):
        found.setdefault(row["device"], set()).update({row["type"]} - {None, UNKNOWN})
        for parent in row["parents"]:
            found.setdefault(parent, set()).add(f"below a {row['kind']}")
    return found


def types_in_one_guest(volumes: dict[str, Path], *words: str) -> Types:
    """What each volume is called, where all are disks of one guest: in one launch."""
    first, *others = volumes.values()
    added = [word for path in others for word in ("-A", path)]
    found = types(filesystems(first, *added, "--format", "raw", *words))
    disks = (f"/dev/sd{letter}" for letter in string.ascii_lowercase)
    return {name: found[disk] for name, disk in zip(volumes, disks, strict=False)}


@pytest.fixture(scope="module")
def by_appliance(volumes: dict[str, Path]) -> Types:
    return types_in_one_guest(volumes, "--engine", "libguestfs")


@pytest.fixture(scope="module")
def by_direct(volumes: dict[str, Path]) -> tuple[Types, Types]:
    """What the direct engine calls each, alone: of those that it reads, and of the others."""
    read: Types = {}
    refused: Types = {}
    for name, path in volumes.items():
        done = filesystems(path, "--format", "raw", "--engine", "direct")
        if done.returncode == 3:
            named = re.search(r"does not read this: /dev/sda is (\S+) \(", done.stderr)
            refused[name] = {named[1]} if named is not None else set()
        else:
            read[name] = types(done)["/dev/sda"]
    return read, refused


@pytest.fixture(scope="module")
def without_one(volumes: dict[str, Path], by_direct: tuple[Types, Types]) -> Types:
    """What they are called without `--engine`: alone, but for those that need the appliance."""
    read, refused = by_direct
    alone = {
        name: types(filesystems(volumes[name], "--format", "raw"))["/dev/sda"] for name in read
    }
    return alone | types_in_one_guest({name: volumes[name] for name in refused})


@pytest.mark.parametrize("name", NAMES)
def test_what_either_engine_names_is_named_without_one(name, by_appliance, by_direct, without_one):
    read, refused = by_direct
    assert without_one[name] >= read.get(name, set()) | refused.get(name, set())
    assert without_one[name] >= by_appliance[name]
    assert bool(without_one[name]) is (name not in NAMELESS)
