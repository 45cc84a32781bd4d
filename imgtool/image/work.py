"""Work on an image: planned, shown, done in steps, proved, and settled where it is cut off."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgtool.errors import ImgtoolError, RefusedError
from imgtool.image.places import printable
from imgtool.image.qemu_img import OnPart, qemu_img, same_content
from imgtool.image.record import Record, opened, sync_folder
from imgtool.image.recovery import mend, settle

# Called with the name of a step and the part of it that is done, between 0 and 1.
OnStep = Callable[[str, float], None]
# Called with a line for the user.
Notice = Callable[[str], None]


@dataclass
class Work:
    """One run of a plan: its record, and how long each step took, in seconds."""

    record: Record
    on_step: OnStep | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[OnPart | None]:
        """Time one step; gives what tells its progress."""
        started = time.monotonic()
        on_step = self.on_step
        if on_step is not None:
            on_step(name, 0.0)
        try:
            yield None if on_step is None else (lambda part: on_step(name, part))
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def qemu_img(self, name: str, words: list[str | Path], image: Path) -> None:
        """A step that is one sub-command of qemu-img."""
        with self.step(name) as on_part:
            qemu_img(words, image=image, on_part=on_part)

    def prove_same(self, first: str, second: str, what: str, image: Path) -> None:
        """Raise `ImgtoolError` unless a guest sees the same in both; `what` says what differs."""
        with self.step("proof"):
            if not same_content(first, second):
                raise ImgtoolError(
                    f"the proof failed: {what}",
                    subject=printable(image),
                    hint="nothing was thrown away; please report this",
                )


@dataclass(frozen=True)
class Plan:
    """What a command is about to do to `image`, in `lines` for the user; `run` does it.

    `space` is how many bytes it may need in the image's folder, `facts` what its record says.
    What is `repeatable` is finished by doing it again.
    """

    operation: str
    image: Path
    lines: tuple[str, ...]
    do: Callable[[Work], None]
    space: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    repeatable: bool = False

    def run(self, on_step: OnStep | None = None, notice: Notice | None = None) -> Work:
        """Do it: whole, or as if it had not been begun, or to be finished by repeating it."""
        with opened(self.image, create=True) as record:
            assert record is not None
            begun = {"operation": self.operation, **self.facts}
            if self.repeatable and record.facts == begun:
                mend(self.image)
            elif record.facts:
                raise RefusedError(
                    f"a {record.operation} of it was interrupted",
                    subject=printable(self.image),
                    hint=f"imgtool recover {printable(self.image)}",
                )
            else:
                record.note(**begun)
            work = Work(record, on_step)
            try:
                self.do(work)
            except BaseException:
                line = settle(record, finish=False)
                if line and notice:
                    notice(line)
                raise
            record.remove()
            return work


def keep_attributes(old: Path, new: Path) -> None:
    """Give a file that replaces another the same mode, owner and extended attributes."""
    status = old.stat()
    shutil.copymode(old, new)
    if os.geteuid() == 0:
        os.chown(new, status.st_uid, status.st_gid)
    for name in os.listxattr(old):
        with contextlib.suppress(OSError):  # some are the file system's own
            os.setxattr(new, name, os.getxattr(old, name))


def sync_file(path: Path) -> None:
    """Make sure that the bytes of a file are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, new: Path) -> None:
    """Give a complete file its name, where no file may be. Raises `RefusedError` if one is."""
    sync_file(temporary)
    try:
        os.link(temporary, new)
    except FileExistsError as error:
        raise RefusedError("it exists already", subject=printable(new)) from error
    except OSError:  # a file system without links
        temporary.rename(new)
    else:
        temporary.unlink()
    sync_folder(new.parent)


def replace(temporary: Path, image: Path) -> None:
    """Put a complete file in the place of another, in one step."""
    keep_attributes(image, temporary)
    sync_file(temporary)
    real = image.resolve()
    temporary.replace(real)
    sync_folder(real.parent)
