"""copy-in: host files, as a tar stream of our own making, into a directory of a guest."""

from __future__ import annotations

import math
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from imgtool.errors import (
    HostError,
    ImgtoolError,
    NotInGuestError,
    RefusedError,
    UsageError,
    host_file_error,
)
from imgtool.guest.changes import Kept
from imgtool.guest.guest import Guest, OnProblem, OnProgress
from imgtool.text import printable
from imgtool.transfer.archive import members
from imgtool.transfer.keeping import LeftBehind
from imgtool.transfer.staging import BadName, split

if TYPE_CHECKING:
    from imgtool.guest.writable import WritableGuest

_TIME = re.compile(r"-?\d{1,18}(\.\d{1,18})?")


@dataclass(frozen=True)
class Ownership:
    """Who owns what is copied: numbers, or None for the owner of what is replaced, and of a new
    file root; with `of_source` the numbers that the source has, in place of both."""

    user: int | None = None
    group: int | None = None
    of_source: bool = False

    def kept(self, mode: int | None) -> Kept:
        """What a file keeps of the one that it replaces, where its mode may be given."""
        if self.of_source:
            return Kept()
        return Kept(user=self.user is None, group=self.group is None, mode=mode is None)

    def give(self, member: tarfile.TarInfo) -> None:
        """Give it to a member of a stream."""
        if not self.of_source:
            member.uid, member.gid = self.user or 0, self.group or 0


def split_owner(owner: str | None, group: str | None) -> tuple[str, str]:
    """The user and the group in `USER`, `USER:GROUP` or `:GROUP`, and in the name of a group; empty
    where none is given. Raises `UsageError`.
    """
    user, colon, of_owner = (owner or "").partition(":")
    if owner is not None and not (user or of_owner):
        raise UsageError("--owner takes USER, USER:GROUP or :GROUP", subject=owner)
    if owner is not None and colon and not of_owner:
        raise UsageError("a group is missing after the colon", subject=owner)
    if group is not None and of_owner:
        raise UsageError("the group is given twice", subject=f"{owner} and {group}")
    if group == "":
        raise UsageError("--group takes GROUP", subject=group)
    return user, group or of_owner


def find_ownership(guest: Guest, user: str, group: str) -> Ownership:
    """The owner that is named, by names that the guest has or by numbers; empty for nobody.

    Raises `NotInGuestError` for an unknown name.
    """
    owners = guest.owners()
    return Ownership(
        user=owners.user_number(user) if user else None,
        group=owners.group_number(group) if group else None,
    )


def destination(guest: Guest, typed: str, *, single: bool) -> tuple[bytes, bytes | None]:
    """The directory to copy into and, for a single source, the new name that it gets there.

    A destination that does not exist is the new name of a single source if its parent exists.
    Raises `NotInGuestError` where it leads nowhere, `RefusedError` if it is no directory.
    """
    try:
        found = guest.resolve(typed)
    except NotInGuestError:
        parent, _, name = guest.path(typed).rpartition(b"/")
        if not single or typed.endswith("/") or not name:
            raise
        return guest.resolve(parent or b"/"), name
    kind = guest.lstat(found).type
    if kind == "directory":
        return found, None
    if not single:
        raise RefusedError("the destination is not a directory", subject=printable(found))
    parent, _, name = found.rpartition(b"/")
    return parent or b"/", name


@dataclass(frozen=True)
class Plan:
    """Sources that can all be read, and the bytes that they hold."""

    sources: tuple[Path, ...]
    total: int


