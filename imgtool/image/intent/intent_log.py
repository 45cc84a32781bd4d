"""What is being done to an image, written down beside it before it is begun.

A record is a file `.NAME.imgtool-record` in the image's folder, or of a block device in /var/tmp by
what lasts of its identity (`imgtool.image.intent.devices`), of JSON objects one a line, each
written whole and synced, with what proves that this user's imgtool wrote it and what came before it
(`imgtool.image.intent.proof`). Whoever works on the image holds a lock on it; a record without a
lock was left by somebody who was killed, and tells `imgtool.image.change.recovery` what to finish
or undo.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from imgtool.errors import NO_ROOM, HostError, RefusedError
from imgtool.host import interrupt
from imgtool.image.intent import devices
from imgtool.image.intent.marks import mark_of
from imgtool.image.intent.proof import proof_of, proves
from imgtool.image.intent.witness import is_marked, witness
from imgtool.image.locking.held import real_path, remove_file, way_to
from imgtool.text import printable, typed

_PREFIX, _SUFFIX = ".", ".imgtool-record"
_PROOF = "proof"
_LONGEST_PATH = 4096  # bytes, the kernel's PATH_MAX
_LONGEST_WORD = 40
_BEAT = 0.1  # seconds
_LONGEST = 1 << 20
_LONGEST_NAME = 200  # in bytes; with what is added it has to stay below 255
FOR_DEVICES = Path("/var/tmp")  # kept over a reboot


def record_path(image: Path) -> Path:
    """Where the record of an image is; a link to an image has none of its own, nor has a device by
    another of its names."""
    beside = _beside(image)
    return beside.with_name(f"{_PREFIX}{beside.name}{_SUFFIX}")


def temporary_path(image: Path) -> Path:
    """A new name beside an image, for a file that is to become it or to be removed."""
    beside = _beside(image)
    return beside.with_name(f"{_PREFIX}{beside.name}.imgtool-{os.urandom(4).hex()}")


def is_temporary_of(image: Path, name: str) -> bool:
    """Whether a file of this name can have been made for work on an image."""
    beside = _beside(image).name
    start = f"{_PREFIX}{beside}.imgtool-"
    return name.startswith(start) and name != f"{_PREFIX}{beside}{_SUFFIX}" and "/" not in name


def _beside(image: Path) -> Path:
    """The image, or what stands for it: a device in a folder with room, a name that is too long."""
    real = real_path(image)
    if real.is_block_device():
        return FOR_DEVICES / _name_of_device(real)
    name = os.fsencode(real.name)
    if len(name) > _LONGEST_NAME:
        import hashlib  # seldom needed, and slow to load

        real = real.with_name(hashlib.sha256(name).hexdigest())
    return real


def _name_of_device(device: Path) -> str:
    """What stands for a device: the name of its record, where there is one.

    That was written when less was known of the device, or more, or by imgtool 0.1, which went by
    the device's name. A record there of what cannot be told from it has to be looked at.
    """
    ids = devices.identity(device)
    own = devices.key_of(ids, device)
    if os.path.lexists(_of_name(own)):
        return own
    for name, written in records_of_devices(device):
        if devices.same_device(written.facts.get("identity"), ids):
            return name
    for name in devices.names_of(device):
        if os.path.lexists(path := _of_name(name)):
            there = _written_at(path, device)
            noted = None if there is None else there.facts.get("identity")
            if devices.same_device(noted, ids) is not False:
                return name
    return own


def _of_name(name: str) -> Path:
    return FOR_DEVICES / f"{_PREFIX}{name}{_SUFFIX}"


def records_of_devices(device: Path) -> Iterator[tuple[str, Written]]:
    """The records of work on devices by those who are believed on this one; each with the name of
    what stands for its device."""
    with contextlib.suppress(OSError), os.scandir(FOR_DEVICES) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not (entry.name.startswith(f"{_PREFIX}dev-") and entry.name.endswith(_SUFFIX)):
                continue
            with contextlib.suppress(OSError):
                if not _is_believed(entry.stat(follow_symlinks=False), device):
                    continue
                written = _written_at(Path(entry.path), device)
                if written is not None and written.believed:
                    yield entry.name.removeprefix(_PREFIX).removesuffix(_SUFFIX), written


class Record:
    """The record of one piece of work on `image`; `facts` are the lines so far, as one.

    `path` is where it is, `owner` the id of the user who wrote it, and `proved` whether that was
    this user's imgtool. `touched` is when that was last at work, in nanoseconds since 1970; when it
    ended, where that was `witness`.
    """

    def __init__(
        self, image: Path, path: Path, descriptor: int, status: os.stat_result, lines: _Lines
    ) -> None:
        self.image = image
        self.path = path
        self.owner = status.st_uid
        self.touched = status.st_mtime_ns
        self.witnessed = is_marked(status)
        self.facts = lines.facts
        self.proved = lines.proved
        self._proof = lines.proof
        self._descriptor = descriptor
        self._removed = False

    @property
    def operation(self) -> str | None:
        """What is being done, fit to be shown; None where nothing was begun."""
        return operation_of(self.facts)

    def text(self, fact: str) -> str:
        """A fact that is a line of text; `RefusedError` where it is not."""
        value = self.facts.get(fact)
        if not is_name(value):
            raise self._senseless(fact)
        return value

    def texts(self, fact: str) -> list[str]:
        """A fact that is one or more lines of text; `RefusedError` where it is not."""
        value = self.facts.get(fact)
        if not isinstance(value, list) or not value:
            raise self._senseless(fact)
        if not all(is_name(line) for line in value):
            raise self._senseless(fact)
        return value

    def _senseless(self, fact: str) -> RefusedError:
        return RefusedError(
            f"the record of work on it makes no sense: no {fact}",
            subject=printable(self.image),
            hint=f"look at it: {printable(self.path)}; to end it and keep all that is there:"
            f" imgtool recover {typed(self.image)} --keep",
        )

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While the block runs, the time of the record's file says that imgtool is at work: who
        wrote to the image later is somebody else. A witness sees to the end of it; where both are
        killed, or the host goes down, the last sign of life has to do."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_BEAT):
                os.utime(self._descriptor)

        os.utime(self._descriptor)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            with witness(self._descriptor):
                yield
        except BaseException:
            self._note_what_is_left()
            raise
        finally:
            ended.set()
            thread.join()

    def _note_what_is_left(self) -> None:
        """Of a device that work failed on, how much was written to it: it has no time to tell."""
        with contextlib.suppress(HostError, OSError):
            mark = mark_of(self.image)
            if any("written" in file for file in (mark, *mark.get("parts", []))):
                self.note(left=mark)

    def note(self, **facts: object) -> None:
        """Write down more, before it is done; raises `HostError` where there is no room for it."""
        proof = proof_of(json.dumps(facts), self._proof, create=True)
        line = (json.dumps({**facts, _PROOF: proof} if proof else facts) + "\n").encode()
        end = os.fstat(self._descriptor).st_size
        with interrupt.defer_interrupts():
            try:
                if os.write(self._descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, end)
                raise _not_written(error, self.path.parent) from error
            self.facts.update(facts)
            self._proof = proof or ""

    def remove(self) -> None:
        """The work is done, or undone."""
        if self._removed:  # by now another imgtool may have one of its own there
            return
        with interrupt.defer_interrupts():
            # By its name there may be the record of another image, in another folder, by now.
            remove_file(self.path, os.fstat(self._descriptor))
            sync_folder(self.path.parent)
            self._removed = True
            self.facts.clear()

    def remove_if_empty(self) -> None:
        """Remove it where nothing is written down."""
        if not self.facts:
            self.remove()


def _not_written(error: OSError, folder: Path) -> HostError:
    hint = "run imgtool as a user who may write to that folder"
    if error.errno in NO_ROOM:
        hint = "make room on that file system, then repeat the command"
    return HostError(
        f"nothing can be written beside the image: {(error.strerror or '').lower()}",
        subject=printable(folder),
        hint=hint,
    )


def sync_folder(folder: Path) -> None:
    """Make sure that names written to a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def operation_of(facts: dict[str, object]) -> str | None:
    """What a record says is being done, fit to be shown; None where it says nothing."""
    value = facts.get("operation")
    return None if value is None else printable(str(value))[:_LONGEST_WORD]


