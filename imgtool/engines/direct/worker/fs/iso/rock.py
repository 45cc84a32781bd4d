"""What Rock Ridge says of one directory record.

Source: IEEE P1282; Linux, fs/isofs/rock.c.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import NamedTuple

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.iso.records import (
    Record,
    checked_name,
    system_use_fields,
    unix_time,
)
from imgtool.engines.direct.worker.fs.pages import Pages

_IGNORED = (b"RR", b"SP", b"ER", b"PD", b"ES")
_IDENTIFIERS = (b"RRIP_1991A", b"IEEE_P1282", b"IEEE_1282")
_NAME_CONTINUES = 1
_KINDS = (
    *(stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK),
    *(stat.S_IFIFO, stat.S_IFSOCK),
)
_HAS_CREATION, _HAS_MODIFICATION, _LONG_TIMES = 0x01, 0x02, 0x80


class Posix(NamedTuple):
    """The attributes; None where Rock Ridge has nothing to say of it."""

    mode: int
    links: int
    uid: int
    gid: int
    rdev: int
    mtime: int | None
    name: bytes
    target: bytes
    relocated: bool


def is_rock_ridge(source: Pages, root: Record) -> bool:
    """Whether the root directory's first record announces Rock Ridge."""
    fields = dict(system_use_fields(source, root.system_use)) if root.system_use else {}
    if not fields:
        return False
    identity = fields.get(b"ER", b"")
    if fields.get(b"SP") != b"\xbe\xef\0" or len(identity) < 4:
        raise Unsupported("ISO 9660 with an unknown system use area")
    if identity[4 : 4 + identity[0]] not in _IDENTIFIERS:
        raise Unsupported("ISO 9660 with unknown extensions")
    return True


def posix(source: Pages, record: Record) -> Posix:
    """All of it; `Unsupported` for relocated directories, zisofs and what is not known."""
    mode = links = uid = gid = rdev = 0
    mtime: int | None = None
    name = target = b""
    relocated = continues = False
    seen: set[bytes] = set()
    for signature, payload in system_use_fields(source, record.system_use):
        if signature in seen and signature != b"NM":
            raise Unsupported("ISO 9660 with a repeated field of Rock Ridge")
        seen.add(signature)
        if signature == b"PX" and len(payload) in (32, 40):
            mode, links, uid, gid = struct.unpack_from("<I4xI4xI4xI4x", payload)
        elif signature == b"TF" and payload:
            mtime = _modification(payload)
        elif signature == b"NM" and payload and not record.is_dot:
            if payload[0] & ~_NAME_CONTINUES or (name and not continues):
                raise Unsupported("ISO 9660 with an odd name")
            name += payload[1:]
            continues = bool(payload[0] & _NAME_CONTINUES)
        elif signature == b"SL" and payload:
            target = _target(payload)
        elif signature == b"PN" and len(payload) == 16:
            high, low = struct.unpack("<I4xI4x", payload)
            if high >= 1 << 12 or low >= 1 << 20:
                raise Unsupported("ISO 9660 with an impossible device number")
            rdev = os.makedev(low >> 8, low & 0xFF) if low > 0xFF and not high else 0
            rdev = rdev or os.makedev(high, low)
        elif signature == b"RE":
            relocated = True
        elif signature not in _IGNORED and not (signature == b"NM" and record.is_dot):
            raise Unsupported("ISO 9660 with a field of Rock Ridge that is not known here")
    if mode >> 16 or stat.S_IFMT(mode) not in _KINDS:
        raise Unsupported("ISO 9660 with a file of no known kind")
    if b"PX" not in seen or continues:
        raise Unsupported("ISO 9660 with a file that Rock Ridge does not describe")
    if not record.is_dot:
        if not name:
            raise Unsupported("ISO 9660 with a file that Rock Ridge does not name")
        checked_name(name)
    return Posix(mode, links, uid, gid, rdev, mtime, name, target, relocated)


def _modification(payload: bytes) -> int | None:
    flags = payload[0]
    if flags & _LONG_TIMES:
        raise Unsupported("ISO 9660 with long times")
    if not flags & _HAS_MODIFICATION:
        return None
    at = 1 + 7 * (flags & _HAS_CREATION)
    if at + 7 > len(payload):
        raise Unsupported("ISO 9660 with damaged times")
    return unix_time(payload[at : at + 7])


def _target(payload: bytes) -> bytes:
    """The target of a link: text, `.`, `..` or the root, part by part."""
    if payload[0]:
        raise Unsupported("ISO 9660 with the target of a link in several fields")
    parts: list[bytes] = []
    at = 1
    while at + 2 <= len(payload):
        flags, length = payload[at], payload[at + 1]
        text = payload[at + 2 : at + 2 + length]
        if len(text) != length or flags not in (0, 2, 4, 8) or (flags and length):
            raise Unsupported("ISO 9660 with an odd target of a link")
        if flags == 8 and parts:
            raise Unsupported("ISO 9660 with an odd target of a link")
        parts.append({0: text, 2: b".", 4: b"..", 8: b""}[flags])
        at += 2 + length
    if parts == [b""]:
        return b"/"
    target = b"/".join(parts)
    if not target or b"\0" in target:
        raise Unsupported("ISO 9660 with an odd target of a link")
    return target
