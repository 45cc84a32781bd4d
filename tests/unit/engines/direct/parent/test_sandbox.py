"""The sandbox of the direct engine, tried from the inside."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from imgtool.engines.direct.parent import identity, questions, sandbox, session
from imgtool.engines.direct.parent.client import Client, WorkerFailed
from imgtool.engines.direct.parent.devices import Devices
from imgtool.engines.direct.parent.sandbox import Kind
from imgtool.engines.direct.parent.scratch import Scratch, scratch_memory
from imgtool.engines.direct.wire import landlock
from imgtool.engines.direct.worker import confinement, limits
from imgtool.errors import HostError, ImageError
from imgtool.image.chain.chain import open_chain
from imgtool.opening import open_guest

ROOT = os.geteuid() == 0
# The kinds of sandbox, and how much of Landlock each has: kernels of all versions are in use.
KINDS = [
    pytest.param(Kind.NAMESPACES, None, id="namespaces"),
    pytest.param(Kind.LANDLOCK, None, id="Landlock"),
    pytest.param(Kind.LANDLOCK, 1, id="Landlock 1"),
]

# What a program does that was taken over by its image.
ATTACK = """
import ctypes, fcntl, json, os, resource, signal, socket, stat, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
said = {}
def attempt(name, action):
    try:
        said[name] = "done: %r" % (action(),)
    except BaseException as error:
        said[name] = type(error).__name__
def call(*words):
    found = libc.syscall(*words)
    if found < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return found
def forked():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
def overwrite(path):
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    return os.pwrite(descriptor, b"overwritten", 1 << 20)
def many():
    opened = []
    try:
        for _ in range(2000):
            opened.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)
def thread():
    one = threading.Thread(target=lambda: None)
    one.start()
    one.join()
def stamp(path):
    times = (ctypes.c_long * 4)(1, 0, 1, 0)
    return call(280, -100, path.encode(), times, 0)
