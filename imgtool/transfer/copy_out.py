"""copy-out: a path of a guest, as it is, to a place on the host."""

from __future__ import annotations

import contextlib
import marshal
import os
import re
import tarfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO

from imgtool.errors import (
    EngineError,
    ImgtoolError,
    NotInGuestError,
    RefusedError,
    UsageError,
)
from imgtool.guest.guest import Guest, OnProblem, OnProgress
from imgtool.guest.model import Entry
from imgtool.host.scratch import large_files
from imgtool.image.chain.guest_files import GuestFiles
from imgtool.text import typed
from imgtool.transfer.archive import members
from imgtool.transfer.keeping import Keeping
from imgtool.transfer.staging import Attributes, BadName, Staging

# From this size a file that has holes is fetched by its ranges of data, not through the tar stream.
SPARSE = 16 << 20
BLOCK = 2 << 20
_MOST_SPARSE = 4 << 20  # bytes of paths that are kept out of the tar stream by name
_MOST_REMEMBERED = 256 << 20  # bytes of paths that are looked up again
_ABOUT_ONE = 200  # bytes that go with a path that is remembered
_GLOB = re.compile(rb"([*?\[\]\\])")
_COPIED = ("file", "directory", "symlink")
_KINDS = {
    **{"char": "character device", "block": "block device"},
    **{kind: kind for kind in ("fifo", "socket")},
}


@dataclass(frozen=True)
class Report:
    """Where lines go: problems (status 1), names left out on purpose, progress in bytes.

    `xattrs` says which extended attributes are kept, and counts the others.
    """

    problem: OnProblem
    skipped: OnProblem
    progress: OnProgress | None = None
    xattrs: Keeping = field(default_factory=Keeping)


def _last(source: str) -> str:
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2]


def check_destination(sources: Sequence[str], dest: str | Path, *, overwrite: bool) -> None:
    """Refuse a destination that cannot be right, before anything is opened."""
    folder, dest = str(dest).endswith("/"), Path(dest)
    names = [_last(source) for source in sources]
    for name in names:
        if name and names.count(name) > 1 and dest.is_dir():
            raise UsageError("two sources would have the same name", subject=dest / name)
    if dest.is_dir():
        if not os.access(dest, os.W_OK | os.X_OK):
            raise ImgtoolError("the destination is not writable", subject=dest)
        for name in names:
            if name and os.path.lexists(dest / name) and not overwrite:
                raise RefusedError("exists", subject=dest / name, hint="replace it: --overwrite")
        return
    if folder and not os.path.lexists(dest):
        raise ImgtoolError("no such directory", subject=dest, hint=f"mkdir -p {typed(dest)}")
    if os.path.lexists(dest):
        if folder:
            raise ImgtoolError("not a directory", subject=dest)
        if len(sources) > 1:
            raise UsageError("several sources need a directory to go to", subject=dest)
        if not overwrite:
            raise RefusedError("exists", subject=dest, hint="replace it: --overwrite")
        return
    if len(sources) > 1:
        raise ImgtoolError("no such directory", subject=dest, hint=f"mkdir -p {typed(dest)}")
    if not (parent := dest.absolute().parent).is_dir():
        if os.path.lexists(parent):
            raise ImgtoolError("not a directory", subject=dest.parent)
        raise ImgtoolError(
            "no such directory", subject=dest.parent, hint=f"mkdir -p {typed(dest.parent)}"
        )


def refuse_guest_files(guest: Guest, sources: Sequence[str], dest: str | Path) -> None:
    """Refuse a destination that is a file which the guest is read from, before anything is copied;
    `copy_out` does so for each file that it would replace in a directory."""
    kept, dest = GuestFiles(guest.chains), Path(dest)
    for place in (dest, *(dest / _last(source) for source in sources)):
        if not place.is_dir():
            kept.refuse(place)