def _below(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A host path and everything below it, parents first; links are not followed."""
    status = path.lstat()
    yield path, status
    if stat.S_ISDIR(status.st_mode):
        for child in sorted(path.iterdir()):
            yield from _below(child)


def plan_sources(sources: Sequence[Path]) -> Plan:
    """Look at every source before anything is started; raises for one that cannot be read."""
    total = 0
    names: set[str] = set()
    for source in sources:
        name = _top_name(source)
        if name in names:
            raise UsageError("two sources have the same name", subject=name)
        names.add(name)
        try:
            for path, status in _below(source):
                if stat.S_ISREG(status.st_mode):
                    total += status.st_size
                    if not os.access(path, os.R_OK, effective_ids=True):
                        raise HostError("cannot be read: permission denied", subject=path)
        except OSError as error:
            if isinstance(error, ImgtoolError):
                raise
            raise _unreadable(error, source) from error
    return Plan(tuple(sources), total)


def _unreadable(error: OSError, path: Path) -> ImgtoolError:
    return host_file_error("cannot be read", error, subject=error.filename or path)


def _top_name(source: Path) -> str:
    name = source.name or source.resolve().name
    if name in ("", ".", ".."):
        name = source.resolve().name
    if not name:
        raise UsageError("this source has no name of its own", subject=source)
    return name


class _Packer:
    """Host files as tar members.

    PAX headers carry nanoseconds. A name that is not UTF-8 cannot stand in them: such a member is
    written in the GNU format, where names are bytes, and its time is in seconds.
    """

    def __init__(self, out: BinaryIO, owner: Ownership, mode: int | None) -> None:
        self._tar = tarfile.open(  # noqa: SIM115 - closed by __exit__()
            fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape"
        )
        self._owner = owner
        self._mode = mode
        self._links: dict[tuple[int, int], str] = {}

    def add(self, member: tarfile.TarInfo, content: BinaryIO | None) -> None:
        self._owner.give(member)
        member.uname = member.gname = ""
        if self._mode is not None and member.isreg():
            member.mode = self._mode
        try:
            (member.name + member.linkname).encode("utf-8")
            self._tar.format = tarfile.PAX_FORMAT
        except UnicodeEncodeError:
            self._tar.format = tarfile.GNU_FORMAT
            member.mtime = int(member.mtime)
            member.pax_headers = {}
        self._tar.addfile(member, content)
        self._tar.members.clear()  # type: ignore[attr-defined]

    def host_file(
        self, path: Path, name: str, status: os.stat_result, content: BinaryIO | None
    ) -> None:
        member = tarfile.TarInfo(name)
        member.mode = stat.S_IMODE(status.st_mode)
        member.uid, member.gid = status.st_uid, status.st_gid
        member.mtime = status.st_mtime_ns // 1_000_000_000
        sign = "-" if status.st_mtime_ns < 0 else ""
        seconds, nanoseconds = divmod(abs(status.st_mtime_ns), 1_000_000_000)
        if nanoseconds:
            member.pax_headers = {"mtime": f"{sign}{seconds}.{nanoseconds:09d}"}
        if stat.S_ISDIR(status.st_mode):
            member.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(status.st_mode):
            member.type = tarfile.SYMTYPE
            # Not Path.readlink(), which tidies the target: './x' would arrive as 'x'.
            member.linkname = os.readlink(path)  # noqa: PTH115
        else:
            inode = (status.st_dev, status.st_ino)
            if inode in self._links:
                member.type = tarfile.LNKTYPE
                member.linkname = self._links[inode]
                content = None
            else:
                member.size = status.st_size
                if status.st_nlink > 1:
                    self._links[inode] = name
        self.add(member, content)

    def __enter__(self) -> _Packer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._tar.close()
        else:  # no end for a stream that is not whole, nor a late write of what is buffered
            self._tar.fileobj.closed = True  # type: ignore[attr-defined]


class _Counted:
    """A file of which exactly `size` bytes are read, whatever happens to it meanwhile."""

    def __init__(self, path: Path, file: BinaryIO, size: int, advance: OnProgress) -> None:
        self._path, self._file, self._left, self._advance = path, file, size, advance

    def read(self, count: int) -> bytes:
        block = self._file.read(min(count, self._left))
        if len(block) < min(count, self._left):
            raise ImgtoolError("became shorter while it was read", subject=self._path)
        self._left -= len(block)
        self._advance(len(block), 0)
        return block


def copy_in(
    guest: WritableGuest,
    plan: Plan,
    dest: str,
    *,
    owner: Ownership,
    mode: int | None,
    on_skipped: OnProblem,
    on_progress: OnProgress | None = None,
) -> None:
    """Copy the sources into the directory `dest` of the guest, all of them or nothing.

    Modes, times, symbolic and hard links are kept; a file that replaces another has its owner and
    mode, unless they are given. A single source may be given a new name by a `dest` that does not
    exist.
    """
    directory, rename = destination(guest, dest, single=len(plan.sources) == 1)
    left = LeftBehind()
    done = 0

    def advance(count: int, _: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, plan.total)

    def pack(packer: _Packer, source: Path) -> None:
        top = _top_name(source)
        for path, status in _below(source):
            relative = path.relative_to(source)
            name = top if relative == Path() else f"{top}/{relative}"
            kind = stat.S_IFMT(status.st_mode)
            if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                left.host_file(path)
            if kind == stat.S_IFREG:
                # Opened once, its size asked of what is open: no other file can slip in.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(path, flags)
                now = os.fstat(descriptor)
                if not stat.S_ISREG(now.st_mode):
                    os.close(descriptor)
                    raise ImgtoolError("changed while it was read", subject=path)
                with os.fdopen(descriptor, "rb") as file:
                    content = _Counted(path, file, now.st_size, advance)
                    packer.host_file(path, name, now, content)  # type: ignore[arg-type]
            elif kind in (stat.S_IFDIR, stat.S_IFLNK):
                packer.host_file(path, name, status, None)
            else:
                on_skipped(os.fsencode(path), "a device, fifo or socket is not copied")

    def produce(out: BinaryIO) -> None:
        with _Packer(out, owner, mode) as packer:
            for source in plan.sources:
                try:
                    pack(packer, source)
                except OSError as error:
                    if isinstance(error, (ImgtoolError, BrokenPipeError)):
                        raise
                    raise _unreadable(error, source) from error

    guest.put(directory, produce, rename=rename, kept=owner.kept(mode))
    if line := left.line():
        on_skipped(os.fsencode(dest), line)


def tar_in(
    guest: WritableGuest,
    stream: BinaryIO,
    dest: str,
    *,
    owner: Ownership,
    mode: int | None,
    on_skipped: OnProblem,
) -> None:
    """Unpack a tar stream of the user's into a directory of the guest, all of it or nothing.

    Raises `ImgtoolError` for a stream that is no tar
    or has names that lead elsewhere.
    """
    directory, _ = destination(guest, dest, single=False)
    left = LeftBehind()

    def produce(out: BinaryIO) -> None:
        try:
            with _Packer(out, owner, mode) as packer:
                for member, content in members(stream, plain=False):
                    member.name = _safe(member.name)
                    if not member.name:
                        continue
                    if member.islnk():
                        member.linkname = _safe(member.linkname)
                    left.headers(member.pax_headers)
                    _forget_extensions(member)
                    packer.add(member, content)  # type: ignore[arg-type]
        except (tarfile.TarError, EOFError) as error:
            raise ImgtoolError(f"not a whole tar stream: {error}", subject="-") from error

    guest.put(directory, produce, kept=replace(owner.kept(mode), mode=False))
    if line := left.line():
        on_skipped(os.fsencode(dest), line)


def _forget_extensions(member: tarfile.TarInfo) -> None:
    """Leave only the time in the extended headers: they would win over name, owner and size."""
    time = member.pax_headers.get("mtime", "")
    member.pax_headers = {"mtime": time} if _TIME.fullmatch(time) else {}
    if not math.isfinite(member.mtime):
        member.mtime = 0
    if member.issparse():
        member.type = tarfile.REGTYPE  # its content comes without holes


def _safe(name: str) -> str:
    try:
        return b"/".join(split(name.encode("utf-8", "surrogateescape"))).decode(
            "utf-8", "surrogateescape"
        )
    except BadName:
        raise ImgtoolError(
            "a name in the stream leads outside the destination; nothing was copied", subject=name
        ) from None