def is_name(value: object) -> TypeGuard[str]:
    """Whether a fact can be the name of something on this host."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        return len(os.fsencode(value)) < _LONGEST_PATH
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


@dataclass(frozen=True)
class _Lines:
    """What the lines say, how many bytes of them were written whole, the proof of the last one,
    and whether all of them are proved."""

    facts: dict[str, object]
    length: int
    proof: str
    proved: bool


def _lines(content: bytes) -> _Lines:
    facts: dict[str, object] = {}
    length, proof, proved = 0, "", True
    for line in content.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        given = row.pop(_PROOF, None)
        proved = proved and proves(given, json.dumps(row), proof)
        proof = given if isinstance(given, str) else ""
        facts.update(row)
        length += len(line) + 1
    return _Lines(facts, length, proof, proved)


def _is_believed(status: os.stat_result, image: Path) -> bool:
    """Whether a record was written by somebody who may do to the image what it says."""
    owners = {os.geteuid(), 0}
    with contextlib.suppress(OSError):
        owners.add(way_to(image).stat().st_uid)
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and status.st_uid in owners


def not_believed(image: Path) -> RefusedError:
    """The error for a record that anybody can have put there."""
    return RefusedError(
        "what stands beside it as the record of work on it was not written by its owner",
        subject=printable(image),
        hint=f"look at it, then remove it: {printable(record_path(image))}",
    )


@dataclass(frozen=True)
class Written:
    """What is written down about an image, and by which user; `believed` where that one may do to
    the image what it says, `proved` where it was this user's imgtool."""

    facts: dict[str, object]
    owner: int
    believed: bool
    proved: bool


