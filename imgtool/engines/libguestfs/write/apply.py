"""What was planned is written into a guest in few calls: one tar for all that is new.

To be used in a transaction, which makes it whole or nothing.
"""

from __future__ import annotations

import io
import os
import shlex
import stat
import tarfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from imgtool.engines.libguestfs.guest.calls import CallFailed
from imgtool.engines.libguestfs.guest.stream import upload
from imgtool.engines.libguestfs.write.changing import explain, rewrite_from
from imgtool.engines.libguestfs.write.writing import Labels, is_full
from imgtool.errors import EngineError, HostError, ImgtoolError, RefusedError
from imgtool.guest.changes import Changes, Content
from imgtool.guest.model import Entry
from imgtool.text import printable

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest

# Paths of one command in the appliance.
_BATCH = 500
# libguestfs takes 4 MiB in one message.
_MESSAGE = 1 << 20
_WITHOUT_LABELS = ("vfat", "ntfs", "exfat", "iso9660", "udf")


def apply_changes(guest: LibguestfsGuest, changes: Changes) -> bool:
    """Write all of it; whether relabelling, if that was asked for, found a wrong label.

    Raises `RefusedError` if the guest is not any more what the plan was made for, `ImgtoolError`
    where its filesystem is full, and `HostError` where files need SELinux labels and the appliance
    cannot give them.
    """
    guest.mount_layout()
    refuse_if_changed(guest, changes)
    made = {os.fsdecode(entry.path) for entry, _ in changes.made}
    for path in changes.removed:
        before = changes.seen[path]
        # tar takes away what is in the place of a new file, but no folder.
        if path not in made or (before is not None and before.type == "directory"):
            guest.calls.rm_rf(os.fsencode(path))
    if changes.made:
        _unpack(guest, changes.made)
        # What is unpacked at the root may be on any of the guest's filesystems.
        guest.calls.touched |= {entry.path for entry, _ in changes.made}
        labels = Labels(guest)
        if labels.contexts is not None:
            tops = sorted(path for path in made if path.rpartition("/")[0] not in made)
            _label(guest, labels.contexts, tops)
    for path, content in changes.rewritten:
        _rewrite(guest, path, content)
    for path, owner in changes.owners:
        guest.calls.chown(os.fsencode(path), *owner)
    for path, mode in changes.modes:
        guest.calls.chmod(os.fsencode(path), mode)
    return changes.relabel and relabel_files(guest)


def refuse_if_changed(guest: LibguestfsGuest, changes: Changes) -> None:
    """Raises `RefusedError` if something is not as it was when the plan was made."""
    paths = [os.fsencode(path) for path in changes.seen if path != "/"]
    # A folder that was not there cannot be asked for what is in it.
    gone = {path for path, entry in changes.seen.items() if entry is None}
    asked = [p for p in paths if os.fsdecode(p).rpartition("/")[0] not in gone]
    for path, now in zip(asked, guest.calls.lstats(asked), strict=True):
        if _facts(now) != _facts(changes.seen[os.fsdecode(path)]):
            raise RefusedError(
                "the guest changed while it was looked at; nothing was written",
                subject=printable(path),
            )


def _facts(entry: Entry | None) -> tuple[object, ...] | None:
    if entry is None:
        return None
    size = None if entry.type == "directory" else entry.size
    return entry.mode, entry.uid, entry.gid, size, entry.mtime_ns, entry.target


def _rewrite(guest: LibguestfsGuest, path: str, content: Content) -> None:
    """Replace the content of a file, which stays the same file."""
    where = os.fsencode(path)
    # Only programs have capabilities, which a write takes away and `rewrite_from` gives back.
    entry = guest.calls.lstat(where)
    if isinstance(content, Path) or len(content) > _MESSAGE or entry.mode & 0o111:
        rewrite_from(guest, where, partial(_write, content))
        return
    try:
        # In one message: an upload takes half a second without KVM, whatever its size.
        guest.calls.write(where, content)
    except CallFailed as error:
        raise explain(guest, where, error) from error


def _write(content: Content, out: BinaryIO) -> None:
    if isinstance(content, bytes):
        out.write(content)
        return
    with content.open("rb") as file:
        while block := file.read(1 << 20):
            out.write(block)


