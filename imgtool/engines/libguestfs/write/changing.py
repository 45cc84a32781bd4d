"""Changing single files of a guest: contents replaced in the same file, new files made whole.

To be used in a transaction, which makes all changes of a command one: nothing here has to be
undone.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import tarfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from imgtool.engines.libguestfs.guest.calls import CallFailed
from imgtool.engines.libguestfs.guest.stream import upload
from imgtool.engines.libguestfs.guest.walk import join
from imgtool.engines.libguestfs.write.writing import is_full, put
from imgtool.errors import ImgtoolError
from imgtool.text import printable

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest

# Capabilities: the kernel takes them from a file that is written to.
_CAPABILITY = b"security.capability"


def rewrite(guest: LibguestfsGuest, path: bytes, content: bytes) -> None:
    """Replace the content of a regular file, which stays the same file.

    Mode, owner, extended attributes, SELinux label and hard links are kept, and its folder is not
    touched: at no moment can somebody read it who could not before. Raises `ImgtoolError` where
    the guest's filesystem has no room.
    """

    def produce(out: BinaryIO) -> None:
        out.write(content)

    rewrite_from(guest, path, produce)


def rewrite_from(guest: LibguestfsGuest, path: bytes, produce: Callable[[BinaryIO], None]) -> None:
    """`rewrite` with content that `produce` writes to a stream."""
    # A name that nobody can have put a link at.
    kept = join(path.rpartition(b"/")[0] or b"/", b".imgtool-" + secrets.token_hex(8).encode())
    has_capability = False
    with contextlib.suppress(CallFailed):
        guest.calls.getxattr(path, _CAPABILITY)
        has_capability = True
    try:
        if has_capability:
            guest.calls.copy(path, kept)
        with guest.cancellable():
            upload(lambda name: guest.calls.upload(name, path), produce)
        if has_capability:
            guest.calls.copy_xattrs(kept, path)
            guest.calls.rm_rf(kept)
    except CallFailed as error:
        raise explain(guest, path, error) from error


def explain(guest: LibguestfsGuest, path: bytes, error: CallFailed) -> ImgtoolError:
    """The error of a write that failed, or that the filesystem is full."""
    folder = path.rpartition(b"/")[0] or b"/"
    if guest.interrupted() or not is_full(guest, folder, inodes=False):
        return error
    return ImgtoolError(
        "no space left on the guest's filesystem; nothing was changed",
        subject=printable(path),
        hint="'imgtool df' shows the space",
    )


def create(
    guest: LibguestfsGuest,
    path: bytes,
    content: bytes,
    *,
    mode: int = 0o644,
    owner: tuple[int, int] = (0, 0),
) -> None:
    """Make a regular file that was not there, with its mode and owner from the first moment and
    the SELinux label of the guest's policy; its folder is there."""
    folder, _, name = path.rpartition(b"/")

    def produce(out: BinaryIO) -> None:
        member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
        member.size, member.mode, member.mtime = len(content), mode, int(time.time())
        member.uid, member.gid = owner
        with tarfile.open(
            fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, errors="surrogateescape"
        ) as archive:
            archive.addfile(member, io.BytesIO(content))

    put(guest, folder or b"/", produce)
