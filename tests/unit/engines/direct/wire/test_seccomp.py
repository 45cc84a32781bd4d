"""The lists of system calls that the sandbox lets through: each call is there for a reason."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys

import pytest

from imgtool.engines.direct.wire import seccomp, syscalls

READING = """
    accept accept4 access arch_prctl bind brk chdir clock_getres clock_gettime clock_nanosleep clone
    close close_range connect dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2
    execve exit exit_group faccessat faccessat2 fadvise64 fcntl fork fstat fstatfs ftruncate futex
    getcwd getdents64 getegid geteuid getgid getpeername getpid getppid getrandom getsockname
    getsockopt gettid gettimeofday getuid ioctl listen lseek lstat madvise membarrier mmap mprotect
    mremap munmap nanosleep newfstatat open openat pipe2 poll ppoll prctl pread64 preadv prlimit64
    pwrite64 read readlink readlinkat readv recvfrom recvmsg restart_syscall rseq rt_sigaction
    rt_sigprocmask rt_sigreturn rt_sigtimedwait sched_getaffinity sched_yield sendmsg sendto
    set_robust_list set_tid_address setsockopt shutdown sigaltstack signalfd4 socket stat statfs
    statx sysinfo uname vfork wait4 write writev
"""
WORKER = """
    access brk clock_getres clock_gettime close exit exit_group faccessat fadvise64 fcntl fstat
    ftruncate futex getdents64 getpid getrandom gettid gettimeofday ioctl lseek lstat madvise mmap
    mprotect mremap munmap newfstatat open openat poll ppoll pread64 pwrite64 read readlink
    readlinkat recvfrom restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn sendto shutdown
    stat statx sysinfo uname write
"""
ALONE = "bind connect fork listen socket vfork"
# Calls that reach other processes, change files, or get rights; the lists hold none of them.
HARMFUL = """
    kill tkill tgkill rt_sigqueueinfo pidfd_open pidfd_send_signal pidfd_getfd ptrace
    process_vm_readv process_vm_writev unlink unlinkat mkdir mkdirat rmdir rename renameat2 link
    symlink truncate fallocate chmod fchmod fchmodat chown fchown utimensat setxattr fsetxattr
    mknod creat openat2 fsync setuid setresuid setgid setresgid setgroups capset unshare setns mount
    umount2 chroot pivot_root memfd_create io_uring_setup bpf keyctl shmget msgget semget mq_open
    setpriority sched_setaffinity setsid execveat open_by_handle_at
"""


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(seccomp.READING, READING), (seccomp.WORKER, WORKER), (seccomp.ALONE, ALONE)],
    ids=["reading", "worker", "alone"],
)
def test_the_lists_are_these_and_each_call_has_a_reason(listed, expected):
    assert sorted(listed) == sorted(expected.split())
    assert all(len(reason.split()) >= 1 for reason in listed.values())
    assert set(listed) <= set(syscalls.NUMBERS)


def test_nothing_harmful_is_let_through():
    harmful = set(HARMFUL.split())
    assert not harmful & set(seccomp.READING)
    assert not harmful & set(seccomp.WORKER)
    assert set(seccomp.WORKER) <= set(seccomp.READING)
    assert set(seccomp.ALONE) <= set(seccomp.READING)


def test_the_numbers_are_those_of_the_kernel():
    """strace has a table of its own."""
    if os.uname().machine != "x86_64":
        pytest.skip("the table of this machine's numbers is not at hand")
    known = {name: number for name in syscalls.NUMBERS if (number := syscalls.number(name))}
    program = "import ctypes\nfor n in %r: ctypes.CDLL(None).syscall(n, -1, -1, -1, -1, -1, -1)"
    harmless = [
        *("accept", "bind", "close", "connect", "dup", "epoll_ctl", "faccessat2", "fstat"),
        *("fstatfs", "ftruncate", "getcwd", "landlock_restrict_self", "lseek", "newfstatat"),
        *(
            "preadv",
            "readlinkat",
            "recvmmsg",
            "sendmmsg",
            "setsockopt",
            "signalfd4",
            "statfs",
            "statx",
            "wait4",
        ),
    ]
    done = subprocess.run(
        ["strace", "-qq", sys.executable, "-c", program % [known[name] for name in harmless]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {name for name in harmless if f"\n{name}(" not in done.stderr} == set()


def tried(program: bytes, *calls: tuple[object, ...]) -> list[int]:
    """The errors (0: none) of system calls behind a filter, in a process of its own."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            seccomp.confine(program)
            errors = []
            for name, *arguments in calls:
                number = ctypes.c_long(syscalls.number(str(name)) or -1)
                failed = libc.syscall(number, *arguments) < 0
                errors.append(ctypes.get_errno() if failed else 0)
            os.write(tell, bytes(errors))
        finally:
            os._exit(0)
    os.close(tell)
    try:
        return list(os.read(told, 100))
    finally:
        os.close(told)
        os.waitpid(pid, 0)


