"""Filters for system calls, in the sandbox of the direct engine.

Three of them: one for the whole tree of processes, given to bwrap, which takes away what no reader
of an image needs (new namespaces, mounts, tracing, kernel keys, BPF, sockets other than local
ones, memory that no limit counts); one for each program that looks at an image, which then starts
no process and no other program; and one that the worker puts on itself once the image is open,
which lets it do little more than read, write, map memory and end.

Source: seccomp(2), linux/filter.h, linux/seccomp.h; numbers of asm/unistd_64.h and
asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050000 | 1, 0x00050000 | 38
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _FOURTH_ARGUMENT = 0, 4, 16, 40
_X32 = 0x40000000
_AF_UNIX = 1

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2

# System calls by name: their numbers on x86_64 and on aarch64 (None: there is no such call).
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "ppoll": (271, 73),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "ioctl": (16, 29),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe2": (293, 59),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "wait4": (61, 260),
    "kill": (62, 129),
    "uname": (63, 160),
    "fcntl": (72, 25),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "getcwd": (79, 17),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "tgkill": (234, 131),
    "openat": (257, 56),
    "newfstatat": (262, 79),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "statx": (332, 291),
    "getrandom": (318, 278),
    "fadvise64": (221, 223),
    "rseq": (334, 293),
    "prlimit64": (302, 261),
    "sysinfo": (99, 179),
    "restart_syscall": (219, 128),
    # never in the sandbox
    "socket": (41, 198),
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "personality": (135, 92),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "syslog": (103, 116),
    "fspick": (433, 433),
    "pidfd_getfd": (438, 438),
    "fanotify_init": (300, 262),
    "memfd_secret": (447, 447),
    "execveat": (322, 281),
    # memory that outlives its mapping, which is all that is limited
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_EXECVE, _CLONE, _CLONE3 = (59, 221), (56, 220), (435, 435)
_FORKS: tuple[tuple[int | None, int | None], ...] = ((57, None), (58, None))  # and vfork
_THREAD = 0x00010000  # of clone(2): no process of its own
# Flags of clone(2) for new namespaces: mount, cgroup, UTS, IPC, user, PID, network.
_NAMESPACES = (
    0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)
_NEVER = tuple(_CALLS)[tuple(_CALLS).index("ptrace") :]
_WORKER = tuple(_CALLS)[: tuple(_CALLS).index("socket")]
_MOUNTS = ("mount", "umount2")
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def supported() -> bool:
    """Whether the numbers of this machine's system calls are known."""
    return os.uname().machine in _ARCHITECTURES


def _statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _column() -> int:
    return _ARCHITECTURES[os.uname().machine][1]


def _numbers(names: Iterable[str]) -> list[int]:
    column = _column()
    return [number for name in names if (number := _CALLS[name][column]) is not None]


def execve_number() -> int:
    """The number of execve(2)."""
    return _EXECVE[_column()]


def _start() -> list[bytes]:
    """Kill a process of another architecture; leave the call's number in the accumulator."""
    return [
        _statement(_LOAD, _ARCHITECTURE),
        _statement(_EQUAL, _ARCHITECTURES[os.uname().machine][0], 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER),
        _statement(_AT_LEAST, _X32, 0, 1),
        _statement(_RETURN, _ENOSYS),
    ]


def tree_filter(*, mounts: bool = False) -> bytes:
    """What no process of the sandbox may do: it gets EPERM. With `mounts` it may mount(2)."""
    program = _start()
    for number in _numbers(name for name in _NEVER if not (mounts and name in _MOUNTS)):
        program += [_statement(_EQUAL, number, 0, 1), _statement(_RETURN, _EPERM)]
    # No namespaces by clone(2), whose flags are seen; clone3(2) hides them, and libc does without.
    column = _column()
    program += [
        _statement(_EQUAL, _CLONE3[column], 0, 1),
        _statement(_RETURN, _ENOSYS),
        _statement(_EQUAL, _CLONE[column], 0, 4),
        _statement(_LOAD, _FIRST_ARGUMENT),
        _statement(_ANY_OF, _NAMESPACES, 0, 1),
        _statement(_RETURN, _EPERM),
        _statement(_RETURN, _ALLOW),
    ]
    # socket(2) for AF_UNIX alone.
    (socket,) = _numbers(("socket",))
    program += [
        _statement(_EQUAL, socket, 0, 3),
        _statement(_LOAD, _FIRST_ARGUMENT),
        _statement(_EQUAL, _AF_UNIX, 1, 0),
        _statement(_RETURN, _EPERM),
        _statement(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def lone_filter(secret: int | None = None) -> bytes:
    """Threads, but no new process; and no program, but by the call of execve(2) that has the secret
    as its fourth argument, which it does not look at.
    """
    column = _column()
    program = _start()
    for number in (forks[column] for forks in _FORKS):
        if number is not None:
            program += [_statement(_EQUAL, number, 0, 1), _statement(_RETURN, _EPERM)]
    program += [
        _statement(_EQUAL, _CLONE3[column], 0, 1),
        _statement(_RETURN, _ENOSYS),
        _statement(_EQUAL, _CLONE[column], 0, 4),
        _statement(_LOAD, _FIRST_ARGUMENT),
        _statement(_ANY_OF, _THREAD, 0, 1),
        _statement(_RETURN, _ALLOW),
        _statement(_RETURN, _EPERM),
        _statement(_EQUAL, _EXECVE[column], 1, 0),
        _statement(_RETURN, _ALLOW),
    ]
    if secret is not None:
        program += [
            _statement(_LOAD, _FOURTH_ARGUMENT),
            _statement(_EQUAL, secret & 0xFFFFFFFF, 0, 3),
            _statement(_LOAD, _FOURTH_ARGUMENT + 4),
            _statement(_EQUAL, secret >> 32, 0, 1),
            _statement(_RETURN, _ALLOW),
        ]
    program.append(_statement(_RETURN, _EPERM))
    return b"".join(program)


def worker_filter() -> bytes:
    """What the worker may still do once all its programs run; all else gets EPERM."""
    program = _start()
    for number in _numbers(_WORKER):
        program += [_statement(_EQUAL, number, 0, 1), _statement(_RETURN, _ALLOW)]
    program.append(_statement(_RETURN, _EPERM))
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(program: bytes) -> None:
    """Put a filter on this process, for good. Raises `OSError` if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    given = _Program(len(program) // 8, program)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER, ctypes.byref(given), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the seccomp filter cannot be set")