def _unpack(guest: LibguestfsGuest, made: Sequence[tuple[Entry, Content | None]]) -> None:
    now = int(time.time())

    def produce(out: BinaryIO) -> None:
        with tarfile.open(
            fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, errors="surrogateescape"
        ) as archive:
            for entry, content in made:
                member = tarfile.TarInfo(os.fsdecode(entry.path).lstrip("/"))
                member.mode, member.mtime = stat.S_IMODE(entry.mode), now
                member.uid, member.gid = entry.uid, entry.gid
                if entry.type == "directory":
                    member.type = tarfile.DIRTYPE
                elif entry.type == "symlink":
                    member.type = tarfile.SYMTYPE
                    member.linkname = os.fsdecode(entry.target or b"")
                _add(archive, member, content)

    with guest.cancellable():
        try:
            upload(lambda name: guest.calls.tar_in(name, b"/"), produce)
        except CallFailed as error:
            _explain(guest, made, error)


def _add(archive: tarfile.TarFile, member: tarfile.TarInfo, content: Content | None) -> None:
    if isinstance(content, Path):
        with content.open("rb") as file:
            member.size = os.fstat(file.fileno()).st_size
            try:
                archive.addfile(member, file)
            except tarfile.ReadError as error:  # what tarfile says of a short file
                raise ImgtoolError("became shorter while it was read", subject=content) from error
        return
    member.size = len(content or b"")
    archive.addfile(member, io.BytesIO(content or b""))


def _explain(
    guest: LibguestfsGuest, made: Sequence[tuple[Entry, Content | None]], error: CallFailed
) -> None:
    if guest.interrupted():
        raise error
    folders = {entry.path.rpartition(b"/")[0] or b"/" for entry, _ in made}
    for folder in sorted(folders, key=len):
        if is_full(guest, folder):
            raise ImgtoolError(
                "no space left on the guest's filesystem; nothing was changed",
                subject=printable(folder),
                hint="'imgtool df' shows the space, 'imgtool df -i' the inodes",
            ) from error
    raise error


def _setfiles(guest: LibguestfsGuest, contexts: str, paths: Sequence[str], *more: str) -> bytes:
    """Label what is at the paths and below, by setfiles of the appliance; what it says."""
    policy = os.fsdecode(guest.resolve(contexts))
    # -m: the appliance's kernel has no SELinux, so that none of its mounts says that it has labels.
    words = ["setfiles", "-F", "-m", *more, "-r", "/sysroot"]
    words += [shlex.quote(f"/sysroot{path}") for path in (policy, *paths)]
    where = os.fsencode(paths[0])
    try:
        with guest.cancellable():
            return guest.calls.shell(where, [os.fsencode(word) for word in words])
    except CallFailed as error:
        raise EngineError(
            f"the SELinux labels cannot be set: {error.message}", subject=printable(where)
        ) from error


def _label(guest: LibguestfsGuest, contexts: str, paths: Sequence[str]) -> None:
    for start in range(0, len(paths), _BATCH):
        _setfiles(guest, contexts, paths[start : start + _BATCH], "-q")


def relabel_files(guest: LibguestfsGuest) -> bool:
    """Give every file the label of the guest's policy; whether one had another.

    Raises `HostError` if the appliance cannot, and `ImgtoolError` for a guest without SELinux.
    """
    contexts = Labels(guest).contexts
    if contexts is None:
        raise ImgtoolError("the guest does not use SELinux", subject=guest.image)
    guest.mount_layout()
    kernels = ("/dev", "/proc", "/sys")
    found = guest.calls.lstats([os.fsencode(path) for path in kernels])
    left_out = [path for path, entry in zip(kernels, found, strict=True) if entry is not None]
    for mount in guest.layout.mounts:
        if mount.mountpoint in guest.unshown():
            raise HostError(
                "a filesystem that could not be mounted cannot be relabelled",
                subject=mount.mountpoint,
            )
        if guest.handle.vfs_type(mount.source.removeprefix("btrfsvol:")) in _WITHOUT_LABELS:
            left_out.append(mount.mountpoint)
    guest.calls.touched |= {
        os.fsencode(mount.mountpoint)
        for mount in guest.layout.mounts
        if mount.mountpoint not in left_out
    }
    words = [word for path in left_out for word in ("-e", shlex.quote(f"/sysroot{path}"))]
    said = _setfiles(guest, contexts, ["/"], "-v", *words)
    return any(line.startswith(b"Relabeled ") for line in said.splitlines())
