"""Limits of the processes in the sandbox on what no size of memory limits: threads, open files."""

from __future__ import annotations

import _thread
import resource

# Of QEMU's pool for each disk there are up to 64, and a few besides.
_THREADS, _THREADS_A_DISK = 32, 80
# A user who does other things too starts threads elsewhere meanwhile.
_ALONE, _ELSEWHERE = 16, 1024
_OPEN = 1024


def _may_have(threads: int) -> bool:
    """Whether a thread is let in with this limit."""
    resource.setrlimit(resource.RLIMIT_NPROC, (threads, _hard(resource.RLIMIT_NPROC)))
    try:
        _thread.start_new_thread(int, ())
    except RuntimeError:
        return False
    return True


def _hard(kind: int) -> int:
    return resource.getrlimit(kind)[1]


def require() -> None:
    """Raise `OSError` where no limit on threads holds: root may have any number of them."""
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    unlimited = _may_have(0)
    resource.setrlimit(resource.RLIMIT_NPROC, before)
    if unlimited:
        raise OSError("threads cannot be limited here")


def _threads_now() -> int:
    """How many threads the user has, here and elsewhere, of which only the kernel knows; a few more
    while those end that were started to find out. Raises as `require`.
    """
    require()
    least, most = 0, 64
    while not _may_have(most):
        least, most = most, most * 4
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if _may_have(middle) else (middle, most)
    return most


def limit(disks: int) -> None:
    """Limit what no size of memory does, in this process and what it starts: threads, and open
    files, each with a buffer in the kernel. Raises as `require`.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    now = _threads_now()
    threads = now + _THREADS + _THREADS_A_DISK * disks + (now > _ALONE) * _ELSEWHERE
    for kind, most in ((resource.RLIMIT_NPROC, threads), (resource.RLIMIT_NOFILE, _OPEN)):
        hard = _hard(kind)
        if hard == resource.RLIM_INFINITY or hard > most:
            resource.setrlimit(kind, (most, most))
        else:
            resource.setrlimit(kind, (hard, hard))
