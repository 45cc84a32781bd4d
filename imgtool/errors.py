"""The error types: what a user is told, what can be done, and the exit status.

Every error that imgtool raises on purpose is an `ImgtoolError`. It is raised where the cause is
known and caught in one place, the command line, which prints `imgtool: error: WHAT (WHICH)` and,
where there is one, `  hint: WHAT TO DO`. The exit statuses are the contract that scripts rely on.

Each type also derives from the built-in exception that it stands for, so that users of the Python
API can write `except FileNotFoundError`.
"""

from __future__ import annotations

from enum import IntEnum


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


class RefusedError(ImgtoolError, PermissionError):
    """Refused to protect data."""

    status = ExitStatus.REFUSED

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


class EngineError(ImgtoolError, OSError):
    """An engine failed inside the guest: an I/O error, a full filesystem, a lost appliance."""

    def __str__(self) -> str:
        return ImgtoolError.__str__(self)


class Interrupted(ImgtoolError):
    """The user pressed Ctrl-C; everything was undone."""

    status = ExitStatus.INTERRUPTED
