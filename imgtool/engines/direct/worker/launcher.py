"""Programs of the sandbox that start nothing themselves: no process and no other program.

A filter that never lets execve(2) through would not let the program itself start, and a filter
remembers nothing. So it lets the one call through that has a secret in a register which execve(2)
does not look at. The process that is about to become the program draws it, and it is gone, with all
the memory of that process, once the program runs.

Source: execve(2) clears the registers; systemd's sd_listen_fds(3) for sockets that are inherited.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
from collections.abc import Mapping, Sequence
from typing import NoReturn

from imgtool.engines.direct.wire import seccomp, syscalls
from imgtool.engines.direct.wire.libc import libc
from imgtool.engines.direct.worker import confinement

_PR_SET_DUMPABLE = 4
_FIRST_FREE = 64  # beyond the descriptors that a program is given
_SOCKET = 3  # the first that is inherited by sd_listen_fds(3)


def keep_to_itself() -> None:
    """Let no other process look at the memory and the descriptors of this one."""
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError("the process cannot be closed to others")


def start(
    argv: Sequence[str],
    descriptors: Mapping[int, int],
    *,
    listening: bool = False,
    file_size: int | None = None,
) -> int:
    """Start a program that starts nothing itself; gives its PID.

    It gets standard error and `descriptors` (its number: ours), no others; with `listening`, 3 is
    a socket that it finds as systemd's services do. It writes no file beyond `file_size` bytes. If
    it cannot be started, it ends with status 127.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        confinement.end_with_parent()
        if os.getppid() != parent:
            os._exit(127)
        # Aside first: none may end where another one still is.
        aside = {
            number: fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
            for number, ours in descriptors.items()
        }
        for number, ours in aside.items():
            os.dup2(ours, number)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        environment = dict(os.environ)
        if listening:
            environment |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
        _become(argv, environment)
    finally:
        os._exit(127)


def _become(argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    words = [os.fsencode(word) for word in argv]
    settings = [os.fsencode(f"{name}={value}") for name, value in environment.items()]
    secret = int.from_bytes(os.urandom(8), "big")
    seccomp.confine(seccomp.lone_filter(secret))
    libc.syscall(
        ctypes.c_long(syscalls.number("execve") or -1),
        words[0],
        (ctypes.c_char_p * (len(words) + 1))(*words, None),
        (ctypes.c_char_p * (len(settings) + 1))(*settings, None),
        ctypes.c_ulong(secret),
    )
    os._exit(127)


def start_qemu_nbd(argv: Sequence[str]) -> int:
    """Start qemu-nbd; gives the socket that is connected to it, or will be as soon as it listens.

    The name of its own socket has no place in any file system. Without a network namespace others
    can see it, and come first or later: with room for one, who comes first keeps the others out.
    """
    import _socket  # what `socket` adds takes longer to load than QEMU to start

    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(b"")  # the kernel chooses
    listener.listen(0)
    connected = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connected.settimeout(0)
    connected.connect(listener.getsockname())  # BlockingIOError where somebody was first
    connected.settimeout(None)
    nothing = os.open(os.devnull, os.O_RDWR)
    start(argv, {0: nothing, 1: nothing, _SOCKET: listener.fileno()}, listening=True)
    os.close(nothing)
    listener.close()  # the program's is the only one: if it ends, the connection does
    return connected.detach()
