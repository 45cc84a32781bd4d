"""The journal of a host mount: what was done to the host, written down before it is done.

Every host mount has a folder of its own in `state_folder()`, with `journal.json` in it, and beside
it whatever files the mechanism needs. Whoever works on a mount holds the lock of its folder: a
mount that is not finished and whose lock is free was left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgtool.errors import HostError, ImgtoolError, RefusedError
from imgtool.host.own_mounts import JOURNAL
from imgtool.mount.steps.step import Step
from imgtool.mount.steps.steps import from_json

MAKING, MOUNTED, UNMAKING = "mounting", "mounted", "unmounting"
_LONGEST = 16 << 20  # bytes; a chain of 200 links makes some hundred thousand
_FAILPOINT = "IMGTOOL_MOUNT_FAILPOINT"


def state_folder() -> Path:
    """Where the journals of this user are: `/run/imgtool`, or in the user's runtime folder."""
    if os.geteuid() == 0:
        return Path("/run/imgtool")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # Right below /tmp, where nobody else can rename it.
    return Path(runtime) / "imgtool" if runtime else Path(f"/tmp/imgtool-{os.geteuid()}")


def boot_id() -> str:
    """The kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"the folder for the journal cannot be made: {error.strerror}",
            subject=folder,
            hint="set XDG_RUNTIME_DIR to a folder of your own",
        ) from error
    _refuse_of_others(folder)
    return folder


def _refuse_of_others(folder: Path) -> None:
    """Raise `HostError` for a folder in which another user can have written a journal: what that
    says would be undone, files be removed and mounts ended, with this user's rights."""
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not own or status.st_mode & 0o022:
        raise HostError(
            "it belongs to somebody else, or others can write to it",
            subject=folder,
            hint="remove it, or set XDG_RUNTIME_DIR to a folder of your own",
        )


def _folders() -> list[Path]:
    """The folders of this user's journals. Raises `HostError` where they can be another's."""
    root = state_folder()
    if not os.path.lexists(root):
        return []
    _refuse_of_others(root)
    return sorted(folder for folder in root.iterdir() if not folder.is_symlink())


