"""Writing hostile content below a host folder, whole or not at all.

Everything is written into a private folder beside its final name and moved into place at the end.
Every component of a name that came from a guest is opened relative to its folder's descriptor and
never through a symbolic link: nothing in the content, and nobody who swaps a folder meanwhile, can
make a write land elsewhere. Special files are not made; setuid and setgid bits stay only together
with their owner.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from imgtool.errors import (
    NO_ROOM,
    EngineError,
    ImgtoolError,
    NotInGuestError,
    RefusedError,
    host_file_error,
)
from imgtool.formats.xattrs import Xattrs
from imgtool.host import scratch
from imgtool.host.libc import libc
from imgtool.image.chain.guest_files import GuestFiles
from imgtool.image.intent.intent_log import is_ours
from imgtool.transfer import folders
from imgtool.transfer.keeping import set_all
from imgtool.transfer.writes import Writes

_TOP = b"content"
_PREFIX = b".imgtool-"
_STAGED = re.compile(rb"\.imgtool-[0-9a-f]{12}")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
# What is wrong with one name or file, not with the destination.
_OF_ONE_NAME = frozenset(
    (
        errno.EEXIST,
        errno.EFBIG,
        errno.EILSEQ,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMLINK,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EOPNOTSUPP,
        errno.EPERM,
    )
)


class BadName(ImgtoolError):
    """Something in the content that cannot be made on the host, such as a name with `..` in it."""


@dataclass(frozen=True)
class Attributes:
    """What a host file gets: `st_mode`, numeric owner, mtime in nanoseconds, attributes."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Xattrs = ()


def split(path: bytes) -> tuple[bytes, ...]:
    """The components of a relative path; `BadName` if one of them could lead elsewhere."""
    parts = tuple(part for part in path.split(b"/") if part not in (b"", b"."))
    if path.startswith(b"/") or b".." in parts or b"\0" in path:
        raise BadName("a name in the guest would lead outside the destination; it was left out")
    if any(is_ours(os.fsdecode(part)) for part in parts):
        raise BadName(
            "imgtool takes such a name for its own; it was left out (cat and tar give it)"
        )
    return parts


def _is_own(folder: int, parent: int) -> bool:
    """Whether a private folder can be this user's, who alone can have been in it."""
    status, above = os.fstat(folder), os.fstat(parent)
    user = os.geteuid()
    # FAT and others know no modes: there it is enough that all is the user's.
    return status.st_uid == user and (above.st_uid == user or status.st_mode & 0o777 == 0o700)


def _is_as_made(folder: int) -> bool:
    """Whether a folder is one that this process has just made, and not another one that was put in
    its place: it is empty, and has the owner and the mode that one has that is made in it now."""
    if os.listdir(folder):
        return False
    os.mkdir(_TOP, 0o700, dir_fd=folder)
    made = os.lstat(_TOP, dir_fd=folder)
    os.rmdir(_TOP, dir_fd=folder)
    status = os.fstat(folder)
    return (status.st_uid, status.st_mode) == (made.st_uid, made.st_mode)


def _is_staged(folder: int) -> bool:
    """Whether it holds nothing but what a copy puts in its private folder.

    The owner of the folder that it is in can give any other one such a name.
    """
    names = os.listdir(folder)
    return all(name == os.fsdecode(_TOP) or name.isdecimal() for name in names)


def _remove_left_behind(parent: int) -> None:
    """Remove the private folders of this user's copies that were killed; root removes no others."""
    for name in map(os.fsencode, os.listdir(parent)):
        if not _STAGED.fullmatch(name):
            continue
        with contextlib.suppress(OSError):  # it went meanwhile, or is no folder
            folder = os.open(name, _FOLDER, dir_fd=parent)
            try:
                if _is_own(folder, parent) and scratch.is_left(folder) and _is_staged(folder):
                    _empty(folder)
                    os.rmdir(name, dir_fd=parent)
            finally:
                os.close(folder)


def _empty(top: int) -> None:
    """Remove all that is in a folder. A tree may be deeper than descriptors, paths and recursion
    reach: its directories are moved up to be emptied there."""
    moved = 0
    while names := os.listdir(top):
        for name in names:
            if _unlink(name, top):
                continue
            folder = os.open(name, _FOLDER, dir_fd=top)
            try:
                for child in os.listdir(folder):  # noqa: PTH208
                    if not _unlink(child, folder):
                        moved += 1
                        os.rename(child, str(moved), src_dir_fd=folder, dst_dir_fd=top)
            finally:
                os.close(folder)
            os.rmdir(name, dir_fd=top)