pid, secret, image, seen = (targets[name] for name in ("pid", "secret", "image", "seen"))
attempt("host file", lambda: open(secret).read())
attempt("password file", lambda: open("/etc/passwd").read())
attempt("folder of the host", lambda: os.listdir(os.path.dirname(secret)))
attempt("processes", lambda: os.listdir("/proc"))
attempt("process of the host", lambda: open("/proc/%d/environ" % pid).read())
attempt("own status", lambda: open("/proc/self/status").read())
attempt("kill", lambda: os.kill(pid, 0))
attempt("kill all", lambda: os.kill(-1, 0))
attempt("tgkill", lambda: call(234, pid, pid, 0))
attempt("tkill", lambda: call(200, pid, 0))
attempt("sigqueue", lambda: call(129, pid, 0, ctypes.create_string_buffer(128)))
attempt("pidfd_open", lambda: call(434, pid, 0))
attempt("pidfd_send_signal", lambda: call(424, 0, 0, 0, 0))
attempt("pidfd_getfd", lambda: call(438, 0, 0, 0))
attempt("process_vm_readv", lambda: call(310, pid, 0, 0, 0, 0, 0))
attempt("process_vm_writev", lambda: call(311, pid, 0, 0, 0, 0, 0))
attempt("kcmp", lambda: call(312, pid, pid, 2, 0, 0))
attempt("trace", lambda: call(101, 16, pid, 0, 0))
attempt("limits of another", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE))
attempt("priority of another", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
attempt("processors of another", lambda: os.sched_setaffinity(pid, {0}))
attempt("more threads", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)))
attempt("signal by a descriptor", lambda: fcntl.fcntl(1, fcntl.F_SETOWN, pid))
attempt("lease", lambda: fcntl.fcntl(os.open(seen, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK))
attempt("network", lambda: socket.create_connection(("127.0.0.1", targets["port"]), 2).recv(1))
attempt("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
for name in ("local socket", "abstract socket"):
    address = targets[name].encode()
    attempt(name, lambda: socket.socket(socket.AF_UNIX).connect(address))
attempt("program", lambda: subprocess.run(["/usr/bin/python3", "-c", "pass"], check=True))
for path in (image, seen, secret):
    attempt("write " + path, lambda: open(path, "r+b"))
    attempt("append to " + path, lambda: open(path, "ab"))
    attempt("cut off " + path, lambda: os.open(path, os.O_RDONLY | os.O_TRUNC))
    attempt("truncate " + path, lambda: os.truncate(path, 0))
    attempt("mode of " + path, lambda: os.chmod(path, 0o777))
    attempt("owner of " + path, lambda: os.chown(path, os.getuid(), os.getgid()))
    attempt("times of " + path, lambda: stamp(path))
    attempt("attribute of " + path, lambda: os.setxattr(path, "user.x", b"x"))
    attempt("remove " + path, lambda: os.unlink(path))
    attempt("rename " + path, lambda: os.rename(path, path + ".x"))
    attempt("link to " + path, lambda: os.link(path, "/tmp/linked"))
for path in (seen, image):
    opened = lambda: os.open(path, os.O_RDONLY)
    attempt("flags of " + path, lambda: fcntl.ioctl(opened(), 0x40086602, b"@" + bytes(7)))
    attempt("mode by descriptor of " + path, lambda: os.fchmod(opened(), 0o777))
for number in range(3, 64):
    try:
        plain = stat.S_ISREG(os.fstat(number).st_mode)
    except OSError:
        continue
    if plain:
        attempt("write descriptor %d" % number, lambda: os.pwrite(number, b"overwritten", 1 << 20))
        attempt("reopen descriptor %d" % number, lambda: overwrite("/proc/self/fd/%d" % number))
places = ("", "/images", "/usr/lib", "/python/own/imgtool", "/dev", "/dev/shm", "/proc", "/work")
for place in (*places, os.path.dirname(secret), os.path.dirname(image)):
    attempt("write in " + place, lambda: open(place + "/x", "w"))
    attempt("folder in " + place, lambda: os.mkdir(place + "/y"))
    attempt("link in " + place, lambda: os.symlink("/etc/passwd", place + "/z"))
attempt("more than the scratch", lambda: open("/tmp/x", "wb").write(bytes(1 << 30)))
for name in ("kernel/core_pattern", "vm/swappiness", "kernel/modprobe"):
    attempt("sysctl " + name, lambda: open("/proc/sys/" + name, "r+b"))
attempt("namespace by clone", lambda: call(56, 0x10000000 | 17, 0, 0, 0, 0))
attempt("mount", lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0))
attempt("mount proc", lambda: call(165, b"proc", b"/tmp", b"proc", 0, 0))
for place in (b"/", b"/usr/lib", b"/proc", b"/images/0", b"/dev"):
    attempt("mount %r for writing" % place, lambda: call(165, 0, place, 0, 32 | 4096, 0))
    attempt("unmount %r" % place, lambda: call(166, place, 2))
attempt("namespace", lambda: call(272, 0x10000000))
attempt("mount namespace", lambda: call(272, 0x00020000))
attempt("root folder", lambda: os.chroot("/tmp"))
attempt("setuid", lambda: os.setuid(0) if os.getuid() else os.setuid(1))
attempt("setgid", lambda: os.setgid(0) if os.getgid() else os.setgid(1))
attempt("file by handle", lambda: call(304, -100, 0, 0))
attempt("memory without a name", lambda: os.memfd_create("x"))
attempt("shared memory", lambda: call(29, 0, 1 << 20, 0o1600))
attempt("message queue", lambda: call(68, 0, 0o1600))
attempt("keys", lambda: call(250, 0, -3, 0))
attempt("io_uring", lambda: call(425, 1, ctypes.create_string_buffer(256)))
attempt("bpf", lambda: call(321, 0, 0, 0))
attempt("process by fork", forked)
attempt("process by clone3", lambda: call(435, 0, 0))
attempt("thread", thread)
attempt("open files", many)
attempt("life after the parent", lambda: call(157, 1, 0, 0, 0, 0))
"""

# It in the place of the worker, or of what the worker starts.
IN_WORKER = """
import sys; sys.path[:0] = {paths!r}
import json, os
from imgtool.engines.direct.wire import seccomp
from imgtool.engines.direct.worker import launcher
from imgtool.engines.direct.worker import __main__ as start
from imgtool.engines.direct.worker.server import Worker
argv = json.loads(sys.stdin.buffer.readline())
targets = json.loads(sys.stdin.buffer.readline())
import ctypes, socket, subprocess, stat, threading
code = "targets = " + repr({{"seen": targets["seen"]}}) + chr(10) + targets["code"]
if not targets["filtered"]:
    seccomp.confine = lambda program: None
if targets["started"]:
    started = launcher.start_qemu_nbd
    launcher.start_qemu_nbd = lambda argv: (
        started(argv),
        launcher.start(["/usr/bin/python3", "-I", "-S", "-B", "-c", code], {{1: 1}}),
    )[0]
(disk,) = start.disks([argv])
disk.wait()
if targets["started"]:
    os.wait()
else:
    seccomp.confine(seccomp.worker_filter())
    exec(code)
    assert disk.read(0, 4).hex() == "42424242"
"""


def opening(*disks: list[str], scratch: int | None = None) -> questions.Question[Devices]:
    return questions.opening(disks, [], [], ring=None, scratch=scratch)


@pytest.fixture
def image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # which is not root's alone, unlike tmp_path
        Path(folder).chmod(0o755)
        yield new_image(Path(folder, "disk.qcow2"))


def new_image(path: Path) -> Path:
    subprocess.run(
        ["qemu-img", "create", "-f", "qcow2", path, "64M"], check=True, capture_output=True
    )
    subprocess.run(["qemu-io", "-c", "write -P 0x42 0 64k", path], check=True, capture_output=True)
    return path


def inside(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    kind: Kind = Kind.NAMESPACES,
    newest: int | None = None,
    **given: object,
) -> bytes:
    monkeypatch.setattr(sandbox, "_START", program)
    with_landlock = sandbox._with_landlock

    def with_python(*given: Sequence[str]) -> tuple[list[str], list[str], dict[str, int]]:
        """Python may be started too, in the place of qemu-nbd."""
        words, folders, paths = with_landlock(*given)
        return words, folders, {**paths, sandbox._python(): landlock.READ | landlock.RUN}

    monkeypatch.setattr(sandbox, "_with_landlock", with_python)
    chain = open_chain(image)
    images = sandbox.Images([chain])
    given["seen"] = images.names(kind)[chain.active.path]
    with sandbox.start_worker(images, kind=kind, newest=newest) as process:
        assert process.stdin and process.stdout and process.stderr
        argv = sandbox.server(chain, images, kind=kind)
        for line in (argv, given):
            process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.read()
        assert answer, process.stderr.read().decode()
    images.close()
    return answer


@pytest.mark.parametrize("owner", [None, 4321])
@pytest.mark.parametrize(
    ("started", "filtered"),
    [(False, True), (True, True), (False, False)],
    ids=["worker", "qemu-nbd", "first filter alone"],
)
@pytest.mark.parametrize(("kind", "newest"), KINDS)
def test_nothing_gets_out(image, tmp_path, monkeypatch, kind, newest, started, filtered, owner):
    if owner is not None:
        if not ROOT:
            pytest.skip("only root can own files of somebody else")
        os.chown(image, owner, owner)
        image.chmod(0o600)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    local = tmp_path / "socket"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, abstract() as name:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(str(local))
        unix.listen()
        targets = {
            "secret": str(secret),
            "image": str(image),
            "pid": os.getpid(),
            "port": tcp.getsockname()[1],
            "local socket": str(local),
            "abstract socket": name,
        }
        code = f"targets |= {targets!r}\n{ATTACK}\nos.write(1, json.dumps(said).encode())\n"
        before = (image.read_bytes(), image.stat(), secret.stat())
        answer = inside(
            image, monkeypatch, IN_WORKER, kind, newest,
            code=code, started=started, filtered=filtered,
        )  # fmt: skip
        said = json.loads(answer)
    after = (image.read_bytes(), image.stat(), secret.stat())
    assert unchanged(before) == unchanged(after)
    assert not list(image.parent.glob("[xyz]")) and not list(tmp_path.glob("[xyz]"))
    thread = said.pop("thread")
    if started:
        assert thread.startswith("done")  # QEMU cannot do without
    if not filtered:
        # Without the other filters it can start processes, and what is in the sandbox: Python,
        # which gains nothing.
        assert said.pop("program").startswith(("done", "CalledProcessError", "PermissionError"))
        assert said.pop("process by fork").startswith("done")
        del said["life after the parent"]
        if kind is Kind.LANDLOCK:
            # The connection between the worker and QEMU has not been made yet. Nor has anything of
            # an image been looked at: what runs until then is imgtool's own.
            del said["local socket"], said["abstract socket"]
    done = {name: result for name, result in said.items() if result.startswith("done")}
    assert done == {}
    assert len(said) >= 120


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def right_to_read(kind: Kind) -> int:
    """Of root's rights, the one to read files; root in a container may have another such one."""
    if not ROOT:
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    held = int(dict(line.split(":\t", 1) for line in lines)["CapEff"], 16)
    read_search, override = 1 << 2, 1 << 1
    return read_search if kind is Kind.NAMESPACES or held & read_search else held & override


def lives(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def scratch_of(kind: Kind) -> contextlib.AbstractContextManager[Scratch | None]:
    return scratch_memory() if kind is Kind.LANDLOCK else contextlib.nullcontext()


@pytest.mark.parametrize(("kind", "newest"), KINDS)
def test_who_reads_is_nobody_else_and_has_one_right_at_most(image, kind, newest):
    chain = open_chain(image)
    images = sandbox.Images([chain])
    image.chmod(0o600)
    with (
        scratch_of(kind) as scratch,
        sandbox.start_worker(
            images, kind=kind, newest=newest, shared=[scratch.descriptor] if scratch else []
        ) as process,
    ):
        client = Client(process, image=str(image), scratch=scratch)
        argv = sandbox.server(chain, images, kind=kind)
        client.call(opening(argv, scratch=client.scratch))
        outer = 0 if kind is Kind.LANDLOCK else 1  # bwrap, which waits for the others
        inner = descendants(process.pid)[outer:]
        assert len(inner) == 2
        for pid in inner:
            lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
            status = {words[0]: words[1:] for words in lines if words}
            assert status["NoNewPrivs:"] == ["1"] and status["Seccomp:"] == ["2"]
            who = images.user if ROOT else os.getuid()
            assert status["Uid:"] == [str(who)] * 4
            if ROOT:
                assert status["Gid:"] == [str(who)] * 4 and status["Groups:"] == []
            rights = [f"{right_to_read(kind):016x}"]
            assert [status[f"Cap{name}:"] for name in ("Prm", "Eff", "Inh")] == [rights] * 3
    images.close()
    limit = time.monotonic() + 10
    while any(lives(pid) for pid in inner):  # the kernel is at it
        assert time.monotonic() < limit
        time.sleep(0.01)


@contextlib.contextmanager
def abstract() -> Iterator[str]:
    """A socket whose name is in no filesystem."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"")
        listener.listen()
        yield listener.getsockname().decode()


def unchanged(what: tuple[bytes, os.stat_result, os.stat_result]) -> list[object]:
    """The bytes, and of both files mode, inode, links, owner, size, mtime and ctime."""
    content, *stats = what
    return [content, *((s[:7], s.st_mtime_ns, s.st_ctime_ns) for s in stats)]


# Programs that are started as qemu-nbd is, all of which try to start another, and a process; the
# first of them as soon as it can. Then whoever started them does.
STARTED = """
import sys; sys.path[:0] = {paths!r}
import json, os
from imgtool.engines.direct.wire import seccomp
from imgtool.engines.direct.worker import launcher
sys.stdin.buffer.readline(), sys.stdin.buffer.readline()
PYTHON = "/usr/bin/python3"
TRY = '''
import os
for action in (os.fork, lambda: os.execv("/usr/bin/python3", ["python3", "-c", "print(1)"])):
    try:
        action()
        os.write(1, b"started" + bytes((10,)))
    except OSError as error:
        os.write(1, error.strerror.encode() + bytes((10,)))
'''
launcher.keep_to_itself()
pids = [launcher.start([PYTHON, "-I", "-S", "-c", TRY], {{1: 1}}) for _ in range(3)]
seccomp.confine(seccomp.lone_filter())
for pid in pids:
    os.waitpid(pid, 0)
exec(TRY)
"""


def test_what_is_started_like_qemu_nbd_starts_nothing_itself(image, monkeypatch):
    said = inside(image, monkeypatch, STARTED).splitlines()
    assert said == [b"Operation not permitted"] * 8


# What such a program gets, and what it sees of the process that starts the others.
GIVEN = """
import sys; sys.path[:0] = {paths!r}
import json, os
from imgtool.engines.direct.worker import launcher
from imgtool.engines.direct.worker import __main__ as start
argv = json.loads(sys.stdin.buffer.readline())
TRY = '''
import json, os, stat
said = dict(os.environ)
said["IMAGE"] = %s
def kind(number):
    try:
        about = os.fstat(number)
    except OSError:
        return None
    return about.st_rdev or stat.filemode(about.st_mode)[0]
said["open"] = [kind(number) for number in range(256)]
for pid in ("1", str(os.getppid())):
    for name in ("fd/0", "fd/1", "mem", "exe", "syscall"):
        try:
            os.read(os.open("/proc/" + pid + "/" + name, os.O_RDONLY | os.O_NONBLOCK), 1)
            said["seen"] = name
        except OSError:
            pass
os.write(3, json.dumps(said).encode())
'''
seen = json.loads(sys.stdin.buffer.readline())["seen"]
TRY = TRY % repr(seen.rpartition("/")[2])
begin = launcher.start
def begun(argv, descriptors, **options):
    assert sorted(descriptors) == [0, 1, 3]
    words = ["/usr/bin/python3", "-I", "-S", "-c", TRY]
    return begin(words, {{**descriptors, 3: 1}}, **options)
launcher.start = begun
start.Disk = int
start.disks([argv])
os.wait()
"""


@pytest.mark.parametrize(("kind", "newest"), KINDS[:2])
def test_qemu_nbd_has_its_socket_and_no_sight_of_the_worker(image, monkeypatch, kind, newest):
    said = json.loads(inside(image, monkeypatch, GIVEN, kind, newest))
    opened = [(number, what) for number, what in enumerate(said["open"]) if what is not None]
    null = os.stat(os.devnull).st_rdev
    expected: list[tuple[int, object]] = [(0, null), (1, null), (2, "p"), (3, "p")]
    if kind is Kind.LANDLOCK:  # where the image has no other name
        expected.append((int(said["IMAGE"]), "-"))
    assert opened == expected
    assert said["LISTEN_FDS"] == "1"
    assert "seen" not in said


# Threads, in the place of qemu-nbd; then processes.
BOMB = """
import threading, time, os
count = processes = 0
try:
    while count < 2000:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        count += 1
except RuntimeError:
    pass
try:
    while processes < 100 and os.fork():
        processes += 1
except OSError:
    pass
os.write(1, b"%d %d" % (count, processes))
os._exit(0)
"""


@pytest.mark.parametrize("owner", [None, 4321])
@pytest.mark.parametrize(("kind", "newest"), KINDS[:2])
def test_threads_are_limited_and_processes_are_none(image, monkeypatch, kind, newest, owner):
    if owner is not None:
        if not ROOT:
            pytest.skip("only root can own files of somebody else")
        os.chown(image, owner, owner)
        image.chmod(0o600)
    answer = inside(
        image, monkeypatch, IN_WORKER, kind, newest, code=BOMB, started=True, filtered=True
    )
    threads, processes = (int(word) for word in answer.split())
    # An ordinary user without namespaces does other things besides.
    most = 200 if ROOT or kind is Kind.NAMESPACES else 1400
    assert 64 < threads < most
    assert processes == 0


def in_child(action: Callable[[int], object]) -> str:
    """What an action of an ordinary user says, in a process of its own; it gets a descriptor that
    has to stay open.
    """
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if ROOT:
                os.setgroups([])
                os.setresgid(61500, 61500, 61500)
                os.setresuid(61500, 61500, 61500)
            os.write(tell, repr(action(tell)).encode())
        except Exception as error:  # noqa: BLE001 - it has no other place to be told
            os.write(tell, repr(error).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told, "rb") as said:
        answer = said.read().decode()
    os.waitpid(pid, 0)
    return answer


def test_a_host_that_limits_processes_itself_is_no_error():
    def limited(tell: int, *, room: int) -> tuple[bool, bool]:
        hard = limits._threads_now() + room
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
        limits.limit(1)
        return resource.getrlimit(resource.RLIMIT_NPROC) == (hard, hard), limits._may_have(hard)

    for room in (9, 50):
        assert in_child(partial(limited, room=room)) == "(True, True)"


def test_a_host_that_lets_no_more_processes_in_has_no_sandbox():
    def limited(tell: int) -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        limits.require()

    assert "as many threads and processes as the host lets" in in_child(limited)


@pytest.mark.parametrize("with_landlock", [True, False])
def test_shared_user_has_room_for_what_starts_elsewhere(with_landlock):
    """However little the user does as the limit is set."""

    def limited(tell: int) -> bool:
        paths: dict[str, int] | None = {} if with_landlock else None
        confinement.enter(kept=[tell], user=None, paths=paths)
        limits.limit(1)
        return resource.getrlimit(resource.RLIMIT_NPROC)[0] > 1024

    if not with_landlock and not ROOT:
        pytest.skip("how much else this user does is not known")
    assert in_child(limited) == repr(with_landlock)


# Memory, through the only descriptor that can be written to without limit.
FILL = """
import sys
sys.stdout.buffer.write(b"!" + bytes(4)); sys.stdout.flush()
import os
size = int.from_bytes(sys.stdin.buffer.read(4), "big")
import json
number = json.loads(sys.stdin.buffer.read(size))["scratch"]
piece = bytes(1 << 20)
for place in range(1 << 14):
    os.pwrite(number, piece, place << 21)
"""


@pytest.fixture
def filler(image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Scratch]]:
    """A worker that has no folder, and fills the memory that it was given when it is asked."""
    monkeypatch.setattr(sandbox, "_START", FILL)
    images = sandbox.Images([open_chain(image)])
    with (
        scratch_memory() as scratch,
        sandbox.start_worker(images, kind=Kind.LANDLOCK, shared=[scratch.descriptor]) as process,
        scratch.limit(process),
    ):
        yield process, scratch
        process.wait(10)
        assert os.fstat(scratch.descriptor).st_blocks * 512 < 2 << 30
    images.close()


def test_a_worker_that_fills_memory_has_failed(filler):
    process, scratch = filler
    client = Client(process, image="image", scratch=scratch)
    with pytest.raises(WorkerFailed, match="too much memory"):
        client.call(opening(scratch=client.scratch))


def test_a_worker_fills_no_memory_while_nobody_waits_for_it(filler):
    """Its answers may be read late: by who pages through them."""
    process, scratch = filler
    request = b'{"scratch": %d}' % scratch.descriptor
    process.stdin.write(len(request).to_bytes(4, "big") + request)
    process.stdin.flush()
    assert process.wait(30) == -signal.SIGKILL


@pytest.mark.skipif(not ROOT, reason="only root can own files of somebody else")
@pytest.mark.parametrize(("kind", "newest"), KINDS[:2])
def test_root_reads_files_of_several_users_that_only_they_may(tmp_path, kind, newest):
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    new_image(base)
    subprocess.run(
        ["qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay],
        check=True,
        capture_output=True,
    )
    for number, path in enumerate((base, overlay)):
        os.chown(path, 4321 + number, 4321)
        path.chmod(0o600)
    chain = open_chain(overlay)
    images = sandbox.Images([chain])
    with (
        scratch_of(kind) as scratch,
        sandbox.start_worker(
            images, kind=kind, shared=[scratch.descriptor] if scratch else []
        ) as process,
    ):
        client = Client(process, image=str(overlay), scratch=scratch)
        argv = sandbox.server(chain, images, kind=kind)
        devices = client.call(opening(argv, scratch=client.scratch))
        assert devices.disk_sizes == [64 << 20]
    images.close()


def conversation(
    image: Path, monkeypatch: pytest.MonkeyPatch, program: str, *, silence: float = 4.0
) -> WorkerFailed:
    closed = "import sys; sys.stdout.buffer.write(b'!' + bytes(4)); sys.stdout.flush(); "
    asked = "sys.stdin.buffer.read(1); "  # else it may be gone before
    monkeypatch.setattr(sandbox, "_START", closed + asked + program)
    images = sandbox.Images([open_chain(image)])
    with sandbox.start_worker(images) as process:
        client = Client(process, image=str(image), silence=silence)
        with pytest.raises(WorkerFailed) as failed:
            client.call(opening())
        with pytest.raises(WorkerFailed, match="not ready"):
            client.call(opening())
    images.close()
    return failed.value


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "does not answer"),
        ("import os; os._exit(7)", "went away"),
        ("raise SystemExit('out of cheese')", "out of cheese"),
        ("print('hello' * 100)", "unknown kind"),
        ("import sys; sys.stdout.buffer.write(b'J\\xff\\xff\\xff\\xff')", "too many bytes"),
        ("import sys; sys.stdout.buffer.write(b'J\\0\\0\\0\\1{{'); print(flush=True)", "no sense"),
        ("import sys; sys.stdout.buffer.write(b'E\\0\\0\\0\\2[]'); print(flush=True)", "no sense"),
        ("bytes(8 << 30)", "MemoryError"),
    ],
)
def test_a_worker_that_fails_is_an_error_in_time(image, monkeypatch, program, reason):
    started = time.monotonic()
    silence = 0.5 if reason == "does not answer" else 4.0
    error = conversation(image, monkeypatch, program + " # {paths!r}", silence=silence)
    assert reason in error.message
    assert "--engine libguestfs" in (error.hint or "")
    assert time.monotonic() - started < 20


def test_the_worker_dies_with_its_conversation(image):
    images = sandbox.Images([open_chain(image)])
    with sandbox.start_worker(images) as process:
        client = Client(process, image=str(image))
        chain = open_chain(image)
        argv = sandbox.server(chain, images, snapshot=None, force_share=False)
        assert str(image) not in " ".join(argv)
        assert client.call(opening(argv)).groups == ()
        pid = process.pid
    images.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("after", [0.5, 1.0])
def test_ctrl_c_ends_a_direct_command_at_once_with_one_line(tmp_path, after):
    image = tmp_path / "disk.img"
    (tmp_path / "root").mkdir()
    with (tmp_path / "root/sparse").open("wb") as file:
        file.truncate(1 << 40)
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", tmp_path / "root", image], check=True
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "imgtool", "ls", "-R", "--checksum", "sha256", image, "/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == b"imgtool: error: interrupted\n"


# What bwrap says where it may not make namespaces.
REFUSES = """#!/bin/sh
echo 'bwrap: No permissions to create a new namespace' >&2
exit 1
"""


def listed(image: Path, *options: str, path: Path | None = None) -> tuple[int, bytes, str]:
    """What `imgtool ls` says of an image, with a folder before all others on the PATH."""
    environment = {**os.environ}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "imgtool", "ls", "-R", "-l", *options, image, "/"],
        capture_output=True,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.fixture
def without_namespaces(tmp_path: Path) -> Path:
    """A folder with a bwrap that may not do anything."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "bwrap").write_text(REFUSES)
    (folder / "bwrap").chmod(0o755)
    return folder


def test_without_namespaces_landlock_reads_the_same(tmp_path, without_namespaces):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/large").write_bytes(os.urandom(3 << 20))
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "root", image], check=True)
    options = ("--engine", "direct", "--checksum", "sha256", "--format", "raw", "-v")
    before = (image.read_bytes(), image.stat().st_mtime_ns)
    status, out, said = listed(image, *options)
    assert (status, "(namespaces)" in said) == (0, True)
    again, same, said = listed(image, *options, path=without_namespaces)
    assert (again, same) == (status, out)
    assert "none by namespaces: bwrap: No permissions to create a new namespace" in said
    assert "(Landlock)" in said
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def test_without_either_nothing_is_read(image, monkeypatch, without_namespaces):
    monkeypatch.setenv("PATH", f"{without_namespaces}:{os.environ['PATH']}")
    monkeypatch.setattr(session, "_unavailable", {})
    monkeypatch.setattr(landlock, "version", lambda: 0)
    with (
        pytest.raises(HostError, match=r"namespaces: .*; Landlock: this kernel has no Landlock"),
        open_guest(image, engine="direct"),
    ):
        pass