def tar_out(guest: Guest, source: str, out: BinaryIO, on_problem: OnProblem | None = None) -> None:
    """Write a directory's content to `out` as a tar stream, untouched, with all attributes; of
    those that cannot be read `on_problem` is told.
    """
    path = guest.resolve(guest.path(source))
    if guest.lstat(path).type != "directory":
        raise UsageError("a tar stream is made of a directory", subject=source)
    GuestFiles(guest.chains).refuse_output(out)
    with guest.tar(path, xattrs=True, on_problem=on_problem) as stream:
        while block := stream.read(BLOCK):
            out.write(block)
    out.flush()


def copy_out(
    guest: Guest,
    source: str,
    dest: Path,
    report: Report,
    *,
    overwrite: bool = False,
    keep_partial: bool = False,
) -> None:
    """Copy one path of a guest into the directory `dest`, or to that name where it is none.

    Files, directories and symbolic links keep modes, times, holes and, as root, owners. Everything
    is written beside its final name and moved there at the end. The result is called what was
    typed, never what the guest says that a link leads to.
    """
    typed = guest.path(source)
    entry = guest.lstat(source)
    name = _name(typed, entry)
    if source.endswith("/"):
        entry = guest.lstat(guest.resolve(typed))
    if not name and dest.is_dir():  # the root of the guest: what is in it
        with TemporaryFile(prefix="imgtool-", dir=large_files()) as names:
            for child in guest.entries("/", on_problem=report.problem):
                if child.type in _COPIED:
                    marshal.dump(child.path, names)
                else:
                    report.skipped(child.path, f"a {_KINDS[child.type]} is not copied")
            for path in _load_dumped(names):
                copy_out(
                    guest,
                    os.fsdecode(path),
                    dest,
                    report,
                    overwrite=overwrite,
                    keep_partial=keep_partial,
                )
        return
    if entry.type not in _COPIED:
        raise ImgtoolError(f"a {_KINDS[entry.type]} is not copied", subject=source)
    parent = dest
    if not dest.is_dir():
        parent, name = dest.absolute().parent, os.fsencode(dest.name)
    entry = guest.with_xattrs(entry, report.problem)
    kept = GuestFiles(guest.chains) if overwrite else None
    with Staging(parent, name, overwrite=overwrite, kept=kept) as staging:
        if not _Copy(guest, entry, staging, report, keep_partial).run():
            return
        staging.commit()


def _name(typed: bytes, entry: Entry) -> bytes:
    """The last component as it was typed, but in the guest's spelling where only that differs."""
    name = typed.rpartition(b"/")[2]
    same = os.fsdecode(name).upper() == os.fsdecode(entry.name).upper()
    return entry.name if same else name


def _load_dumped(file: BinaryIO) -> Iterator[Any]:
    """What was written into a file with `marshal.dump`, from its start."""
    file.seek(0)
    while True:
        try:
            yield marshal.load(file)
        except EOFError:
            return


class _Paths:
    """Paths by a key, as far as there is room: memory does not grow with a guest."""

    def __init__(self) -> None:
        self._paths: dict[object, bytes] = {}
        self._room = _MOST_REMEMBERED

    def add(self, key: object, path: bytes) -> bool:
        """Remember a path; False if there is no room for it."""
        self._room -= len(path) + _ABOUT_ONE
        if self._room < 0:
            return False
        self._paths[key] = path
        return True

    def get(self, key: object) -> bytes | None:
        """The path of a key."""
        return self._paths.get(key)


