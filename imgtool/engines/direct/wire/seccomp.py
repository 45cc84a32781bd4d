"""Filters for system calls, in the sandbox of the direct engine.

READING is what all processes of a sandbox that reads images may call, each call with the reason.
WORKER is what is left to the worker once the images are open. ALONE is what a program that looks at
an image loses besides. NEVER is what the sandbox that replays journals has not, where more programs
run than a list of what they need could name. Nothing of it can be taken back.

A filter sees the numbers that a call is given, not what its pointers lead to.

Source: seccomp(2), linux/filter.h, linux/seccomp.h; linux/fcntl.h, asm/ioctls.h, linux/prctl.h,
linux/socket.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from imgtool.engines.direct.wire.libc import libc
from imgtool.engines.direct.wire.syscalls import architecture, number

_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_X32 = 0x40000000
_AF_UNIX = 1
_MSG_OOB = 1
_THREAD = 0x00010000  # of clone(2): no process of its own
# Flags of clone(2) for new namespaces: mount, cgroup, UTS, IPC, user, PID, network.
_NAMESPACES = (
    0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)
_PR_SET_NAME, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 15, 22, 38
_FILTER = 2

# What all of a sandbox that reads may call: Python, the loader, QEMU and what they share.
READING: Mapping[str, str] = {
    "read": "requests, files of the system, and what images hold",
    "readv": "QEMU reads into several buffers",
    "pread64": "QEMU reads images; the loader reads libraries",
    "preadv": "QEMU reads images into several buffers",
    "write": "answers",
    "writev": "QEMU's answers in several parts",
    "pwrite64": "the copy of a volume's ends that libblkid looks at",
    "lseek": "QEMU asks for holes; libblkid goes to a place",
    "open": "libraries, modules, images: what the sandbox shows",
    "openat": "libraries, modules, images: what the sandbox shows",
    "close": "what was opened",
    "close_range": "closes what was inherited",
    "dup": "QEMU opens an image a second time",
    "dup2": "places the descriptors of a program",
    "dup3": "places the descriptors of a program",
    "fcntl": "descriptors' flags, and QEMU's locks on images",
    "ioctl": "whether a file is a terminal; sockets that do not block",
    "stat": "imports, libraries, images",
    "fstat": "imports, libraries, images",
    "lstat": "imports, libraries, images",
    "newfstatat": "imports, libraries, images",
    "statx": "imports, libraries, images",
    "statfs": "QEMU asks which filesystem an image is on",
    "fstatfs": "QEMU asks which filesystem an image is on",
    "access": "the loader asks for its settings",
    "faccessat": "the loader asks for its settings",
    "faccessat2": "the loader asks for its settings",
    "readlink": "Python and QEMU ask where they are",
    "readlinkat": "Python and QEMU ask where they are",
    "chdir": "QEMU goes to / as it starts",
    "getcwd": "names that do not begin with a slash",
    "getdents64": "Python looks for modules",
    "fadvise64": "QEMU and libblkid say how they read",
    "ftruncate": "the copy of a volume's ends has the volume's size",
    "mmap": "memory",
    "mremap": "memory",
    "munmap": "memory",
    "mprotect": "memory",
    "madvise": "memory",
    "brk": "memory",
    "membarrier": "memory, between QEMU's threads",
    "clone": "threads, and the start of QEMU",
    "fork": "the start of QEMU",
    "vfork": "the start of QEMU",
    "execve": "the start of QEMU",
    "wait4": "what was started",
    "exit": "the end of a thread",
    "exit_group": "the end of a program",
    "arch_prctl": "a thread's own memory",
    "set_tid_address": "a thread's end is seen",
    "set_robust_list": "a thread's locks",
    "rseq": "a thread's processor",
    "futex": "locks between threads",
    "sched_yield": "locks between threads",
    "sched_getaffinity": "how many processors there are",
    "gettid": "which thread this is",
    "getpid": "which process this is",
    "getppid": "whether the parent is still there",
    "prctl": "the filters themselves, names of threads, the end with the parent",
    "prlimit64": "limits of its own",
    "rt_sigaction": "signals, which arrive from outside",
    "rt_sigprocmask": "signals, which arrive from outside",
    "rt_sigreturn": "signals, which arrive from outside",
    "rt_sigtimedwait": "signals, which arrive from outside",
    "sigaltstack": "signals, which arrive from outside",
    "signalfd4": "signals, which QEMU reads",
    "restart_syscall": "a call that was stopped goes on",
    "socket": "the connection between the worker and QEMU, which is a local one",
    "bind": "the connection between the worker and QEMU",
    "listen": "the connection between the worker and QEMU",
    "connect": "the connection between the worker and QEMU",
    "accept": "the connection between the worker and QEMU",
    "accept4": "the connection between the worker and QEMU",
    "getsockname": "the connection between the worker and QEMU",
    "getpeername": "the connection between the worker and QEMU",
    "getsockopt": "the connection between the worker and QEMU",
    "setsockopt": "the connection between the worker and QEMU",
    "sendto": "requests to QEMU",
    "sendmsg": "QEMU's answers",
    "recvfrom": "QEMU's answers",
    "recvmsg": "requests to QEMU",
    "shutdown": "the end of the connection",
    "poll": "waits for the other end",
    "ppoll": "waits for the other end",
    "epoll_create1": "QEMU waits for the other end",
    "epoll_ctl": "QEMU waits for the other end",
    "epoll_wait": "QEMU waits for the other end",
    "epoll_pwait": "QEMU waits for the other end",
    "eventfd2": "QEMU's threads wake each other",
    "pipe2": "QEMU's threads wake each other",
    "nanosleep": "QEMU waits",
    "clock_nanosleep": "QEMU waits",
    "clock_gettime": "time, which has no other effect",
    "clock_getres": "time, which has no other effect",
    "gettimeofday": "time, which has no other effect",
    "getrandom": "Python's and QEMU's tables need a start",
    "sysinfo": "libc's sorting asks how much memory there is",
    "uname": "libraries ask which kernel it is",
    "getuid": "libraries ask for whom they run",
    "geteuid": "libraries ask for whom they run",
    "getgid": "libraries ask for whom they run",
    "getegid": "libraries ask for whom they run",
}

# What the worker may call once the images are open and QEMU runs.
WORKER: Mapping[str, str] = {
    "read": "requests, and modules that are loaded when a filesystem needs them",
    "write": "answers",
    "pread64": "the loader reads libraries",
    "pwrite64": "the copy of a volume's ends that libblkid looks at",
    "lseek": "libblkid and modules",
    "open": "modules",
    "openat": "modules",
    "close": "modules",
    "stat": "modules",
    "fstat": "modules",
    "lstat": "modules",
    "newfstatat": "modules",
    "statx": "modules",
    "access": "the loader asks for its settings",
    "faccessat": "the loader asks for its settings",
    "readlink": "modules",
    "readlinkat": "modules",
    "getdents64": "modules",
    "fcntl": "descriptors' flags",
    "ioctl": "Python asks whether a file is a terminal",
    "fadvise64": "libblkid says how it reads",
    "ftruncate": "the copy of a volume's ends has the volume's size",
    "mmap": "memory",
    "mremap": "memory",
    "munmap": "memory",
    "mprotect": "memory",
    "madvise": "memory",
    "brk": "memory",
    "futex": "locks of Python and of libnbd",
    "sendto": "requests to QEMU",
    "recvfrom": "QEMU's answers",
    "shutdown": "the end of the connection to QEMU",
    "poll": "waits for QEMU and for requests",
    "ppoll": "waits for QEMU and for requests",
    "restart_syscall": "a wait that was stopped goes on",
    "rt_sigaction": "Python leaves signals as they were",
    "rt_sigprocmask": "Python leaves signals as they were",
    "rt_sigreturn": "the end of a signal",
    "clock_gettime": "when the parent has to hear of it",
    "clock_getres": "Python's clock",
    "gettimeofday": "Python's clock",
    "getpid": "OpenSSL, which has the checksums, asks whether it was forked",
    "gettid": "libnbd and Python name their threads",
    "getrandom": "OpenSSL and Python's tables need a start",
    "sysinfo": "libc's sorting asks how much memory there is",
    "uname": "libblkid asks which kernel it is",
    "exit": "the end",
    "exit_group": "the end",
}

# What a program that looks at an image may not call, of what READING lets through; of clone(2) and
# prctl(2) a part, and execve(2) only once.
ALONE: Mapping[str, str] = {
    "fork": "it starts no process",
    "vfork": "it starts no process",
    "socket": "it has the one connection that it was given",
    "bind": "it has the one connection that it was given",
    "listen": "it has the one connection that it was given",
    "connect": "it has the one connection that it was given",
}

# What nothing in the sandbox for journals may call.
NEVER: Mapping[str, str] = {
    "ptrace": "another process's memory",
    "process_vm_readv": "another process's memory",
    "process_vm_writev": "another process's memory",
    "pidfd_getfd": "another process's files",
    "mount": "other files than those that it has",
    "umount2": "other files than those that it has",
    "pivot_root": "other files than those that it has",
    "chroot": "other files than those that it has",
    "open_tree": "other files than those that it has",
    "move_mount": "other files than those that it has",
    "fsopen": "other files than those that it has",
    "fsconfig": "other files than those that it has",
    "fsmount": "other files than those that it has",
    "fspick": "other files than those that it has",
    "mount_setattr": "other files than those that it has",
    "open_by_handle_at": "files by no name",
    "name_to_handle_at": "files by no name",
    "fanotify_init": "what others do to files",
    "unshare": "rights in a namespace of its own",
    "setns": "rights in another namespace",
    "execveat": "programs past the filter for execve(2)",
    "socket": "other sockets than local ones",
    "bpf": "programs in the kernel",
    "perf_event_open": "a large part of the kernel that it does not need",
    "userfaultfd": "stops the kernel in the middle of a call",
    "io_uring_setup": "calls that no filter sees",
    "io_uring_enter": "calls that no filter sees",
    "io_uring_register": "calls that no filter sees",
    "personality": "weaker protection of memory",
    "add_key": "the kernel's keys",
    "request_key": "the kernel's keys",
    "keyctl": "the kernel's keys",
    "init_module": "the kernel's code",
    "finit_module": "the kernel's code",
    "delete_module": "the kernel's code",
    "kexec_load": "the kernel's code",
    "kexec_file_load": "the kernel's code",
    "reboot": "the machine",
    "swapon": "the machine",
    "quotactl": "the machine",
    "acct": "the machine",
    "syslog": "the kernel's log",
    "memfd_create": "memory that outlives its mapping, which is all that is limited",
    "memfd_secret": "memory that outlives its mapping, which is all that is limited",
    "shmget": "memory that outlives its mapping, which is all that is limited",
    "msgget": "memory that outlives its mapping, which is all that is limited",
    "semget": "memory that outlives its mapping, which is all that is limited",
    "mq_open": "memory that outlives its mapping, which is all that is limited",
}


class Only(NamedTuple):
    """An argument has to have one of these values, or the call gets `error`."""

    argument: int
    values: Sequence[int]
    error: int = errno.EPERM


class Without(NamedTuple):
    """An argument may have none of these bits."""

    argument: int
    bits: int


# Without a PID namespace another process would be at hand; what is signalled for a file's owner
# (F_SETOWN), what a file's owner may change (FS_IOC_SETFLAGS), and O_TRUNC, which the first
# versions of Landlock do not see, is left out here. MSG_OOB between local sockets is a part of the
# kernel that nothing needs, and that had CVE-2025-38236.
ARGUMENTS: Mapping[str, Only | Without] = {
    "clone": Without(0, _NAMESPACES),
    "socket": Only(0, (_AF_UNIX,)),
    "prlimit64": Only(0, (0,)),
    # TCGETS, FIONBIO, FIOCLEX
    "ioctl": Only(1, (0x5401, 0x5421, 0x5451), errno.ENOTTY),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_OFD_GETLK, F_OFD_SETLK, F_DUPFD_CLOEXEC
    "fcntl": Only(1, (0, 1, 2, 3, 4, 36, 37, 1030)),
    "open": Without(1, os.O_TRUNC),
    "openat": Without(2, os.O_TRUNC),
    "sendto": Without(3, _MSG_OOB),
    "recvfrom": Without(3, _MSG_OOB),
    "sendmsg": Without(2, _MSG_OOB),
    "recvmsg": Without(2, _MSG_OOB),
    "sendmmsg": Without(3, _MSG_OOB),
    "recvmmsg": Without(3, _MSG_OOB),
}
# Of them, those that something in the sandbox for journals needs in part.
_PARTS = ("clone", "sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg")


def _statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _give(error: int) -> bytes:
    return _statement(_RETURN, _ERRNO | error)


def _argument(index: int, *, high: bool = False) -> bytes:
    return _statement(_LOAD, _FIRST_ARGUMENT + 8 * index + 4 * high)


def _start() -> list[bytes]:
    """Kill a process of another architecture; leave the call's number in the accumulator."""
    return [
        _statement(_LOAD, _ARCHITECTURE),
        _statement(_EQUAL, architecture(), 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER),
        _statement(_AT_LEAST, _X32, 0, 1),
        _statement(_RETURN, _ENOSYS),
    ]


