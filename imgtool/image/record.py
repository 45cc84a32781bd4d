"""What is being done to an image, written down beside it before it is begun.

A record is a file `.NAME.imgtool-record` in the image's folder, of JSON objects one a line, each
written whole and synced. Whoever works on the image holds a lock on it; a record without a lock
was left by somebody who was killed, and tells `imgtool.image.recovery` what to finish or undo.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgtool.errors import HostError, RefusedError
from imgtool.image.places import printable

_PREFIX, _SUFFIX = ".", ".imgtool-record"
_LONGEST = 1 << 20
_FOR_DEVICES = Path("/var/tmp")  # kept over a reboot


def record_path(image: Path) -> Path:
    """Where the record of an image is; a link to an image has none of its own."""
    beside = _beside(image)
    return beside.with_name(f"{_PREFIX}{beside.name}{_SUFFIX}")


def temporary_path(image: Path) -> Path:
    """A file of this process beside an image, to become it or to be removed."""
    beside = _beside(image)
    return beside.with_name(f"{_PREFIX}{beside.name}.imgtool-{os.getpid()}")


def _beside(image: Path) -> Path:
    """The image, or for a block device what stands for it in a folder with room."""
    real = image.resolve()
    if real.is_block_device():
        return _FOR_DEVICES / str(real).strip("/").replace("/", "-")
    return real


class Record:
    """The record of one piece of work on `image`; `facts` are the lines so far, as one."""

    def __init__(self, image: Path, descriptor: int, facts: dict[str, Any]) -> None:
        self.image = image
        self.facts = facts
        self._descriptor = descriptor

    @property
    def operation(self) -> str | None:
        """What is being done; None where nothing was begun."""
        return self.facts.get("operation")

    def note(self, **facts: Any) -> None:
        """Write down more, before it is done."""
        line = json.dumps(facts) + "\n"
        os.write(self._descriptor, line.encode())
        os.fsync(self._descriptor)
        self.facts.update(facts)

    def remove(self) -> None:
        """The work is done, or undone."""
        path = record_path(self.image)
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make sure that names written to a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(content: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in content.split(b"\n")[:-1]:  # what has no end was not written whole
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        facts.update(row)
    return facts


def read_facts(image: Path) -> dict[str, Any]:
    """What is written down about an image, by whomever; empty where nothing is."""
    try:
        with record_path(image).open("rb") as file:
            if os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0, image.stat().st_uid):
                return {}
            return _facts(file.read(_LONGEST))
    except OSError:
        return {}


def unfinished_commit(image: Path) -> Path | None:
    """The overlay that has all of an image while a commit into the image is incomplete."""
    facts = read_facts(image)
    if facts.get("operation") != "commit" and not is_committed(facts):
        return None
    overlay = Path(str(facts.get("overlay")))
    return overlay if overlay.is_file() else None


def is_committed(facts: dict[str, Any]) -> bool:
    """Whether a write was to be kept: the record of the first of its images says so for all."""
    if facts.get("operation") != "write":
        return False
    if facts.get("step") == "ready":
        facts_of_first = read_facts(Path(facts["images"][0]))
        return facts_of_first.get("id") == facts["id"] and facts_of_first.get("step") == "commit"
    return facts.get("step") == "commit"


def is_ours(name: str) -> bool:
    """Whether a file of this name is a record, or a file that is to become an image."""
    return name.startswith(_PREFIX) and ".imgtool-" in name


@contextlib.contextmanager
def opened(image: Path, *, create: bool) -> Iterator[Record | None]:
    """The record of an image, locked; None where there is none and none is to be made.

    A record that is empty when the block ends is removed. Raises `RefusedError` where another
    imgtool is at work on the image, `HostError` where nothing can be written beside it.
    """
    path = record_path(image)
    while True:
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            if create:
                raise HostError("no such folder", subject=printable(path.parent)) from None
            yield None
            return
        except OSError as error:
            raise HostError(
                f"nothing can be written beside the image: {(error.strerror or '').lower()}",
                subject=printable(path.parent),
                hint="run imgtool as a user who may write to that folder",
            ) from error
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
            break
        os.close(descriptor)  # removed by the one who had it
    try:
        record = Record(image, descriptor, _facts(os.pread(descriptor, _LONGEST, 0)))
        yield record
        if not record.facts:
            record.remove()
    finally:
        os.close(descriptor)
