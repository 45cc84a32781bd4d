"""Extended attributes and ACLs of every kind, set through the kernel; and what it says of them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from pathlib import Path

from imgtool.formats.xattrs import Xattrs, order_xattrs

# name of a file: how many attributes, of how many bytes each
_SIZES = {
    "none": (0, 0),
    "empty": (1, 0),
    "one": (1, 10),
    "some": (3, 30),
    "several": (10, 90),
    "large": (1, 3000),
    "huge": (1, 60_000),
    "largest": (1, 65_536),
    "many": (20, 4000),
}
_NO_ROOM = (errno.ENOSPC, errno.E2BIG)  # ext without ea_inode has a block for all of them


def fill(root: Path) -> None:
    """Files with as many attributes as fit, capabilities, labels and ACLs of all kinds."""
    noise = random.Random(11)
    for name, (count, size) in _SIZES.items():
        path = root / name
        path.write_text(name)
        for number in range(count):
            with contextlib.suppress(OSError):
                os.setxattr(path, f"user.{name}-{number}", noise.randbytes(size))
    os.link(root / "several", root / "several again")
    (root / "folder").mkdir()
    subprocess.run(["setfacl", "-m", "u:1000:rwx,g:5:r,g:77:-", root / "some"], check=True)
    acl = ["-m", "u:1000:rwx", "-d", "-m", "u:4000000000:rx,g:65536:w"]
    subprocess.run(["setfacl", *acl, root / "folder"], check=True)
    subprocess.run(["setcap", "cap_net_raw+ep", root / "one"], check=True)
    for name, key, value in (
        ("one", "security.selinux", b"system_u:object_r:etc_t:s0\0"),
        ("one", "trusted.key", b"\xff\0"),
        ("folder", "trusted.folder", b""),
        ("one", "user." + "n" * 250, b"a long name"),
        ("one", "user.\udcff=%", b"an odd name"),
    ):
        _set(root / name, key, value)
    (root / "link").symlink_to("x" * 80)
    (root / "short link").symlink_to("x")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    for name in ("link", "short link", "fifo", "null"):
        _set(root / name, "security.selinux", name.encode())
        _set(root / name, "trusted.x", b"x" * 200)
    for name in ("twin", "other twin"):  # one block, or one inode, for both
        (root / name).touch()
        _set(root / name, "user.shared", b"v" * 700)


def _set(path: Path, key: str, value: bytes) -> None:
    try:
        os.setxattr(path, key, value, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise


def of_kernel(path: bytes) -> Xattrs:
    """What the kernel says to root, in order, without XFS's own form of ACLs."""
    names = os.listxattr(path, follow_symlinks=False)
    return order_xattrs(
        (os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in names
    )