def _on(name: str, body: Sequence[bytes]) -> list[bytes]:
    """For this call `body`, which has to end with a decision."""
    called = number(name)
    return [] if called is None else [_statement(_EQUAL, called, 0, len(body)), *body]


def _argument_tests(condition: Only | Without | None) -> list[bytes]:
    """What decides about a call by one of its arguments."""
    if condition is None:
        return [_statement(_RETURN, _ALLOW)]
    if isinstance(condition, Without):
        return [
            _argument(condition.argument),
            _statement(_ANY_OF, condition.bits, 0, 1),
            _statement(_RETURN, _EPERM),
            _statement(_RETURN, _ALLOW),
        ]
    body = [_argument(condition.argument)]
    for value in condition.values:
        body += [_statement(_EQUAL, value, 0, 1), _statement(_RETURN, _ALLOW)]
    return [*body, _give(condition.error)]


def _none_but(names: Iterable[str]) -> bytes:
    program = _start()
    # clone3(2) hides its flags, and libc does without.
    program += _on("clone3", [_statement(_RETURN, _ENOSYS)])
    for name in names:
        program += _on(name, _argument_tests(ARGUMENTS.get(name)))
    return b"".join((*program, _statement(_RETURN, _EPERM)))


def reading_filter() -> bytes:
    """READING and nothing else: all else gets EPERM."""
    return _none_but(READING)


