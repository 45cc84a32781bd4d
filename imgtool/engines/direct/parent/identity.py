"""Whom the sandbox of root runs as: a user that is nobody else, with one right, to read files.

Root may have any number of threads, whatever limit is set. Another user may not, but could not open
root's images. So it keeps the capability to read, which is good for what the sandbox shows, and for
nothing else.

Source: user_namespaces(7), capabilities(7), fork(2) about RLIMIT_NPROC; systemd.exec(5) about
DynamicUser for the range of numbers.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

from imgtool.engines.direct.wire.refusals import NoSandbox
from imgtool.host.process import DEVNULL, PIPE, find, spawn

_NOBODY = 65534
_DYNAMIC = range(61184, 65520)


def _mapped_ids() -> tuple[list[range], list[range]]:
    """The users and the groups that there are in this user namespace; `NoSandbox` where that cannot
    be told.
    """
    found = []
    for name in ("uid_map", "gid_map"):
        try:
            lines = Path("/proc/self", name).read_text().splitlines()
        except OSError as error:
            raise NoSandbox("/proc is not mounted here") from error
        numbers = [[int(word) for word in line.split()] for line in lines]
        found.append([range(first, first + count) for first, _, count in numbers])
    return found[0], found[1]


def spare_user() -> int | None:
    """For root, the number of a user and a group that nothing else runs as; None for others, and
    where there is no other user. Raises `NoSandbox` where that cannot be told.
    """
    if os.geteuid() != 0:
        return None
    users, groups = _mapped_ids()
    for wanted in (random.choice(_DYNAMIC), _NOBODY):
        if all(any(wanted in part for part in parts) for parts in (users, groups)):
            return wanted
    return None


@contextlib.contextmanager
def user_namespace() -> Iterator[int]:
    """A descriptor of a new user namespace, in which all users and groups are who they are here.

    A namespace has to have a process in it before it can be given its users. That is a program: a
    copy of this process would hold the pipes that other threads wait at.

    Raises `NoSandbox` where none can be had.
    """
    if find("unshare") is None:
        raise NoSandbox("unshare is not installed")
    with spawn(["unshare", "--user", "cat"], stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(b"+")
            process.stdin.flush()
            if process.stdout.read(1) != b"+":  # which cat(1) says from within
                raise NoSandbox("no user namespace can be made")
            for name, parts in zip(("uid_map", "gid_map"), _mapped_ids(), strict=True):
                lines = [f"{part.start} {part.start} {len(part)}\n" for part in parts]
                Path(f"/proc/{process.pid}/{name}").write_text("".join(lines))
            descriptor = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NoSandbox(f"no user namespace can be filled: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
