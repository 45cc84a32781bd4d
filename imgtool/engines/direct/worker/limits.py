"""Limits of the processes in the sandbox on what no size of memory limits: threads, open files."""

from __future__ import annotations

import _thread
import resource

# Of QEMU's pool for each disk there are up to 64, and a few besides.
_THREADS, _THREADS_A_DISK = 32, 80
# A user who does other things too starts threads elsewhere meanwhile, which count here where the
# sandbox has no user of its own. Old kernels count them in every namespace: then there are many.
_ALONE, _ELSEWHERE = 16, 1024
_OPEN = 1024
_ANY = 1 << 30  # more than a kernel has

_shared = False


def share_user() -> None:
    """The user of this process is one who does other things too, now or later."""
    global _shared
    _shared = True


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
    """Raise `OSError` where no limit on threads holds: root may have any number of them; and where
    the host's own limit lets none in.
    """
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    unlimited = _may_have(0)
    none = not unlimited and not _may_have(before[1])
    resource.setrlimit(resource.RLIMIT_NPROC, before)
    if unlimited:
        raise OSError("threads cannot be limited here")
    if none:
        raise OSError("the user has as many threads and processes as the host lets him have")


def _threads_now() -> int:
    """How many threads the user has, here and elsewhere, of which only the kernel knows; a few more
    while those end that were started to find out. Raises as `require`.
    """
    require()
    hard = _hard(resource.RLIMIT_NPROC)
    highest = _ANY if hard == resource.RLIM_INFINITY else hard
    least, most = 0, min(64, highest)
    while most < highest and not _may_have(most):
        least, most = most, min(most * 4, highest)
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
    threads = now + _THREADS + _THREADS_A_DISK * disks + (_shared or now > _ALONE) * _ELSEWHERE
    for kind, most in ((resource.RLIMIT_NPROC, threads), (resource.RLIMIT_NOFILE, _OPEN)):
        hard = _hard(kind)
        if hard == resource.RLIM_INFINITY or hard > most:
            resource.setrlimit(kind, (most, most))
        else:
            resource.setrlimit(kind, (hard, hard))
