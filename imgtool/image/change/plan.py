"""Work on an image: planned, shown, done in steps, proved, and settled where it is cut off."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import NO_ROOM, Force, HostError, ImgtoolError, RefusedError
from imgtool.host import interrupt
from imgtool.image.chain.holdings import Holdings, holdings_of, lost, note_holdings
from imgtool.image.chain.info import ImageInfo
from imgtool.image.chain.steady import bind_images
from imgtool.image.change.changes import marks
from imgtool.image.change.made import made_file, make_file, written_as_made
from imgtool.image.change.mending import repair_metadata
from imgtool.image.change.recovery import refuse_if_used_since, resolve_intent
from imgtool.image.change.rehearsing import rehearse
from imgtool.image.checks.ages import kept_as_noted, younger
from imgtool.image.intent.intent_log import Record, open_record
from imgtool.image.intent.marks import identity_of
from imgtool.image.locking.held import is_one_file, way_to
from imgtool.image.locking.host_file import exchanged_file
from imgtool.image.locking.locks import held_for_writing
from imgtool.image.qemu.qemu_img import OnPart, qemu_img, same_content
from imgtool.text import printable, typed

# Called with the name of a step and the part of it that is done, between 0 and 1.
OnStep = Callable[[str, float], None]
# Called with a line for the user.
Notice = Callable[[str], None]


@dataclass
class Work:
    """One run of a plan: its record, and how long each step took, in seconds.

    `expected` is what the image should hold besides its content when all is done.
    """

    record: Record
    on_step: OnStep | None = None
    expected: Holdings | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notice: Notice | None = None

    def say(self, line: str | None) -> None:
        """Tell the user, where there is something to tell."""
        if line is not None and self.notice is not None:
            self.notice(line)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[OnPart | None]:
        """Time one step; gives what tells its progress."""
        if interrupt.pending():  # Ctrl-C that came where Python swallows what it raises
            raise KeyboardInterrupt
        started = time.monotonic()
        on_step = self.on_step
        if on_step is not None:
            on_step(name, 0.0)
        try:
            yield None if on_step is None else (lambda part: on_step(name, part))
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def reserve(self, temporary: Path) -> None:
        """Make a file that is to become an image: nobody else's, and for its owner's eyes alone."""
        try:
            self.record.note(made=make_file(temporary))
        except OSError as error:
            raise HostError(
                f"no file can be made: {(error.strerror or '').lower()}",
                subject=printable(temporary.parent),
                hint="make room on that file system, then repeat the command"
                if error.errno in NO_ROOM
                else None,
            ) from error

    def place(self, temporary: Path, new: Path, *, like: BinaryIO | None = None) -> None:
        """Give a complete file its name; it may be read by those who may read `like`."""
        allowed = stat.S_IMODE(os.fstat(like.fileno()).st_mode) if like else 0o666
        with made_file(temporary, made=self._made()) as descriptor:
            os.fchmod(descriptor, (allowed & 0o666 | stat.S_IWUSR) & ~_umask())
        self.record.note(step="swap")
        put_in_place(temporary, new, self._made())

    def swap(self, temporary: Path, image: ImageInfo) -> None:
        """Put a complete file in the place of the very one that was looked at, if it holds what it
        should."""
        self.refuse_if_lost(temporary, "nothing was changed")
        self.record.note(step="swap")
        replace(temporary, image, self._made())

    def _made(self) -> object:
        """The identity of the file that was reserved."""
        return self.record.facts.get("made")

    def refuse_if_lost(self, image: Path, hint: str) -> None:
        """Raise `ImgtoolError` where the image lacks a snapshot, a bitmap or a name that it should
        have after the work."""
        if self.expected is None:
            return
        if missing := lost(self.expected, holdings_of(image, "qcow2")):
            raise ImgtoolError(
                f"the image would lack what it should hold: {'; '.join(missing)}",
                subject=printable(self.record.image),
                hint=f"{hint}; please report this",
            )

    def qemu_img(
        self, name: str, words: Sequence[str | Path], image: Path, *, made: Path | None = None
    ) -> None:
        """A step that is one sub-command of qemu-img; `made` is which word is a file that was
        reserved, and is written to."""
        with self.step(name) as on_part, written_as_made(words, made, self._made()) as given:
            qemu_img(given, image=image, on_part=on_part)

    def prove_same(self, first: str, second: str, what: str, image: Path) -> None:
        """Raise `ImgtoolError` unless a guest sees the same in both; `what` says what differs."""
        with self.step("proof") as on_part:
            if not same_content(first, second, on_part):
                raise ImgtoolError(
                    f"the proof failed: {what}",
                    subject=printable(image),
                    hint="nothing was thrown away; please report this",
                )


def as_before(holdings: Holdings) -> Holdings:
    """What an image holds after work that changes nothing but its content."""
    return holdings


def _umask() -> int:
    """The process's own, which cannot be read without being set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class Seen:
    """Files as they were when a plan was made: it holds only for as long as they stay so."""

    files: tuple[tuple[Path, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, *paths: Path) -> Seen:
        """What tells these files from changed ones."""
        return cls(tuple((path, _identity(path)) for path in paths))

    def refuse_if_changed(self) -> None:
        """Raise `RefusedError` if one of the files was changed, replaced or removed since."""
        for path, identity in self.files:
            if _identity(path) != identity:
                raise RefusedError(
                    "it was changed by somebody in the meantime",
                    subject=printable(path),
                    hint="repeat the command, which looks at it anew",
                )


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = way_to(path).stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Plan:
    """What a command is about to do to `image`, in `lines` for the user; `run` does it.

    `format` is that of the image, where it is there already: what a guest wrote to a raw disk may
    look like any. `space` is how many bytes it may need in the image's folder, `facts` what its
    record says besides what every record says, and `seen` the files that were looked at to make it.
    Work `in_place` is done on the very images that were looked at.
    On the files that it `writes_to` no other QEMU works from the first step to the last. What is
    `repeatable` is finished by doing it again, which is the same where the facts named in it are.
    `same_in` is the image that is written to and in which a guest sees the same afterwards:
    overlays on it stay younger than it. `doubts` are lines on what is only read. `after` gives what
    the image holds besides its content afterwards, of what it held before: the plan is not done
    where something of it is missing. `rehearsal` is the same work on the image that a node of QEMU
    describes, the first of those `in_place`: what holds more than content is not touched where it
    loses something there.
    """

    operation: str
    image: Path
    lines: tuple[str, ...]
    do: Callable[[Work], None]
    format: str | None = None
    space: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    in_place: tuple[ImageInfo, ...] = ()
    writes_to: tuple[Path, ...] = ()
    repeatable: tuple[str, ...] = ()
    same_in: Path | None = None
    backing_dirs: Sequence[str | Path] = ()
    force: Force = ()
    doubts: tuple[str, ...] = ()
    after: Callable[[Holdings], Holdings] = as_before
    rehearsal: Callable[[dict[str, object]], None] | None = None

    def run(self, on_step: OnStep | None = None, notice: Notice | None = None) -> Work:
        """Do it: whole, or as if it had not been begun, or to be finished by repeating it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(bind_images(self.in_place))
            record = stack.enter_context(open_record(self.image, create=True))
            assert record is not None
            if record.facts and not self._repeats(record):
                raise RefusedError(
                    f"a {record.operation} of it was interrupted",
                    subject=printable(self.image),
                    hint=f"imgtool recover {typed(self.image)}",
                )
            # Before they are looked at for the last time.
            stack.enter_context(held_for_writing(self.writes_to))
            self.seen.refuse_if_changed()
            repeated = bool(record.facts)
            if repeated:
                refuse_if_used_since(record, self.backing_dirs, self.force)
            before = holdings_of(self.image, self.format)
            expected = None if before is None else self.after(before)
            if before is not None and expected is not None and before.more_than_content:
                self._rehearse(expected)
            work = Work(record, on_step, expected, notice=notice)
            try:
                if not repeated:
                    record.note(operation=self.operation, **self._known(before), **self.facts)
                with self._kept_younger(record):
                    self._do(work, repeated)
                with interrupt.defer_interrupts(last=True):
                    work.refuse_if_lost(self.image, "what it lacks is in no copy of imgtool's")
                    record.remove()
            except BaseException as stopped:
                try:
                    with self._kept_younger(record):
                        line = resolve_intent(record, finish=False)
                except ImgtoolError as error:
                    line = f"{error}: to be settled by imgtool recover {typed(self.image)}"
                if line and notice:
                    cut_off = isinstance(stopped, KeyboardInterrupt)
                    notice(line if cut_off else line.replace("an interrupted ", "the ", 1))
                raise
            return work

    def _rehearse(self, expected: Holdings) -> None:
        """Raise `RefusedError` where the work would lose what the image has to hold after it."""
        rehearsal = self.rehearsal
        if rehearsal is None:
            return
        image = self.in_place[0]
        if missing := rehearse(image, lambda node, file: rehearsal(node), expected):
            raise RefusedError(
                f"QEMU would lose what the image holds: {'; '.join(missing)}; nothing was changed",
                subject=printable(self.image),
                hint="work on a copy, or with another version of QEMU; and please report this",
            )

    def _do(self, work: Work, repeated: bool) -> None:
        if not repeated:
            self.do(work)
            return
        repair_metadata(self.image, format=self.format)
        self.do(work)
        repair_metadata(self.image, format=self.format)
        for other in self.writes_to:
            if way_to(other).exists() and not is_one_file(other, self.image):
                repair_metadata(other)

    @contextlib.contextmanager
    def _kept_younger(self, record: Record) -> Iterator[None]:
        if self.same_in is None:
            yield
            return
        # Who wrote to it later than that was somebody else, and its overlays may not fit.
        with record.at_work(), kept_as_noted(record, self.same_in, self.backing_dirs):
            yield

    def _known(self, before: Holdings | None) -> dict[str, object]:
        """What a record says of an image that is there already."""
        known: dict[str, object] = {} if self.format is None else {"format": self.format}
        if way_to(self.image).exists():
            known |= {"identity": identity_of(self.image), "noted": marks(self.image)}
        if self.same_in is not None:
            known |= {"younger": younger(self.same_in, self.backing_dirs)}
        after = None if before is None else self.after(before)
        return {**known, **note_holdings(before, after)}

    def _repeats(self, record: Record) -> bool:
        return (
            bool(self.repeatable)
            and record.proved
            and record.operation == self.operation
            and all(record.facts.get(name) == self.facts.get(name) for name in self.repeatable)
        )


def keep_attributes(old: int, new: int) -> None:
    """Give a file that replaces another the same owner, mode, extended attributes and times; both
    are descriptors.

    The content is the same, so an overlay that stands on it is not older than it.
    """
    status, made = os.fstat(old), os.fstat(new)
    if (status.st_uid, status.st_gid) != (made.st_uid, made.st_gid):
        with contextlib.suppress(PermissionError):  # the plan refused, or was forced
            os.fchown(new, status.st_uid, status.st_gid)
    os.fchmod(new, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(old):
        with contextlib.suppress(OSError):  # some are the file system's own
            os.setxattr(new, name, os.getxattr(old, name))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))


def sync_file(path: Path) -> None:
    """Make sure that the bytes of a file are on the disk."""
    descriptor = os.open(way_to(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, new: Path, made: object = None) -> None:
    """Give a complete file, of the identity `made`, its name in the folder in which it is, where no
    file may be. Raises `RefusedError` if one is."""
    with _folder_of(new) as folder:
        # Two names in one folder, whatever is put in its place meanwhile.
        with made_file(temporary, made=made, folder=folder) as descriptor:
            os.fsync(descriptor)
        old, name = temporary.name, new.name
        try:
            os.link(old, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError as error:
            raise RefusedError("it exists already", subject=printable(new)) from error
        except OSError:  # a file system without links
            os.rename(old, name, src_dir_fd=folder, dst_dir_fd=folder)
        else:
            os.unlink(old, dir_fd=folder)
        os.fsync(folder)


@contextlib.contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    """A descriptor of the folder that a file is in."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def replace(temporary: Path, image: ImageInfo, made: object) -> None:
    """Put a complete file, of the identity `made`, in the place of an image's, in one step.

    Raises `RefusedError` where either is another file by now: who may write to the folder can put
    a link there. So both are names in one folder that is opened, and no link is followed.
    """
    real = image.path.resolve()
    with contextlib.ExitStack() as opened_files:
        folder = opened_files.enter_context(_folder_of(real))
        old = opened_files.enter_context(_looked_at(image, real.name, folder))
        new = opened_files.enter_context(made_file(temporary, made=made, folder=folder))
        keep_attributes(old, new)
        os.fsync(new)
        # Not what the two names lead to: what is exchanged now is exchanged in this folder.
        os.replace(temporary.name, real.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)


@contextlib.contextmanager
def _looked_at(image: ImageInfo, name: str, folder: int) -> Iterator[int]:
    """A descriptor of an image's file, by its name in a folder."""
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        raise exchanged_file(image.path) from error
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != dict(image.inodes).get(image.path):
            raise exchanged_file(image.path)
        yield descriptor
    finally:
        os.close(descriptor)