def load_intent(image: Path) -> Written | None:
    """What the record of an image says; None where there is none."""
    try:
        path = record_path(image)
    except (OSError, ValueError):
        return None
    return _written_at(path, image)


def _written_at(path: Path, image: Path) -> Written | None:
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        lines = _lines(os.pread(descriptor, _LONGEST, 0))
        believed = _is_believed(status, image)
        return Written(lines.facts, status.st_uid, believed, lines.proved)
    finally:
        os.close(descriptor)


def worker_on(image: Path) -> int | None:
    """The id of the process that works on an image by its record, on this machine; None for none.

    Looked up, since whoever tries the lock is in the way of who takes it.
    """
    with contextlib.suppress(OSError, ValueError):
        inode = record_path(image).stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            # 1: FLOCK ADVISORY WRITE 4242 00:1f:1234 0 EOF
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
                return int(words[4])
    return None


def read_facts(image: Path) -> dict[str, object]:
    """What is written down about an image by somebody who is believed; empty where nothing is."""
    written = load_intent(image)
    return written.facts if written is not None and written.believed else {}


def is_ours(name: str) -> bool:
    """Whether a file of this name is a record, or a file that is to become an image."""
    return name.startswith(_PREFIX) and ".imgtool-" in name


@contextlib.contextmanager
def open_record(image: Path, *, create: bool) -> Iterator[Record | None]:
    """The record of an image, locked; None where there is none and none is to be made.

    A record that is empty when the block ends is removed. Raises `RefusedError` where another
    imgtool is at work on the image or the record is not to be believed, `HostError` where nothing
    can be written beside the image.
    """
    with contextlib.ExitStack() as stack:
        with interrupt.defer_interrupts():  # an empty record would be left
            path = record_path(image)
            record = _of_descriptor(image, path, _lock_record(image, path, create=create), stack)
        yield record


def _of_descriptor(
    image: Path, path: Path, descriptor: int | None, stack: contextlib.ExitStack
) -> Record | None:
    """The record that is open, which ends with the stack."""
    if descriptor is None:
        return None
    stack.callback(os.close, descriptor)
    status = os.fstat(descriptor)
    if not _is_believed(status, image):
        raise not_believed(image)
    lines = _lines(os.pread(descriptor, _LONGEST, 0))
    if lines.length < status.st_size:
        # What was not written whole must not swallow the line that comes next.
        os.ftruncate(descriptor, lines.length)
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
    record = Record(image, path, descriptor, status, lines)
    stack.callback(record.remove_if_empty)
    return record


def _lock_record(image: Path, path: Path, *, create: bool) -> int | None:
    while True:
        try:
            descriptor = _open(path, create=create)
        except FileNotFoundError:
            if create:
                raise HostError("no such folder", subject=printable(path.parent)) from None
            return None
        except OSError as error:
            if error.errno == errno.EACCES and os.path.lexists(path):
                raise RefusedError(
                    "another user's work on it is under way, or was interrupted",
                    subject=printable(image),
                    hint="that user or root can finish it: imgtool recover",
                ) from error
            raise _not_written(error, path.parent) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise RefusedError(
                "another imgtool is at work on it",
                subject=printable(image),
                hint="wait until it has ended",
            ) from error
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # removed by the one who had it


def _open(path: Path, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        if not create:
            raise FileNotFoundError(path)
        # One that is not new can be another name of any file: its mode is its owner's.
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            # Whoever reads the image has to know, whatever the umask is.
            if os.fstat(descriptor).st_uid == os.geteuid():
                os.fchmod(descriptor, 0o644)
            return descriptor


# How long after the last sign of life of an imgtool that was killed its QEMU may have written.
_MARGIN = 1_500_000_000  # nanoseconds


def last_write_time(record: Record) -> int:
    """When the work of a record that was cut off wrote for the last time, at the latest, in
    nanoseconds."""
    return record.touched if record.witnessed else record.touched + _MARGIN
