"""The sandbox of the direct engine, tried from the inside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imgtool.engines.direct import sandbox
from imgtool.engines.direct.client import Client, WorkerFailed
from imgtool.engines.direct.filesystem import NeedsAppliance
from imgtool.image.chain import open_chain

# What a reader does that was taken over by its image: everything after the filter is in place.
ATTACK = """
import sys; sys.path[:0] = {paths!r}
import contextlib, ctypes, json, os, socket, subprocess
from imgtool.engines.direct import seccomp
from imgtool.engines.direct.sources import Disk
argv = json.loads(sys.stdin.buffer.readline())
targets = json.loads(sys.stdin.buffer.readline())
with seccomp.last_programs(1) if targets["last"] else contextlib.nullcontext():
    disk = Disk(argv)
disk.wait()
if targets["confined"]:
    seccomp.confine(seccomp.worker_filter())
libc = ctypes.CDLL(None, use_errno=True)
said = {{}}
def attempt(name, action):
    try:
        said[name] = "done: %r" % (action(),)
    except BaseException as error:
        said[name] = type(error).__name__
def call(*words):
    if libc.syscall(*words) < 0:
        raise OSError(ctypes.get_errno())
attempt("host file", lambda: open(targets["secret"]).read())
attempt("password file", lambda: open("/etc/passwd").read())
attempt("process of the host", lambda: open("/proc/%d/environ" % targets["pid"]).read())
attempt("signal to the host", lambda: os.kill(targets["pid"], 0))
attempt("network", lambda: socket.create_connection(("127.0.0.1", targets["port"]), 2).recv(1))
attempt("local socket", lambda: socket.socket(socket.AF_UNIX).connect(targets["socket"]))
attempt("program", lambda: subprocess.run(["/usr/bin/python3", "-c", "pass"], check=True))
attempt("the image for writing", lambda: open("/images/0", "r+b"))
for place in ("/", "/images", "/usr/lib", "/python/own/imgtool", "/dev", "/dev/shm", "/proc"):
    attempt("write in " + place, lambda: open(place + "/x", "w"))
attempt("more than the scratch", lambda: open("/tmp/x", "wb").write(bytes(1 << 30)))
for name in ("kernel/core_pattern", "vm/swappiness", "kernel/modprobe"):
    attempt("sysctl " + name, lambda: open("/proc/sys/" + name, "r+b"))
attempt("namespace by clone", lambda: call(56, 0x10000000 | 17, 0, 0, 0, 0))
attempt("mount", lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0))
attempt("namespace", lambda: call(272, 0x10000000))
attempt("trace", lambda: call(101, 16, 1, 0, 0))
attempt("setuid", lambda: os.setuid(0))
said["image"] = disk.read(0, 4).hex()
said["network devices"] = sorted(os.listdir("/sys/class/net")) if os.path.exists("/sys") else []
said["processes"] = len([name for name in os.listdir("/proc") if name.isdigit()])
sys.stdout.write(json.dumps(said))
sys.stdout.flush()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
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


@pytest.mark.parametrize(
    ("confined", "last"),
    [(True, True), (False, True), (False, False)],
    ids=["filtered", "as qemu-nbd", "namespaces alone"],
)
def test_nothing_gets_out(image, tmp_path, monkeypatch, confined, last):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    local = tmp_path / "socket"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(str(local))
        unix.listen()
        before = (image.read_bytes(), image.stat().st_mtime_ns)
        said = json.loads(
            inside(
                image,
                monkeypatch,
                ATTACK,
                confined=confined,
                last=last,
                secret=str(secret),
                pid=os.getpid(),
                port=tcp.getsockname()[1],
                socket=str(local),
            )
        )
    assert said.pop("image") == "42424242"  # it could read what it is there to read
    assert said.pop("network devices") in ([], ["lo"])
    assert said.pop("processes") <= 4
    if not (confined or last):
        # Without the filters it can start what is in the sandbox: Python, which gains nothing.
        assert said.pop("program").startswith(("done", "CalledProcessError"))
    done = {name: result for name, result in said.items() if result.startswith("done")}
    assert done == {}
    assert len(said) >= 16
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


# Programs that are started as qemu-nbd is, all of which try to start another, and to have a child
# do so; the first of them as soon as it can.
STARTED = """
import sys; sys.path[:0] = {paths!r}
import json, os
from imgtool.engines.direct import seccomp
sys.stdin.buffer.readline(), sys.stdin.buffer.readline()
PYTHON = "/usr/bin/python3"
TRY = '''
import os
for child in (False, True):
    if not (child and os.fork()):
        try:
            os.execv("/usr/bin/python3", ["python3", "-I", "-S", "-c", "print('started')"])
        except OSError as error:
            print(error.strerror, flush=True)
        if child:
            os._exit(0)
os.wait()
'''
def start():
    pid = os.fork()
    if not pid:
        os.execv(PYTHON, ["python3", "-I", "-S", "-c", TRY])
    return pid
with seccomp.last_programs(3):
    pids = [start() for _ in range(3)]
for pid in pids:
    os.waitpid(pid, 0)
try:
    os.execv(PYTHON, ["python3", "-I", "-S", "-c", "print('started')"])
except OSError as error:
    print(error.strerror, flush=True)
"""


def test_what_is_started_like_qemu_nbd_starts_nothing_itself(image, monkeypatch):
    said = inside(image, monkeypatch, STARTED).splitlines()
    assert said == [b"Function not implemented"] * 7


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
