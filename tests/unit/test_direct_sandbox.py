"""The sandbox of the direct engine, tried from the inside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool.engines.direct import sandbox
from imgtool.engines.direct.client import Client, WorkerFailed
from imgtool.engines.direct.filesystem import NeedsAppliance
from imgtool.image.chain import open_chain

# What a program does that was taken over by its image.
ATTACK = """
import ctypes, json, os, socket, stat, subprocess, sys, threading
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
def can_be_written(program):
    descriptor = os.open(program, os.O_RDONLY)
    if os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
        raise PermissionError
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
attempt("host file", lambda: open(targets["secret"]).read())
attempt("password file", lambda: open("/etc/passwd").read())
attempt("process of the host", lambda: open("/proc/%d/environ" % targets["pid"]).read())
attempt("signal to the host", lambda: os.kill(targets["pid"], 0))
attempt("network", lambda: socket.create_connection(("127.0.0.1", targets["port"]), 2).recv(1))
attempt("local socket", lambda: socket.socket(socket.AF_UNIX).connect(targets["socket"]))
attempt("program", lambda: subprocess.run(["/usr/bin/python3", "-c", "pass"], check=True))
attempt("the image for writing", lambda: open("/images/0", "r+b"))
for pid in sorted(name for name in os.listdir("/proc") if name.isdigit()):
    who = "own" if int(pid) == os.getpid() else "first" if pid == "1" else "other"
    for number in range(64):
        at = "/proc/%s/fd/%d" % (pid, number)
        try:
            plain = stat.S_ISREG(os.stat(at).st_mode)
        except OSError:
            continue
        if plain:
            attempt("descriptor %d of the %s process" % (number, who), lambda: overwrite(at))
    attempt("the program of the %s process" % who, lambda: can_be_written("/proc/%s/exe" % pid))
places = ("", "/images", "/usr/lib", "/python/own/imgtool", "/dev", "/dev/shm", "/proc", "/work")
for place in places:
    attempt("write in " + place, lambda: open(place + "/x", "w"))
attempt("more than the scratch", lambda: open("/tmp/x", "wb").write(bytes(1 << 30)))
if os.path.exists("/tmp/x"):
    os.unlink("/tmp/x")
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
attempt("trace", lambda: call(101, 16, 1, 0, 0))
attempt("setuid", lambda: os.setuid(0) if os.getuid() else os.setuid(1))
attempt("memory without a name", lambda: os.memfd_create("x"))
attempt("shared memory", lambda: call(29, 0, 1 << 20, 0o1600))
attempt("message queue", lambda: call(68, 0, 0o1600))
attempt("process by fork", forked)
attempt("process by clone3", lambda: call(435, 0, 0))
attempt("thread", thread)
attempt("open files", many)
said["processes"] = len([name for name in os.listdir("/proc") if name.isdigit()])
said["capabilities"] = [
    line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapPrm", "CapEff"))
] if os.path.exists("/proc/self/status") else []
"""

# It in the place of the worker, or of what the worker starts.
IN_WORKER = """
import sys; sys.path[:0] = {paths!r}
import json, os
from imgtool.engines.direct import program, seccomp, start
from imgtool.engines.direct.worker import Worker
argv = json.loads(sys.stdin.buffer.readline())
targets = json.loads(sys.stdin.buffer.readline())
import ctypes, socket, subprocess, stat, threading
if not targets["filtered"]:
    seccomp.confine = lambda program: None
if targets["started"]:
    started = program.served
    program.served = lambda argv: (
        started(argv),
        program.start(["/usr/bin/python3", "-I", "-S", "-B", "-c", targets["code"]], {{1: 1}}),
    )[0]
(disk,) = start.disks([argv])
disk.wait()
if targets["started"]:
    os.wait()
else:
    seccomp.confine(seccomp.worker_filter())
    exec(targets["code"])
    assert disk.read(0, 4).hex() == "42424242"