def worker_filter() -> bytes:
    """What the worker may still do once all its programs run; all else gets EPERM."""
    return _none_but(WORKER)


def replay_filter(*, mounts: bool = False) -> bytes:
    """All but NEVER, which gets EPERM, and but new namespaces, sockets that are not local and data
    out of band. With `mounts` it may mount(2).
    """
    program = _start()
    program += _on("clone3", [_statement(_RETURN, _ENOSYS)])
    for name in NEVER:
        if mounts and name == "mount":
            continue
        condition = ARGUMENTS.get(name)
        program += _on(name, _argument_tests(condition) if condition else [_give(errno.EPERM)])
    for name in _PARTS:
        program += _on(name, _argument_tests(ARGUMENTS[name]))
    return b"".join((*program, _statement(_RETURN, _ALLOW)))


def lone_filter(secret: int | None = None) -> bytes:
    """Nothing of ALONE; threads, but no new process; names for threads and filters, but nothing
    else of prctl(2); and no program, but by the call of execve(2) that has the secret as its fourth
    argument, which it does not look at.
    """
    program = _start()
    for name in ALONE:
        program += _on(name, [_give(errno.EPERM)])
    program += _on("clone3", [_statement(_RETURN, _ENOSYS)])
    thread = [_argument(0), _statement(_ANY_OF, _THREAD, 0, 1), _statement(_RETURN, _ALLOW)]
    program += _on("clone", [*thread, _give(errno.EPERM)])
    named = Only(0, (_PR_SET_NAME, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS))
    program += _on("prctl", _argument_tests(named))
    told: list[bytes] = []
    if secret is not None:
        told = [
            _argument(3),
            _statement(_EQUAL, secret & 0xFFFFFFFF, 0, 3),
            _argument(3, high=True),
            _statement(_EQUAL, secret >> 32, 0, 1),
            _statement(_RETURN, _ALLOW),
        ]
    program += _on("execve", [*told, _give(errno.EPERM)])
    return b"".join((*program, _statement(_RETURN, _ALLOW)))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(program: bytes) -> None:
    """Put a filter on this process, for good. Raises `OSError` if the kernel refuses."""
    given = _Program(len(program) // 8, program)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER, ctypes.byref(given), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the seccomp filter cannot be set")