class _Copy:
    """One source on its way into one staging folder."""

    def __init__(
        self, guest: Guest, top: Entry, staging: Staging, report: Report, keep_partial: bool
    ) -> None:
        self._guest = guest
        self._top = top
        self._staging = staging
        self._report = report
        self._keep_partial = keep_partial
        self._prefix = len(top.path.rstrip(b"/")) + 1
        # Those that failed after there was no room for more are said to be missing besides.
        self._failed = _Paths()
        self._done = 0
        self._total = 0

    def run(self) -> bool:
        """Whether there is something to move into place."""
        if self._top.type == "symlink":
            self._staging.symlink(b"", self._top.target or b"")
        elif self._top.type == "file":
            self._total = self._top.size
            if not self._file(self._top, b""):
                return False
        else:
            self._directory()
            return True
        self._finish_entry(self._top, b"")
        return True

    def _advance(self, count: int) -> None:
        self._done += count
        if self._report.progress is not None:
            self._report.progress(self._done, self._total)

    # Files, one at a time

    def _file(self, entry: Entry, relative: bytes) -> bool:
        try:
            sparse = entry.size >= SPARSE and entry.blocks * 512 < entry.size
            pieces = self._ranges(entry) if sparse else self._whole(entry)
            with contextlib.closing(pieces):
                self._staging.file_at(relative, pieces, size=entry.size if sparse else None)
        except (EngineError, NotInGuestError) as error:
            kept = "what could be read was kept" if self._keep_partial else "it was left out"
            self._report.problem(entry.path, f"cannot be read ({error.message}); {kept}")
            if not self._keep_partial:
                self._failed.add(relative, relative)
                self._staging.remove(relative)
            return self._keep_partial
        except BadName as error:
            self._fail(entry.path, relative, error)
            return False
        return True

    def _fail(self, path: bytes, relative: bytes, error: BadName) -> None:
        self._failed.add(relative, relative)
        self._report.problem(path, error.message)

    def _blocks(self, stream: IO[bytes]) -> Iterator[bytes]:
        while block := stream.read(BLOCK):
            self._advance(len(block))
            yield block

    def _whole(self, entry: Entry) -> Generator[tuple[int, bytes], None, None]:
        offset = 0
        with self._guest.open(entry.path) as stream:
            for block in self._blocks(stream):
                yield offset, block
                offset += len(block)

    def _ranges(self, entry: Entry) -> Generator[tuple[int, bytes], None, None]:
        for start, length in self._guest.data_ranges(entry.path):
            offset = start
            with self._guest.open_range(entry.path, start, length) as stream:
                for block in self._blocks(stream):
                    if offset + len(block) > entry.size:
                        raise EngineError("it has data past its end")
                    yield offset, block
                    offset += len(block)

    # Directories

    def _directory(self) -> None:
        """The tree as one tar stream; file by file if something in it cannot be read."""
        with TemporaryFile(prefix="imgtool-", dir=large_files()) as records:
            sparse = self._survey(records)
            self._staging.directory(b"")
            try:
                # tar's list of patterns has a line each, and no blanks at their ends.
                if sparse is None or any(b"\n" in path or path[-1:].isspace() for path in sparse):
                    self._one_by_one(records)
                else:
                    self._untar([self._pattern(path) for path in sparse])
                    self._one_by_one(records, only=sparse)
            except EngineError as error:
                what = f"{error.subject}: " if error.subject else ""
                self._report.skipped(
                    self._top.path,
                    f"something cannot be read ({what}{error.message}); file by file",
                )
                self._done = 0
                self._one_by_one(records)
            self._finish(records)

    def _survey(self, records: BinaryIO) -> frozenset[bytes] | None:
        """Write down every entry below the directory; returns the large files with holes, or None
        if they are too many to be named.
        """
        sparse = set()
        room = _MOST_SPARSE
        walked = self._guest.walk(self._top.path, xattrs=True, on_problem=self._report.problem)
        for entry in walked:
            if entry.type not in _COPIED:
                self._report.skipped(entry.path, f"a {_KINDS[entry.type]} is not copied")
                continue
            if entry.type == "file":
                self._total += entry.size
                if entry.size >= SPARSE and entry.blocks * 512 < entry.size and room >= 0:
                    sparse.add(entry.path)
                    room -= len(entry.path) + _ABOUT_ONE
            fields = (entry.path, entry.mode, entry.uid, entry.gid, entry.size, entry.mtime_ns)
            more = (entry.blocks, entry.nlink, entry.inode, entry.device)
            marshal.dump((*fields, *more, entry.target, entry.xattrs), records)
        return frozenset(sparse) if room >= 0 else None

    def _load_records(self, records: BinaryIO) -> Iterator[tuple[Entry, bytes]]:
        """What `_survey` wrote, in preorder, with each path relative to the directory."""
        for values in _load_dumped(records):
            path, mode, uid, gid, size, mtime, blocks, nlink, inode, device, target, kept = values
            entry = Entry(path, mode, uid, gid, size, mtime, blocks, nlink, inode, device)
            entry = replace(entry, target=target, xattrs=kept)
            yield entry, entry.path[self._prefix :]

    def _pattern(self, path: bytes) -> bytes:
        return b"./" + _GLOB.sub(rb"\\\1", path[self._prefix :])

    def _untar(self, excludes: Sequence[bytes]) -> None:
        with self._guest.tar(self._top.path, excludes) as stream:
            try:
                for member, content in members(stream, plain=True):
                    self._member(member, content)
            except tarfile.TarError as error:
                raise EngineError(f"the stream breaks off: {error}") from error

    def _member(self, member: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        name = member.name.encode("utf-8", "surrogateescape")
        linked = member.linkname.encode("utf-8", "surrogateescape")
        try:
            if member.isdir():
                self._staging.directory(name)
            elif member.issym():
                self._staging.symlink(name, linked)
            elif member.islnk():
                self._staging.hardlink(name, linked)
            elif content is not None:
                try:
                    self._staging.file(name, self._blocks(content))
                except (EngineError, tarfile.TarError):
                    self._staging.remove(name)
                    raise
        except BadName as error:
            relative = name.removeprefix(b"./")
            self._fail(self._top.path.rstrip(b"/") + b"/" + relative, relative, error)

    def _one_by_one(self, records: BinaryIO, only: frozenset[bytes] | None = None) -> None:
        linked = _Paths()
        full = False
        for entry, relative in self._load_records(records):
            if only is not None and entry.path not in only:
                continue
            inode = (entry.device, entry.inode)
            try:
                if entry.type == "directory":
                    self._staging.directory(relative)
                elif entry.type == "symlink":
                    self._staging.symlink(relative, entry.target or b"")
                elif entry.nlink > 1 and (first := linked.get(inode)) is not None:
                    self._staging.hardlink(relative, first)
                elif (
                    self._file(entry, relative)
                    and entry.nlink > 1
                    and not linked.add(inode, relative)
                    and not full
                ):
                    full = True
                    self._report.skipped(
                        entry.path, "so many files have several names that more become copies"
                    )
            except BadName as error:
                self._fail(entry.path, relative, error)

    def _finish(self, records: BinaryIO) -> None:
        """Attributes from the walk, which has nanoseconds; each directory after what is in it."""
        open_directories: list[tuple[Entry, bytes]] = [(self._top, b"")]
        for entry, relative in self._load_records(records):
            while not _is_below(relative, open_directories[-1][1]):
                self._attribute(*open_directories.pop())
            if entry.type == "directory":
                open_directories.append((entry, relative))
            else:
                self._attribute(entry, relative)
        for directory, path in reversed(open_directories):
            self._attribute(directory, path)

    def _finish_entry(self, entry: Entry, relative: bytes) -> bool:
        kept = self._report.xattrs
        xattrs = kept.choose(entry.xattrs or ())
        attributes = Attributes(entry.mode, entry.uid, entry.gid, entry.mtime_ns, xattrs)
        return self._staging.finish(relative, attributes, kept.note_refusal)

    def _attribute(self, entry: Entry, relative: bytes) -> None:
        try:
            there = self._finish_entry(entry, relative)
            # Seen by the walk, not in the stream.
            if not there and self._failed.get(relative) is None:
                self._report.problem(entry.path, "was not copied")
        except BadName as error:
            if self._failed.get(relative) is None:
                self._report.problem(entry.path, f"its attributes: {error.message}")


def _is_below(path: bytes, directory: bytes) -> bool:
    return not directory or path.startswith(directory + b"/")
