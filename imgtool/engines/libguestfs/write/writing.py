"""Putting files into a guest: staged beside their destination, then renamed into place.

Whatever fails while the content is on its way (the guest full, Ctrl-C, a source that cannot be
read) leaves the guest's own files as they were: they are replaced by `rename`, one by one, only
after everything has arrived.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from imgtool.engines.libguestfs.guest.calls import CallFailed
from imgtool.engines.libguestfs.guest.stream import upload
from imgtool.engines.libguestfs.guest.walk import join
from imgtool.errors import EngineError, HostError, ImgtoolError, NotInGuestError, RefusedError
from imgtool.guest.changes import Kept
from imgtool.guest.model import Entry
from imgtool.text import printable

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest

_SET_ID = stat.S_ISUID | stat.S_ISGID
_SELINUX_CONFIG = "/etc/selinux/config"


def _shell_value(content: bytes, name: str) -> str | None:
    for line in content.decode("utf-8", "replace").splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key.strip() == name:
            return value.strip().strip("\"'")
    return None


class Labels:
    """The SELinux labels that the guest's own policy gives, if the guest has SELinux enabled."""

    def __init__(self, guest: LibguestfsGuest) -> None:
        self._guest = guest
        self.contexts: str | None = None
        try:
            config = guest.read_bytes(_SELINUX_CONFIG, 64 * 1024)
        except (NotInGuestError, EngineError):
            return
        if (_shell_value(config, "SELINUX") or "disabled").lower() == "disabled":
            return
        policy = _shell_value(config, "SELINUXTYPE") or "targeted"
        contexts = f"/etc/selinux/{policy}/contexts/files/file_contexts"
        if not guest.handle.is_file(contexts, followsymlinks=True):
            return
        if not guest.handle.feature_available(["selinuxrelabel"]):
            raise HostError(
                "the guest uses SELinux, and the appliance has no setfiles to label files with",
                hint="'imgtool doctor' says how to add it; without a label services may not start",
            )
        self.contexts = contexts

    def apply(self, path: bytes) -> None:
        """Label a new file, or everything below a new directory."""
        if self.contexts is None:
            return
        try:
            self._guest.calls.relabel(os.fsencode(self.contexts), path)
        except CallFailed as error:
            raise EngineError(
                f"the SELinux label cannot be set: {error.message}", subject=printable(path)
            ) from error


@contextlib.contextmanager
def _staging(guest: LibguestfsGuest, directory: bytes) -> Iterator[bytes]:
    """A private folder in a directory of the guest, removed with the block."""
    name = join(directory, b".imgtool-" + secrets.token_hex(6).encode())
    guest.calls.mkdir(name, 0o700)
    try:
        yield name
    finally:
        # After Ctrl-C the appliance may be gone, and what was cached in it.
        with contextlib.suppress(EngineError):
            guest.calls.rm_rf(name)


def _lstat(guest: LibguestfsGuest, path: bytes) -> Entry | None:
    try:
        return guest.calls.lstat(path)
    except CallFailed as error:
        if error.errno in (2, 20) or "No such file" in error.message:
            return None
        raise


def _conflicts(guest: LibguestfsGuest, staged: bytes, final: bytes) -> Iterator[bytes]:
    """Where a directory would replace something else, or something else a directory."""
    there = _lstat(guest, final)
    if there is None:
        return
    ours = guest.calls.lstat(staged)
    if (ours.type == "directory") != (there.type == "directory"):
        yield final
    elif ours.type == "directory":
        for child in guest.entries(staged):
            yield from _conflicts(guest, child.path, join(final, child.name))


def _place(guest: LibguestfsGuest, staged: bytes, final: bytes, labels: Labels, kept: Kept) -> None:
    there = _lstat(guest, final)
    if there is not None and there.type == "directory":
        # The directory stays as it is, with its owner, mode and label; what is in it is placed.
        for child in list(guest.entries(staged)):
            _place(guest, child.path, join(final, child.name), labels, kept)
        return
    ours = guest.calls.lstat(staged)
    if there is None or there.type != "file" or ours.type != "file":
        guest.calls.rename(staged, final)
        labels.apply(final)
        return
    guest.calls.copy_xattrs(final, staged)
    if (there.mode | ours.mode) & 0o111:  # the kernel takes them from a program that is written to
        guest.calls.remove_xattr(staged, b"security.capability")
    owner = there.uid if kept.user else ours.uid, there.gid if kept.group else ours.gid
    if owner != (ours.uid, ours.gid):
        guest.calls.chown(staged, *owner)
    mode = stat.S_IMODE(there.mode) & ~_SET_ID if kept.mode else stat.S_IMODE(ours.mode)
    guest.calls.chmod(staged, mode)  # an ACL that was copied has changed it
    guest.calls.rename(staged, final)


def put(
    guest: LibguestfsGuest,
    directory: bytes,
    produce: Callable[[BinaryIO], None],
    *,
    rename: bytes | None = None,
    kept: Kept = Kept(),
) -> None:
    """Unpack the tar stream that `produce` writes into a directory of the guest, all or nothing.

    With `rename` the one top-level name of the stream gets that name. Files that exist are
    replaced and keep their extended attributes, but for capabilities, and what `kept` says;
    directories that exist are merged into.
    """
    labels = Labels(guest)
    with guest.cancellable(), _staging(guest, directory) as staging:
        try:
            upload(lambda name: guest.calls.tar_in(name, staging), produce)
        except CallFailed as error:
            _explain(guest, directory, error)
        placed = [
            (entry.path, join(directory, entry.name if rename is None else rename))
            for entry in guest.entries(staging)
        ]
        conflicts = [path for staged, final in placed for path in _conflicts(guest, staged, final)]
        if conflicts:
            raise RefusedError(
                "a directory and something else have the same name; nothing was copied",
                subject=printable(conflicts[0]),
            )
        for staged, final in placed:
            _place(guest, staged, final, labels, kept)


def _is_utf8(path: bytes) -> bool:
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_full(guest: LibguestfsGuest, directory: bytes, *, inodes: bool = True) -> bool:
    """Whether the filesystem of a directory has no room left, or no inode."""
    # The binding takes no name that is not UTF-8: the folder above tells the same.
    while not _is_utf8(directory):
        directory = directory.rpartition(b"/")[0] or b"/"
    try:
        numbers = guest.handle.statvfs(directory.decode())
    except RuntimeError:
        return False  # what failed is worse than a lack of room
    return bool(numbers["bavail"] < 16 or (inodes and numbers["favail"] == 0))


def _explain(guest: LibguestfsGuest, directory: bytes, error: CallFailed) -> None:
    if guest.interrupted():
        raise error
    if is_full(guest, directory):
        raise ImgtoolError(
            "no space left on the guest's filesystem; nothing was copied",
            subject=printable(directory),
            hint="'imgtool df' shows the space, 'imgtool df -i' the inodes",
        ) from error
    raise error