PATH = ctypes.c_char_p(b"/dev/null")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("getpid",), 0),
        (("socket", 1, 1, 0), 0),
        (("socket", 2, 1, 0), errno.EPERM),
        (("socket", 16, 3, 0), errno.EPERM),
        (("ioctl", 0, 0x5401, 0), -1),
        (("ioctl", 0, 0x40086602, 0), errno.ENOTTY),
        (("ioctl", 0, 0x5412, 0), errno.ENOTTY),
        (("fcntl", 0, 1, 0), 0),
        (("fcntl", 0, 8, 1), errno.EPERM),
        (("fcntl", 0, 1024, 0), errno.EPERM),
        (("openat", -100, PATH, os.O_RDONLY), 0),
        (("openat", -100, PATH, os.O_RDWR | os.O_TRUNC), errno.EPERM),
        (("prlimit64", 0, 7, 0, 0), 0),
        (("prlimit64", 1, 7, 0, 0), errno.EPERM),
        (("clone", 0x10000000 | 17, 0, 0, 0, 0), errno.EPERM),
        (("clone3", 0, 0), errno.ENOSYS),
        (("unshare", 0x10000000), errno.EPERM),
        (("memfd_create", PATH, 0), errno.EPERM),
        (("io_uring_setup", 1, 0), errno.EPERM),
    ],
)
def test_arguments_decide_where_a_call_does_more_than_one_thing(call, error):
    (found,) = tried(seccomp.reading_filter(), call)
    assert found == error or (error == -1 and found in (0, errno.ENOTTY))


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        (seccomp.reading_filter, ("sendto", "recvfrom", "sendmsg", "recvmsg")),
        (seccomp.worker_filter, ("sendto", "recvfrom")),
        (
            seccomp.replay_filter,
            ("sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg"),
        ),
    ],
)
def test_nothing_is_sent_out_of_band(program, calls):
    """Local sockets would do it, in a part of the kernel that nothing needs."""
    for call in calls:
        place = 2 if call in ("sendmsg", "recvmsg") else 3
        told = [(call, -1, *(0,) * (place - 1), flags, 0) for flags in (1, 0x4001, 0, 0x4000)]
        assert tried(program(), *told) == [errno.EPERM, errno.EPERM, errno.EBADF, errno.EBADF]
    ours, other = socket.socketpair()
    with ours, other:
        sent = ("sendto", ours.fileno(), PATH, 4)
        assert tried(program(), (*sent, socket.MSG_OOB, 0, 0), (*sent, 0, 0, 0)) == [errno.EPERM, 0]
        assert other.recv(100) == b"/dev"


def test_replay_may_neither_mount_nor_trace_nor_connect():
    calls = [(name, -1, -1, -1, -1) for name in seccomp.NEVER if name != "socket"]
    assert tried(seccomp.replay_filter(), *calls) == [errno.EPERM] * len(calls)
    sockets = [("socket", 1, 1, 0), ("socket", 2, 1, 0)]
    assert tried(seccomp.replay_filter(), *sockets) == [0, errno.EPERM]
    assert tried(seccomp.replay_filter(), ("clone3", 0, 0)) == [errno.ENOSYS]