def _unlink(name: str, folder: int) -> bool:
    """Whether it was a file and is gone; a directory is made writable instead."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        folders.change_mode(name, folder, 0o700)
        return False
    return True


class Staging:
    """One top-level result, `parent/name`, on its way. `commit()` moves it into place.

    Paths are relative to the result, `b""` being the result itself. `owners` is whether content
    gets its guest's numeric owners. None of `kept` is replaced. Host errors are raised as
    `ImgtoolError`.
    """

    def __init__(
        self,
        parent: Path,
        name: bytes,
        *,
        overwrite: bool = False,
        owners: bool | None = None,
        kept: GuestFiles | None = None,
    ) -> None:
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise BadName("not a file name", subject=os.fsdecode(name))
        split(name)
        self._parent = parent
        self._name = name
        self._overwrite = overwrite
        self._owners = os.geteuid() == 0 if owners is None else owners
        self._kept = kept
        self._folder = _PREFIX + secrets.token_hex(6).encode()
        self._cached: tuple[tuple[bytes, ...], int] | None = None

    @property
    def final(self) -> Path:
        """Where the result goes."""
        return self._parent / os.fsdecode(self._name)

    def __enter__(self) -> Staging:
        with self._explain_errors():
            # The user named the parent: links in it are the user's own.
            self._parent_fd = os.open(self._parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._refuse_existing()
                _remove_left_behind(self._parent_fd)
                os.mkdir(self._folder, 0o700, dir_fd=self._parent_fd)
                self._root_fd = os.open(self._folder, _FOLDER, dir_fd=self._parent_fd)
                if not _is_as_made(self._root_fd):
                    os.close(self._root_fd)
                    raise RefusedError(
                        "somebody put another folder in the place of a private one",
                        subject=self._parent,
                        hint="copy to a folder that only you can write to",
                    )
                scratch.is_in_use(self._root_fd)
            except BaseException:
                os.close(self._parent_fd)
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._forget()
        with contextlib.suppress(OSError):
            _empty(self._root_fd)
            os.rmdir(self._folder, dir_fd=self._parent_fd)
        os.close(self._root_fd)
        os.close(self._parent_fd)

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, ImgtoolError):
                raise
            hint = None
            if error.errno in _OF_ONE_NAME:
                reason = (error.strerror or "").lower()
                raise BadName(f"cannot be written: {reason}", subject=self.final) from error
            if error.errno in NO_ROOM:
                hint = "nothing was left at the destination; free some space or choose another"
            raise host_file_error(
                "cannot be written", error, subject=self.final, hint=hint
            ) from error

    def _exists(self) -> bool:
        try:
            os.lstat(self._name, dir_fd=self._parent_fd)
        except FileNotFoundError:
            return False
        return True

    def _refuse_existing(self) -> None:
        if not self._overwrite and self._exists():
            raise RefusedError("exists", subject=self.final, hint="replace it: --overwrite")
        if self._kept is not None and not folders.is_folder(self._name, self._parent_fd):
            self._kept.refuse(self._name, self._parent_fd, shown=self.final)

    # Folders

    def _forget(self) -> None:
        if self._cached is not None:
            os.close(self._cached[1])
            self._cached = None

    def _open_folder(self, parts: tuple[bytes, ...]) -> int:
        """A descriptor of a folder of the result, good until the next call."""
        known, start = self._cached or ((), self._root_fd)
        if known == parts:
            return start
        if parts[: len(known)] != known:
            known, start = (), self._root_fd
        current = os.dup(start)
        try:
            for part in parts[len(known) :]:
                below = os.open(part, _FOLDER, dir_fd=current)
                os.close(current)
                current = below
        except BaseException:
            os.close(current)
            raise
        self._forget()
        self._cached = (parts, current)
        return current

    def _place(self, path: bytes) -> tuple[int, bytes]:
        parts = (_TOP, *split(path))
        return self._open_folder(parts[:-1]), parts[-1]

    # Content

    def directory(self, path: bytes) -> None:
        """Make a directory; one that is there already stays."""
        with self._explain_errors():
            folder, name = self._place(path)
            try:
                os.mkdir(name, 0o700, dir_fd=folder)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                    raise

    def file(self, path: bytes, blocks: Iterable[bytes], *, size: int | None = None) -> int:
        """Make a regular file of the bytes given, with holes for zeros; returns its length.

        Only an error of the host is raised as such; what `blocks` raises goes on as it is and
        leaves the bytes so far.
        """
        return self.file_at(path, self._number_blocks(blocks), size=size)

    @staticmethod
    def _number_blocks(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        offset = 0
        for block in blocks:
            yield offset, block
            offset += len(block)

    def file_at(
        self, path: bytes, pieces: Iterable[tuple[int, bytes]], *, size: int | None = None
    ) -> int:
        """Make a regular file of (offset, bytes); what is between them, up to `size`, is a hole.

        Where the guest ends them with an error, the file has what came before it.
        """
        with self._explain_errors():
            folder, name = self._place(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o600, dir_fd=folder)
        end = 0
        try:
            with contextlib.closing(Writes(file)) as writes:
                try:
                    for offset, piece in pieces:
                        with self._explain_errors():
                            writes.add(offset, piece)
                        end = max(end, offset + len(piece))
                except (EngineError, NotInGuestError):
                    size = None
                    raise
                finally:
                    with self._explain_errors():
                        writes.finish()
                        os.ftruncate(file, end if size is None else size)
        finally:
            os.close(file)
        return end

    def symlink(self, path: bytes, target: bytes) -> None:
        """Make a symbolic link; its target is data and is not looked at."""
        if b"\0" in target:
            raise BadName("a symbolic link in the guest leads nowhere; it was left out")
        with self._explain_errors():
            folder, name = self._place(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            os.symlink(target, name, dir_fd=folder)

    def hardlink(self, path: bytes, existing: bytes) -> None:
        """Make another name of a file of this result."""
        parts = (_TOP, *split(existing))
        with self._explain_errors():
            source = os.dup(self._open_folder(parts[:-1]))
            try:
                folder, name = self._place(path)
                if not stat.S_ISREG(os.lstat(parts[-1], dir_fd=source).st_mode):
                    raise BadName("a hard link in the guest leads to no file; it was left out")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                os.link(
                    parts[-1],
                    name,
                    src_dir_fd=source,
                    dst_dir_fd=folder,
                    follow_symlinks=False,
                )
            finally:
                os.close(source)

    def remove(self, path: bytes) -> None:
        """Remove a file of the result, if it is there."""
        with self._explain_errors(), contextlib.suppress(FileNotFoundError):
            folder, name = self._place(path)
            os.unlink(name, dir_fd=folder)

    def finish(
        self, path: bytes, attributes: Attributes, on_refused: Callable[[bytes], None] | None = None
    ) -> bool:
        """Give a name of the result its attributes; False if it is not there. `on_refused` gets the
        names of extended attributes that the host does not take.

        Directories come last, when nothing is made in them any more.
        """
        with self._explain_errors():
            try:
                folder, name = self._place(path)
                there = os.lstat(name, dir_fd=folder)
            except (FileNotFoundError, NotADirectoryError):
                return False
            if self._owners:
                try:
                    os.chown(
                        name, attributes.uid, attributes.gid, dir_fd=folder, follow_symlinks=False
                    )
                except OverflowError:
                    raise BadName("the host has no such owner") from None
            if attributes.xattrs:
                # A new owner takes some of them away, a mode without `w` does not let them in.
                at = b"/proc/self/fd/%d/%b" % (folder, name)
                set_all(at, attributes.xattrs, on_refused or (lambda name: None))
            if not stat.S_ISLNK(there.st_mode):
                bits = stat.S_IMODE(attributes.mode)
                if not self._owners:
                    bits &= ~(stat.S_ISUID | stat.S_ISGID)
                # Only names that were just made, as no link, in a private folder are changed.
                os.chmod(name, bits, dir_fd=folder)
            times = (attributes.mtime_ns, attributes.mtime_ns)
            with contextlib.suppress(OverflowError):  # a time that the host cannot hold
                os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
        return True

    # The end

    def commit(self) -> None:
        """Move the result to its final name; `RefusedError` if something else got there first."""
        self._forget()
        with self._explain_errors(), folders.movable(_TOP, self._root_fd):
            if self._move():
                return
            self._refuse_existing()
            self._replace()

    def _move(self) -> bool:
        """Move the result to a name that does not exist; False if it does."""
        if not libc.renameat2(self._root_fd, _TOP, self._parent_fd, self._name, _RENAME_NOREPLACE):
            return True
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS) and not self._exists():
            # A filesystem, or a kernel, without RENAME_NOREPLACE.
            os.rename(_TOP, self._name, src_dir_fd=self._root_fd, dst_dir_fd=self._parent_fd)
            return True
        if code in (errno.EEXIST, errno.EINVAL, errno.ENOSYS):
            return False
        raise OSError(code, os.strerror(code))

    def _replace(self) -> None:
        ours = folders.is_folder(_TOP, self._root_fd)
        if ours != folders.is_folder(self._name, self._parent_fd):
            raise self._mismatch(self._name)
        if not ours:
            os.rename(_TOP, self._name, src_dir_fd=self._root_fd, dst_dir_fd=self._parent_fd)
            return
        source = os.open(_TOP, _FOLDER, dir_fd=self._root_fd)
        try:
            target = os.open(self._name, _FOLDER, dir_fd=self._parent_fd)
            try:
                # All of it is looked at before the first file is replaced.
                wrong = folders.conflict(source, target, self._refuse_kept)
                if wrong is not None:
                    raise self._mismatch(wrong)
                folders.merge(source, target)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _refuse_kept(self, path: bytes, folder: int, name: bytes) -> None:
        if self._kept is not None:
            self._kept.refuse(name, folder, shown=self.final / os.fsdecode(path))

    def _mismatch(self, path: bytes) -> RefusedError:
        return RefusedError(
            "a directory and something else have the same name",
            subject=self.final,
            hint=f"move {os.fsdecode(path)!r} out of the way",
        )
