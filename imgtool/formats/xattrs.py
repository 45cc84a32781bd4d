"""Extended attributes as listxattr(2) and getxattr(2) have them, with POSIX ACLs among them."""

from __future__ import annotations

import struct
from collections.abc import Iterable

# Names and values, sorted by name.
Xattrs = tuple[tuple[bytes, bytes], ...]

ACL_ACCESS, ACL_DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
ACLS = (ACL_ACCESS, ACL_DEFAULT)

# The other form in which XFS stores an ACL: to the kernel the same thing twice.
_XFS_ACLS = (b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT")

# Entries of an ACL. Source: Linux, include/uapi/linux/posix_acl_xattr.h and posix_acl.h.
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
UNDEFINED = 0xFFFFFFFF
TAGS = {
    USER_OBJ: "user",
    USER: "user",
    GROUP_OBJ: "group",
    GROUP: "group",
    MASK: "mask",
    OTHER: "other",
}


def order_xattrs(found: Iterable[tuple[bytes, bytes]]) -> Xattrs:
    """Attributes as an entry has them; of two with one name the first."""
    kept: dict[bytes, bytes] = {}
    for name, value in found:
        if name not in _XFS_ACLS:
            kept.setdefault(name, value)
    return tuple(sorted(kept.items()))


def acl(entries: Iterable[tuple[int, int, int]]) -> bytes:
    """The attribute of an ACL: of each entry the tag, the permissions, and who is meant."""
    return _VERSION + b"".join(_ENTRY.pack(tag, bits, who) for tag, bits, who in entries)


def acl_text(value: bytes) -> str | None:
    """An ACL in the long form of acl(5), with numbers; None for what is no ACL."""
    if value[:4] != _VERSION or (len(value) - 4) % _ENTRY.size:
        return None
    lines = []
    for tag, bits, who in _ENTRY.iter_unpack(value[4:]):
        if tag not in TAGS or bits > 7:
            return None
        name = str(who) if tag in (USER, GROUP) else ""
        rights = "".join(
            letter if bits & bit else "-" for letter, bit in zip("rwx", (4, 2, 1), strict=True)
        )
        lines.append(f"{TAGS[tag]}:{name}:{rights}\n")
    return "".join(lines)
