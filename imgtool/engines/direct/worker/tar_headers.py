"""Headers of tar streams, as tar(1) of GNU writes them."""

from __future__ import annotations

import os
import stat
import tarfile

from imgtool.engines.direct.wire import frames
from imgtool.engines.direct.worker.tree import Found
from imgtool.formats.xattrs import ACL_ACCESS, ACL_DEFAULT, Xattrs, acl_text

_ACLS = {ACL_ACCESS: b"SCHILY.acl.access", ACL_DEFAULT: b"SCHILY.acl.default"}

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
    member = tarfile.TarInfo(frames.text(name))
    member.type = _TYPES[stat.S_IFMT(node.mode)]
    member.mode = stat.S_IMODE(node.mode)
    member.uid, member.gid = node.uid, node.gid
    member.mtime = node.mtime_ns // 1_000_000_000
    if link is not None:
        member.type = tarfile.LNKTYPE
        member.linkname = frames.text(link)
    elif member.type == tarfile.SYMTYPE:
        member.linkname = frames.text(found.target or b"")
    elif member.type == tarfile.REGTYPE:
        member.size = node.size
    elif member.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        member.devmajor, member.devminor = os.major(node.rdev), os.minor(node.rdev)
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def attributes(xattrs: Xattrs) -> bytes:
    """What stands before the header of a member that has extended attributes: an extended header
    of pax, with the records that GNU tar (`--xattrs`, `--acls`) and star have for them.
    """
    records = b"".join(_record(*_keyword_and_value(name, value)) for name, value in xattrs)
    if not records:
        return b""
    member = tarfile.TarInfo("././@PaxHeader")
    member.type = tarfile.XHDTYPE
    member.size = len(records)
    return member.tobuf(tarfile.USTAR_FORMAT) + records + padding(len(records))


def _keyword_and_value(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    text = acl_text(value) if name in _ACLS else None
    if text is not None:
        return _ACLS[name], text.encode()
    return b"SCHILY.xattr." + name.replace(b"%", b"%25").replace(b"=", b"%3D"), value


def _record(keyword: bytes, value: bytes) -> bytes:
    """A record begins with its own length, the digits of that included."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def padding(size: int) -> bytes:
    """What follows the content of a member of this size."""
    return bytes(-size % tarfile.BLOCKSIZE)
