"""Headers of tar streams, as tar(1) of GNU writes them."""

from __future__ import annotations

import os
import stat
import tarfile

from imgtool.engines.direct import protocol
from imgtool.engines.direct.tree import Found

END = bytes(2 * tarfile.BLOCKSIZE)

_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def header(name: bytes, found: Found, link: bytes | None) -> bytes:
    """The header of one member; `link` is the name of an earlier one that is the same file."""
    node = found.node
    member = tarfile.TarInfo(protocol.text(name))
    member.type = _TYPES[stat.S_IFMT(node.mode)]
    member.mode = stat.S_IMODE(node.mode)
    member.uid, member.gid = node.uid, node.gid
    member.mtime = node.mtime_ns // 1_000_000_000
    if link is not None:
        member.type = tarfile.LNKTYPE
        member.linkname = protocol.text(link)
    elif member.type == tarfile.SYMTYPE:
        member.linkname = protocol.text(found.target or b"")
    elif member.type == tarfile.REGTYPE:
        member.size = node.size
    elif member.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        member.devmajor, member.devminor = os.major(node.rdev), os.minor(node.rdev)
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What follows the content of a member of this size."""
    return bytes(-size % tarfile.BLOCKSIZE)
