"""By what a record proves that this user's imgtool wrote it: a secret that no other user can read.

Anybody can put a file beside an image: a guest's file that is copied there, an archive, a folder
from elsewhere. The secret is made on first use, in a place that no variable but one leads away
from: with another HOME, or none, it is the same user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)

STATE_VARIABLE = "IMGTOOL_STATE_DIR"
_OF_ROOT = Path("/var/lib/imgtool")
_OF_A_USER = ".local/state/imgtool"
_NAME = "record-secret"
_LENGTH = 32  # bytes
_known: dict[tuple[Path, int], bytes] = {}  # each is read once


def state_folder() -> Path | None:
    """Where this user's secret is; None for a user without a home."""
    if named := os.environ.get(STATE_VARIABLE):
        return Path(named)
    if os.geteuid() == 0:  # in an initramfs and a systemd unit as well
        return _OF_ROOT
    import pwd

    with contextlib.suppress(KeyError):
        return Path(pwd.getpwuid(os.geteuid()).pw_dir) / _OF_A_USER
    return None


def proof_of(line: str, before: str, *, create: bool = False) -> str | None:
    """What proves a line of a record that follows one with the proof `before`; None where this
    user has no secret, and none can be, or is to be, made."""
    folder = state_folder()
    secret = _secret(folder, os.geteuid(), create) if folder is not None else None
    if secret is None:
        return None
    import hmac  # seldom needed, and slow to load

    return hmac.digest(secret, f"{before}\n{line}".encode(), "sha256").hex()


def proves(proof: object, line: str, before: str) -> bool:
    """Whether this user's imgtool wrote the line, after the one with the proof `before`."""
    own = proof_of(line, before)
    if own is None or not isinstance(proof, str) or not proof.isascii():
        return False
    import hmac

    return hmac.compare_digest(proof, own)


def _secret(folder: Path, user: int, create: bool) -> bytes | None:
    path = folder / _NAME
    if (path, user) not in _known:
        try:
            secret = _read(path, user) or (_made(path, user) if create else None)
        except OSError as error:
            log.info("%s: no secret for records of work: %s", path, error.strerror)
            return None
        if secret is None:
            return None
        _known[path, user] = secret
    return _known[path, user]


def _read(path: Path, user: int) -> bytes | None:
    """The secret, if it is there and nobody else's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if os.fstat(descriptor).st_nlink == 2:
            _remove_first_name(path, os.fstat(descriptor))
        status = os.fstat(descriptor)
        content = os.read(descriptor, _LENGTH + 1)
    finally:
        os.close(descriptor)
    own = stat.S_ISREG(status.st_mode) and status.st_uid == user and status.st_nlink == 1
    if not own or status.st_mode & 0o077 or len(content) != _LENGTH:
        raise PermissionError(0, "it is not this user's alone, or not whole: remove it")
    return content


def _remove_first_name(path: Path, status: os.stat_result) -> None:
    """Whoever made the secret was killed before its first name went."""
    for other in path.parent.glob(f"{_NAME}.????????"):
        with contextlib.suppress(OSError):
            if (other.lstat().st_dev, other.lstat().st_ino) == (status.st_dev, status.st_ino):
                other.unlink()


def _made(path: Path, user: int) -> bytes | None:
    """A new secret, written whole; or the one that another imgtool has just made."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{_NAME}.{os.urandom(4).hex()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, os.urandom(_LENGTH))
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        os.close(descriptor)
        new.unlink(missing_ok=True)  # who came first may have taken it for one that was left
    return _read(path, user)
