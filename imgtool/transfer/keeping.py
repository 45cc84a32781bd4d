"""Which extended attributes a copy on the host keeps, and what is said of the others."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from imgtool.formats.xattrs import ACL_ACCESS, ACL_DEFAULT, ACLS, Xattrs

# On the host these give rights, to whoever runs a program or reads a file: only on demand.
_POWERFUL = (b"security.", b"trusted.")
_LABEL = b"security.selinux"
# How tar streams name them; ACLs have names of their own.
_RECORDS = {
    "SCHILY.xattr.": None,
    "SCHILY.acl.access": ACL_ACCESS,
    "SCHILY.acl.default": ACL_DEFAULT,
}
# What the filesystem of the destination, or the user's rights, do not allow.
_NOT_ALLOWED = frozenset(
    (
        *(errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EINVAL),
        *(errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE),
    )
)


class Keeping:
    """The choice of attributes, and the counts of those that are left out."""

    def __init__(self, everything: bool = False) -> None:
        """User attributes and ACLs are kept, with `everything` all others too."""
        self._everything = everything
        self._left: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def choose(self, xattrs: Xattrs) -> Xattrs:
        """Those that are kept; the others are counted."""
        kept = []
        for name, value in xattrs:
            if self._everything or not name.startswith(_POWERFUL):
                kept.append((name, value))
            else:
                self._left[_kind(name)] += 1
        return tuple(kept)

    def note_refusal(self, name: bytes) -> None:
        """The host does not take this one."""
        self._refused[_kind(name)] += 1

    def lines(self) -> list[str]:
        """A line on what was left out on purpose, and one on what the host does not take."""
        said = []
        if self._left:
            said.append(
                "extended attributes that could give rights on the host are not kept "
                f"({_describe_counts(self._left)}): --xattrs all keeps them"
            )
        if self._refused:
            said.append(
                "extended attributes that the destination's filesystem, or the rights of the user, "
                f"do not allow are not kept ({_describe_counts(self._refused)})"
            )
        return said


class LeftBehind:
    """The attributes of the host's files, or of a stream's, that a copy into a guest has not."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def host_file(self, path: Path) -> None:
        """Count those of a file of the host."""
        with contextlib.suppress(OSError):  # a filesystem that has none
            self._add(map(os.fsencode, os.listxattr(path, follow_symlinks=False)))

    def headers(self, records: Mapping[str, str]) -> None:
        """Count those in the extended headers of a member of a tar stream."""
        # GNU tar has ACLs in both forms.
        self._add(
            {
                name or os.fsencode(keyword.removeprefix(prefix))
                for keyword in records
                for prefix, name in _RECORDS.items()
                if keyword.startswith(prefix)
            }
        )

    def _add(self, names: Iterable[bytes]) -> None:
        # Labels are not missed: the guest's own policy gives them.
        self._counts.update(_kind(name) for name in names if name != _LABEL)

    def line(self) -> str | None:
        """What is said of them, if there are any."""
        if not self._counts:
            return None
        return f"extended attributes are not copied ({_describe_counts(self._counts)})"


def _kind(name: bytes) -> str:
    if name in ACLS:
        return "ACLs"
    return os.fsdecode(name.partition(b".")[0]) + ".*"


def _describe_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items()))


def set_all(path: bytes, xattrs: Xattrs, on_refused: Callable[[bytes], None]) -> None:
    """Give a file of the host these attributes; the path's last component is not followed."""
    for name, value in xattrs:
        try:
            os.setxattr(path, name, value, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NOT_ALLOWED:
                raise
            on_refused(name)