def failpoint(name: str) -> None:
    """Where the tests kill imgtool: at the point that the environment names."""
    if os.environ.get(_FAILPOINT) == name:
        os.kill(os.getpid(), signal.SIGKILL)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of a folder; None if it is taken and `wait` is not given."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _no_other_starts(root: Path) -> Iterator[None]:
    """While the block runs, nobody else is between a journal's folder and its first line."""
    descriptor = _lock(root, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@dataclass
class Journal:
    """One host mount. `created` is in nanoseconds since 1970.

    `images` are the absolute paths of all files of the images, `written` those that are written to.
    `steps` are in the order in which they were done. `snapshot` is the name of the internal
    snapshot at which the images are shown.
    """

    folder: Path
    images: list[str]
    mountpoint: str
    mechanism: str
    written: list[str]
    user: int
    created: int
    boot: str
    state: str = MAKING
    steps: list[Step] = field(default_factory=list)
    snapshot: str | None = None
    _lock: int | None = None

    @property
    def id(self) -> str:
        """The name of its folder, which all that it makes carries."""
        return self.folder.name

    @property
    def writable(self) -> bool:
        """Whether it was mounted to be written to."""
        return bool(self.written)

    @classmethod
    def start(
        cls,
        images: Sequence[Path],
        mountpoint: Path,
        mechanism: str,
        written: Sequence[Path] = (),
        *,
        snapshot: str | None = None,
    ) -> Journal:
        """A new journal, locked. Nothing else was done yet."""
        root = _private(state_folder())
        folder = root / secrets.token_hex(6)
        journal = cls(
            folder=folder,
            images=[str(image) for image in images],
            mountpoint=str(mountpoint),
            mechanism=mechanism,
            written=[str(image) for image in written],
            user=os.getuid(),
            created=time.time_ns(),
            boot=boot_id(),
            snapshot=snapshot,
        )
        with _no_other_starts(root):
            folder.mkdir(mode=0o700)
            journal._try_lock()
            journal.save()
        return journal

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal in a folder; None if it is gone, or not complete, which the first step
        cannot be either."""
        try:
            with (folder / JOURNAL).open("rb") as file:
                content = file.read(_LONGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(content) > _LONGEST:
            raise HostError("no journal of imgtool is so long", subject=folder / JOURNAL)
        known = json.loads(content)
        known["steps"] = [from_json(step) for step in known["steps"]]
        return cls(folder=folder, **known)

    def save(self) -> None:
        """Write it, whole or not at all."""
        known = {k: v for k, v in self.__dict__.items() if k not in ("folder", "steps", "_lock")}
        known["steps"] = [step.to_json() for step in self.steps]
        draft = self.folder / "journal.draft"
        draft.write_text(json.dumps(known))
        draft.replace(self.folder / JOURNAL)

    # The lock

    def _try_lock(self) -> bool:
        try:
            self._lock = _lock(self.folder, wait=False)
        except FileNotFoundError:
            return True  # it is gone, and so is whoever worked on it
        return self._lock is not None

    def unlock(self) -> None:
        """Let others work on the mount."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def busy(self) -> bool:
        """Whether somebody else works on it at this moment."""
        if self._lock is not None:
            return False
        if self._try_lock():
            self.unlock()
            return False
        return True

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Work on it alone, as it is by then; False if somebody else undid it meanwhile.

        Raises `RefusedError` if somebody else works on it.
        """
        if not self._try_lock():
            raise RefusedError("another imgtool works on this mount", subject=self.mountpoint)
        try:
            known = Journal.read(self.folder)
            if known is not None:
                self.state, self.steps = known.state, known.steps
            yield known is not None
        finally:
            self.unlock()

    # The steps

    def do(self, step: Step) -> None:
        """Write a step down, then do it."""
        self.steps.append(step)
        self.save()
        failpoint(f"before {step.kind}")
        step.do(self.save)
        self.save()
        failpoint(f"after {step.kind}")

    def undo_last(self) -> None:
        """Undo the last step, which was done for a look only."""
        self.steps[-1].undo()
        self.steps.pop()
        self.save()

    def finish(self) -> None:
        """The mount is there."""
        self.state = MOUNTED
        self.save()
        failpoint("finished")

    def undo(self) -> None:
        """Undo everything, last step first, and remove the folder.

        A step that cannot be undone, such as a mount that is in use, raises; what was undone
        before it is no longer in the journal, so that this can be repeated. A mount of which
        nothing was undone is as before.
        """
        whole, before = len(self.steps), self.state
        self.state = UNMAKING
        self.save()
        while self.steps:
            step = self.steps[-1]
            # After a reboot nothing is left but the files.
            if self.boot == boot_id():
                failpoint(f"before undoing {step.kind}")
                try:
                    step.undo()
                except ImgtoolError:
                    if len(self.steps) == whole:
                        self.state = before
                        self.save()
                    raise
                failpoint(f"after undoing {step.kind}")
            self.steps.pop()
            self.save()
        failpoint("before removing")
        shutil.rmtree(self.folder)

    def left_behind(self) -> bool:
        """Whether it is nobody's any more: not finished and not worked on, broken, or of an
        earlier boot."""
        if self.boot != boot_id():
            return True
        if self.busy:
            return False
        return self.state != MOUNTED or bool(self.faults())

    def faults(self) -> list[str]:
        """What of it is not there any more, one line each."""
        return [line for step in self.steps if (line := step.fault()) is not None]


def journals() -> list[Journal]:
    """All journals of this user, oldest first."""
    found = []
    for folder in _folders():
        journal = Journal.read(folder)
        if journal is not None:
            found.append(journal)
    return sorted(found, key=lambda journal: journal.created)


def remove_empty_folders() -> None:
    """Remove the folders of journals that were never written, or that were just to be removed."""
    if not _folders():
        return
    with _no_other_starts(state_folder()):
        for folder in _folders():
            with contextlib.suppress(OSError):  # somebody else removes it
                if (folder / JOURNAL).exists():
                    continue
                lock = _lock(folder, wait=False)
                if lock is not None:
                    try:
                        shutil.rmtree(folder)
                    finally:
                        os.close(lock)
