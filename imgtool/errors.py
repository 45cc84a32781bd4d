"""The error types: what a user is told, what can be done, and the exit status.

Every error that imgtool raises on purpose is an `ImgtoolError`. It is raised where the cause is
known and caught in one place, the command line, which prints `imgtool: error: WHAT (WHICH)` and,
where there is one, `  hint: WHAT TO DO`. The exit statuses are the contract that scripts rely on.

Each type also derives from the built-in exception that it stands for, so that users of the Python
API can write `except FileNotFoundError`.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable
from enum import IntEnum, StrEnum
from typing import Self


class ExitStatus(IntEnum):
    """Exit statuses of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    IMAGE_UNREADABLE = 3
    REFUSED = 4
    NOT_IN_GUEST = 5
    HOST_CANNOT = 6
    INTERRUPTED = 130


_LISTED = 8  # names in one line


def join_names(names: Iterable[str], separator: str = ", ") -> str:
    """Names for one line of a message: the first ones, and how many more there are."""
    every = list(names)
    shown = separator.join(every[:_LISTED])
    return shown if len(every) <= _LISTED else f"{shown} and {len(every) - _LISTED} more"


def shorten(text: str, most: int = 300) -> str:
    """What another program or a guest said, on one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 4] + " ..."


class Reason(StrEnum):
    """What a refusal protects from. `--force REASON` gives up that one guard, and no other;
    `without` says what may happen then."""

    without: str

    def __new__(cls, name: str, without: str = "") -> Self:
        reason = str.__new__(cls, name)
        reason._value_ = name
        reason.without = without
        return reason

    BASE_NEWER = (
        "base-newer",
        "the base was changed after its overlay: what is written may make garbage of a guest",
    )
    DAMAGED = "damaged", "tables of the image are damaged: a write may overwrite data"
    IS_BASE = "is-base", "overlays stand on the image, and would become garbage"
    IN_USE = "in-use", "a device of the host stands on the image"
    SNAPSHOTS = "snapshots", "internal snapshots are lost"
    BITMAPS = "bitmaps", "dirty bitmaps are lost: the next backup is a full one"
    SPACE = "space", "the host has less room than may be needed"
    HARD_LINKS = "hard-links", "other names of the file keep the old content"
    OWNER = "owner", "the image's file changes its owner"
    SHRINK = "shrink", "beyond the new end of the disk lies what is not zeros, and is lost"
    CUT_PARTITION = "cut-partition", "the new end of the disk lies within a partition"
    OTHER_OFFSET = (
        "other-offset",
        "what is written may lie elsewhere than where other programs see the partition",
    )
    OTHER_BASE = "other-base", "the new base has another content than the old one"
    HIBERNATED = "hibernated", "the guest sleeps, and would undo or damage what is written"
    HIDDEN_MOUNT = (
        "hidden-mount",
        "the guest mounts over the folder that is written to, and does not see it",
    )
    COPY = "copy", "the interrupted work was on another file, of which this may be a copy"
    UNPROVED = "unproved", "the record of work may not be of this user's imgtool"
    CHANGED = "changed", "what was written since the work was interrupted is lost"


# The guards that a user gives up.
Force = Collection[Reason]


class ImgtoolError(Exception):
    """Done in part, or failed for a reason that has no type of its own.

    `message` is one line without the name of the thing; `subject` is the image, path or device
    that it is about; `hint` says what the user can do.
    """

    status = ExitStatus.FAILED

    def __init__(self, message: str, *, subject: object = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.subject = subject
        self.hint = hint

    def add_context(self, where: str) -> Self:
        """Put where it happened before what happened. The error itself: its type, its status and
        whatever else it knows stay, which a new one of its type could not be given."""
        self.message = f"{where}: {self.message}"
        self.args = (self.message, *self.args[1:])
        return self

    def rename_option(self, usual: str, here: str) -> Self:
        """Have the hint name an option as it is called for this image of the command."""
        if self.hint is not None:
            self.hint = self.hint.replace(f"{usual} ", f"{here} ")
        return self

    def __str__(self) -> str:
        return self.message if self.subject is None else f"{self.message} ({self.subject})"


class UsageError(ImgtoolError, ValueError):
    """The command line, or the arguments of an API call, make no sense together."""

    status = ExitStatus.USAGE


class ImageError(ImgtoolError, OSError):
    """The image cannot be read: missing, not an image, unsupported, damaged, broken chain."""

    status = ExitStatus.IMAGE_UNREADABLE

    def __str__(self) -> str:
        return ImgtoolError.__str__(self)


class ImagePermissionError(ImageError, PermissionError):
    """The image is there, and this user may not read it."""

    status = ExitStatus.HOST_CANNOT


class RefusedError(ImgtoolError, PermissionError):
    """Refused to protect data. Where `reason` is given, `--force REASON` does it all the same."""

    status = ExitStatus.REFUSED

    def __init__(
        self,
        message: str,
        *,
        subject: object = None,
        hint: str | None = None,
        reason: Reason | None = None,
    ) -> None:
        if reason is not None:
            forced = f"to do it all the same: --force {reason}"
            hint = forced if hint is None else f"{hint}; {forced}"
        super().__init__(message, subject=subject, hint=hint)
        self.reason = reason

    def __str__(self) -> str:
        return ImgtoolError.__str__(self)


class NotInGuestError(ImgtoolError, FileNotFoundError):
    """The guest has no such path, device, snapshot or operating system."""

    status = ExitStatus.NOT_IN_GUEST

    def __str__(self) -> str:
        return ImgtoolError.__str__(self)


class HostError(ImgtoolError, RuntimeError):
    """The host cannot do it: a program, module, permission or memory is missing."""

    status = ExitStatus.HOST_CANNOT


# What a write ends with where a file system, a quota or a limit of the host is full.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_NOT_ALLOWED = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))


def host_file_error(
    what: str, error: OSError, *, subject: object, hint: str | None = None
) -> ImgtoolError:
    """The error for a file of the host: `HostError` where room or permission is missing."""
    kind = HostError if error.errno in NO_ROOM | _NOT_ALLOWED else ImgtoolError
    return kind(f"{what}: {(error.strerror or '').lower()}", subject=subject, hint=hint)


class EngineError(ImgtoolError, OSError):
    """An engine failed inside the guest: an I/O error, a full filesystem, a lost appliance."""

    def __str__(self) -> str:
        return ImgtoolError.__str__(self)


class NotReadDirectly(ImgtoolError):
    """The direct engine cannot read something, and was asked alone or has begun to answer: what it
    says is no word on the guest, and the appliance may read it.
    """


class Interrupted(ImgtoolError):
    """The user pressed Ctrl-C; everything was undone."""

    status = ExitStatus.INTERRUPTED