def test_root_without_proc_has_no_sandbox_and_is_told_why(image, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(identity, "Path", lambda *parts: tmp_path / "none")
    with pytest.raises(HostError, match="/proc is not mounted"), open_guest(image, engine="direct"):
        pass


def test_who_has_no_proc_has_no_sandbox_of_any_kind(image, monkeypatch):
    class Elsewhere(type(Path())):  # type: ignore[misc]
        def is_dir(self) -> bool:
            return False if str(self).startswith("/proc") else super().is_dir()

    monkeypatch.setattr(sandbox, "Path", Elsewhere)
    monkeypatch.setattr(session, "_unavailable", {})
    both = r"namespaces: /proc is not mounted here; Landlock: /proc is not mounted here"
    with pytest.raises(HostError, match=both), open_guest(image, engine="direct"):
        pass


@pytest.mark.usefixtures("worker_may_fail")
def test_worker_that_ends_once_confined_is_not_tried_again(image, monkeypatch):
    """What an image does to its worker must not choose the sandbox."""
    closed = "import sys; sys.stdout.buffer.write(b'!' + bytes(4)); sys.stdout.flush(); "
    dies = "print('bwrap: No permissions', file=sys.stderr, flush=True); sys.exit(1) # {paths!r}"
    monkeypatch.setattr(sandbox, "_START", closed + dies)
    monkeypatch.setattr(session, "_unavailable", {})
    with (
        pytest.raises(ImageError, match="worker failed"),
        open_guest(image, engine="direct"),
    ):
        pass
    assert session._unavailable == {}


# Somebody else on the host, who is first at the socket that QEMU will listen at.
FIRST = """
import sys; sys.path[:0] = {paths!r}
import json
from imgtool.engines.direct.worker import launcher
import _socket, socket
argv = json.loads(sys.stdin.buffer.readline())
class Watched(_socket.socket):
    def listen(self, room):
        super().listen(room)
        other = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        other.connect(self.getsockname())
        Watched.other = other
_socket.socket = Watched
try:
    launcher.start_qemu_nbd(argv)
    said = "served"
except BlockingIOError:
    said = "refused"
sys.stdout.write(said)
"""


def test_nobody_else_is_served_without_a_network_namespace(image, monkeypatch):
    assert inside(image, monkeypatch, FIRST, Kind.LANDLOCK) == b"refused"


AT_ONCE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from imgtool.engines.direct.parent.identity import user_namespace
from imgtool.host.process import run
def both(number):
    with user_namespace():
        run(["true"])
with ThreadPoolExecutor(16) as pool:
    list(pool.map(both, range(160)))
"""


@pytest.mark.skipif(not ROOT, reason="only root's sandbox is in a namespace that imgtool makes")
def test_many_threads_open_guests_at_once():
    """None waits for a pipe that a process of another thread holds."""
    command = [sys.executable, "-c", AT_ONCE]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