"""


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


def inside(image: Path, monkeypatch: pytest.MonkeyPatch, program: str, **given: object) -> bytes:
    monkeypatch.setattr(sandbox, "_START", program)
    chain = open_chain(image)
    images = sandbox.Images([chain])
    with sandbox.sandboxed(images) as process:
        assert process.stdin and process.stdout and process.stderr
        argv = sandbox.server(chain, images, snapshot=None, force_share=False)
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
    ids=["worker", "qemu-nbd", "namespaces alone"],
)
def test_nothing_gets_out(image, tmp_path, monkeypatch, started, filtered, owner):
    if owner is not None:
        if os.geteuid() != 0:
            pytest.skip("only root can own files of somebody else")
        os.chown(image, owner, owner)
        image.chmod(0o600)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    local = tmp_path / "socket"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(str(local))
        unix.listen()
        targets = {
            "secret": str(secret),
            "pid": os.getpid(),
            "port": tcp.getsockname()[1],
            "socket": str(local),
        }
        code = f"targets = {targets!r}\n{ATTACK}\nos.write(1, json.dumps(said).encode())\n"
        before = (image.read_bytes(), image.stat().st_mtime_ns)
        said = json.loads(
            inside(image, monkeypatch, IN_WORKER, code=code, started=started, filtered=filtered)
        )
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before
    assert said.pop("processes") <= 4
    assert set(said.pop("capabilities")) == {"0" * 16}
    thread = said.pop("thread")
    if started:
        assert thread.startswith("done")  # QEMU cannot do without
    if not filtered:
        # Without the filters it can start what is in the sandbox: Python, which gains nothing.
        assert said.pop("program").startswith(("done", "CalledProcessError"))
        assert said.pop("process by fork").startswith("done")
    done = {name: result for name, result in said.items() if result.startswith("done")}
    assert done == {}
    assert len(said) >= 30


# Programs that are started as qemu-nbd is, all of which try to start another, and a process; the
# first of them as soon as it can. Then whoever started them does.
STARTED = """
import sys; sys.path[:0] = {paths!r}
import json, os
from imgtool.engines.direct import program, seccomp
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
program.keep_to_itself()
pids = [program.start([PYTHON, "-I", "-S", "-c", TRY], {{1: 1}}) for _ in range(3)]
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
from imgtool.engines.direct import program, start
argv = json.loads(sys.stdin.buffer.readline())
TRY = '''
import json, os
said = dict(os.environ)
def kind(number):
    try:
        return os.readlink("/proc/self/fd/%d" % number).split(":")[0]
    except OSError:
        return None
said["open"] = [kind(number) for number in range(64)]
for name in ("fd/0", "fd/1", "mem", "exe", "syscall"):
    try:
        os.read(os.open("/proc/1/" + name, os.O_RDONLY | os.O_NONBLOCK), 1)
        said["seen"] = name
    except OSError:
        pass
os.write(3, json.dumps(said).encode())
'''
sys.stdin.buffer.readline()
begin = program.start
def begun(argv, descriptors, **options):
    assert sorted(descriptors) == [0, 1, 3]
    words = ["/usr/bin/python3", "-I", "-S", "-c", TRY]
    return begin(words, {{**descriptors, 3: 1}}, **options)
program.start = begun
start.Disk = int
start.disks([argv])
os.wait()
"""


def test_qemu_nbd_is_given_its_socket_and_no_sight_of_the_worker(image, monkeypatch):
    said = json.loads(inside(image, monkeypatch, GIVEN))
    opened = [(number, kind) for number, kind in enumerate(said["open"]) if kind is not None]
    assert opened == [(0, "/dev/null"), (1, "/dev/null"), (2, "pipe"), (3, "pipe")]
    assert said["LISTEN_FDS"] == "1"
    assert "seen" not in said


# Threads, in the place of qemu-nbd.
THREADS = """
import threading, time, os
count = 0
try:
    while count < 1000:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        count += 1
except RuntimeError:
    pass
os.write(1, b"%d" % count)
os._exit(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can own files of somebody else")
def test_an_ordinary_user_has_a_limited_number_of_threads(image, monkeypatch):
    os.chown(image, 4321, 4321)
    image.chmod(0o600)
    said = inside(image, monkeypatch, IN_WORKER, code=THREADS, started=True, filtered=True)
    assert 64 < int(said) < 200


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can own files of somebody else")
def test_root_reads_an_image_of_another_user_as_that_user(image):
    os.chown(image, 4321, 4321)
    image.chmod(0o600)
    chain = open_chain(image)
    images = sandbox.Images([chain])
    assert images.owner == (4321, 4321)
    images.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can own files of somebody else")
def test_files_of_several_users_need_the_appliance(tmp_path):
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    for words in ([base, "1M"], ["-F", "qcow2", "-b", base, overlay]):
        subprocess.run(
            ["qemu-img", "create", "-f", "qcow2", *words], check=True, capture_output=True
        )
    for number, path in enumerate((base, overlay)):
        os.chown(path, 4321 + number, 4321)
        path.chmod(0o600)
    with pytest.raises(NeedsAppliance, match="several users"):
        sandbox.Images([open_chain(overlay)])


def conversation(image: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> WorkerFailed:
    monkeypatch.setattr(sandbox, "_START", program)
    images = sandbox.Images([open_chain(image)])
    with sandbox.sandboxed(images) as process:
        client = Client(process, image=str(image), silence=4.0)
        with pytest.raises(WorkerFailed) as failed:
            client.one("open", disks=[])
        with pytest.raises(WorkerFailed, match="not ready"):
            client.one("open", disks=[])
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
    error = conversation(image, monkeypatch, program + " # {paths!r}")
    assert reason in error.message
    assert "--engine libguestfs" in (error.hint or "")
    assert time.monotonic() - started < 20


def test_the_worker_dies_with_its_conversation(image):
    images = sandbox.Images([open_chain(image)])
    with sandbox.sandboxed(images) as process:
        client = Client(process, image=str(image))
        chain = open_chain(image)
        argv = sandbox.server(chain, images, snapshot=None, force_share=False)
        assert str(image) not in " ".join(argv)
        assert client.one("open", disks=[argv])["groups"] == []
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
