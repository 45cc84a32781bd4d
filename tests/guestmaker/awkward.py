"""Guests that are hard to read: hostile names, huge files, damage, nothing at all."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.guestmaker import facts
from tests.guestmaker.disks import (
    MIB,
    Slice,
    blank,
    debugfs,
    ext,
    pack,
    partition,
    place,
    write_files,
)
from tests.guestmaker.recipe import Recipe

_BLOCK = 4096


def _add_names_and_links(tree: Path) -> None:
    names = os.fsencode(write_files(tree, {"names/plain": b"plain"}) / "names")
    for name in facts.AWKWARD_NAMES.values():
        Path(os.fsdecode(os.path.join(names, name))).write_bytes(name)
    (tree / "links").mkdir()
    for link, target in facts.AWKWARD_LINKS.items():
        os.symlink(target, os.path.join(os.fsencode(tree / "links"), link))
    first, *others = (tree / name.lstrip("/") for name in facts.HARD_LINKS)
    write_files(tree, {facts.HARD_LINKS[0]: b"linked\n"})
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.hardlink_to(first)


def _add_special_files(tree: Path) -> None:
    (tree / "special").mkdir()
    os.mkfifo(tree / "special/fifo")
    os.mknod(tree / "special/socket", stat.S_IFSOCK | 0o755)
    for name, (kind, major, minor) in facts.AWKWARD_DEVICES.items():
        bits = stat.S_IFCHR if kind == "char" else stat.S_IFBLK
        os.mknod(tree / "special" / name, bits | 0o660, os.makedev(major, minor))
    (tree / "modes").mkdir()
    for name, mode in facts.AWKWARD_MODES.items():
        path = tree / "modes" / name
        if name in ("setgid", "sticky"):
            path.mkdir()
        else:
            path.write_bytes(b"#!/bin/sh\n")
        if name == "odd-owner":
            os.chown(path, *facts.ODD_OWNER)
        path.chmod(mode)
    for xattr, value in facts.AWKWARD_XATTRS.items():
        os.setxattr(tree / "xattrs.txt", xattr, value)


def _extra_time(nanoseconds: int) -> int:
    """ext4's i_mtime_extra: nanoseconds, and two bits that carry the seconds past 2038.

    Source: the kernel's fs/ext4/ext4.h, "Extended timestamps".
    """
    seconds, fraction = divmod(nanoseconds, 10**9)
    return fraction << 2 | ((seconds + 2**31) >> 32 & 3)


def _prepare_awkward(work: Path) -> None:
    files: dict[str, bytes | str] = {
        "/plain.txt": b"plain\n",
        "/xattrs.txt": b"has attributes\n",
        "/etc/passwd": facts.AWKWARD_PASSWD,
        "/empty": b"",
        "/deep/" + "d/" * 100 + "bottom.txt": b"100 folders down\n",
        **{f"/times/{name}": name for name in facts.AWKWARD_TIMES},
    }
    tree = write_files(work / "tree", files)
    _add_names_and_links(tree)
    _add_special_files(tree)
    with (tree / facts.SPARSE_FILE.lstrip("/")).open("wb") as sparse:
        sparse.truncate(facts.SPARSE_SIZE)
        for offset, content in facts.SPARSE_ISLANDS.items():
            sparse.seek(offset)
            sparse.write(content)
    image = ext(
        work / "awkward.raw",
        facts.AWKWARD_SIZE,
        tree,
        uuid="5f1d3a52-0f8b-4b6c-9d31-000000000020",
        label="awkward",
    )
    # mke2fs -d copies whole seconds only, the low 32 bits of them.
    commands = []
    for name, when in facts.AWKWARD_TIMES.items():
        commands.append(f"set_inode_field /times/{name} mtime {when // 10**9 % 2**32:#x}")
        commands.append(f"set_inode_field /times/{name} mtime_extra {_extra_time(when)}")
    debugfs(image, commands, write=True)


def _prepare_many(work: Path) -> None:
    folder = work / "tree/d"
    folder.mkdir(parents=True)
    for number in range(facts.MANY_FILES):
        (folder / f"file-{number:05}").touch()
    pack(work / "tree", work / "many.tar")
    ext(
        work / "many.raw",
        64 * MIB,
        None,
        uuid="5f1d3a52-0f8b-4b6c-9d31-000000000021",
        label="many",
        options=["-N", "60000"],
    )


def _fill_many(g: Any, devices: Sequence[str], work: Path) -> None:
    # mke2fs -d takes minutes here: it looks through the whole directory for each new name.
    g.mount(devices[0], "/")
    g.tar_in(str(work / "many.tar"), "/")
    g.umount("/")


def _prepare_blanks(work: Path) -> None:
    blank(work / "empty.raw", 0)
    blank(work / "blank.raw", 64 * MIB)


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _prepare_nofs(work: Path) -> None:
    disk = blank(work / "nofs.raw", 98 * MIB)
    parts = [Slice(1, 32, name="wiped"), Slice(33, 32, name="broken"), Slice(65, 32, name="good")]
    partition(disk, "gpt", parts)
    path, content = facts.NOFS_GOOD_FILE
    tree = write_files(work / "tree", {path: content})
    wiped = ext(work / "wiped", 32 * MIB, tree, uuid="5f1d3a52-0f8b-4b6c-9d31-000000000022")
    _overwrite(wiped, 1024, bytes(1024))
    # Without the descriptors of its block groups it is recognised, and does not mount.
    broken = ext(
        work / "broken",
        32 * MIB,
        tree,
        uuid=facts.NOFS_BROKEN_UUID,
        label="broken",
        options=["-b", str(_BLOCK)],
    )
    _overwrite(broken, _BLOCK, b"\xff" * _BLOCK)
    good = ext(work / "good", 32 * MIB, tree, uuid=facts.NOFS_GOOD_UUID, label="good")
    for part, filesystem in zip(parts, (wiped, broken, good), strict=True):
        place(filesystem, disk, part.start * MIB)


def _inode_offset(image: Path, path: str) -> int:
    """Where in the image the inode of `path` is."""
    said = debugfs(image, [f"imap {path}"])
    found = re.search(r"located at block (\d+), offset (0x[0-9a-f]+)", said)
    if found is None:
        raise RuntimeError(f"debugfs does not say where the inode is: {said}")
    return int(found[1]) * _BLOCK + int(found[2], 16)


def _write_islands(path: Path, number: int) -> None:
    """Blocks with holes between them: each is an extent of its own."""
    with path.open("wb") as file:
        for island in range(number):
            file.seek(island * 2 * _BLOCK)
            file.write(b"#" * _BLOCK)


def _damage_extents(image: Path, path: str, *, keep: int) -> None:
    """Destroy the last block of extents of `path`; the first `keep` bytes must stay readable."""
    with image.open("rb") as file:
        file.seek(_inode_offset(image, path) + 40)  # i_block: the extent header, then the indexes
        magic, entries, _most, depth = struct.unpack("<HHHHxxxx", file.read(12))
        if magic != 0xF30A or depth != 1:
            raise RuntimeError(f"the extents of {path} did not move to blocks of their own")
        indexes = [struct.unpack("<IIxxxx", file.read(12)) for _ in range(entries)]
    logical, leaf = indexes[-1]
    if logical * _BLOCK < keep:
        raise RuntimeError(f"too little of {path} would stay readable")
    _overwrite(image, leaf * _BLOCK, b"\xde\xad\xbe\xef" * 16)


def _prepare_damaged(work: Path) -> None:
    tree = write_files(
        work / "tree", {**facts.DAMAGED_GOOD, facts.DAMAGED_INODE: b"nobody reads this\n"}
    )
    # Past four extents they move out of the inode to a block of their own, past 340 to several:
    # these can be damaged while the inode stays sound.
    _write_islands(tree / facts.DAMAGED_UNREADABLE.lstrip("/"), 20)
    _write_islands(tree / facts.DAMAGED_HALF.lstrip("/"), 1000)
    image = ext(
        work / "damaged.raw",
        64 * MIB,
        tree,
        uuid=facts.DAMAGED_UUID,
        label="damaged",
        options=["-b", str(_BLOCK)],
    )
    _damage_extents(image, facts.DAMAGED_UNREADABLE, keep=0)
    _damage_extents(image, facts.DAMAGED_HALF, keep=facts.DAMAGED_HALF_READABLE)
    _overwrite(image, _inode_offset(image, facts.DAMAGED_INODE), b"\x5a" * 128)


RECIPES = (
    Recipe("awkward", ("awkward.qcow2",), _prepare_awkward),
    Recipe("many", ("many.qcow2",), _prepare_many, _fill_many),
    Recipe("blank", ("blank.raw", "empty.raw"), _prepare_blanks),
    Recipe("nofs", ("nofs.qcow2",), _prepare_nofs),
    Recipe("damaged", ("damaged.qcow2",), _prepare_damaged),
)
