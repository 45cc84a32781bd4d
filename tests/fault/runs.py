"""Whole runs of copy-in, edit and inject on small guests, and what is asked of the images after."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imgtool import open_guest
from imgtool.host.process import command_of, processes_naming
from imgtool.image.intent.intent_log import read_facts
from tests.support.chain_work import checked
from tests.support.inject_root import Root

KINDS = ("raw", "qcow2", "chain")
_START = 1 << 20  # bytes, of the one partition
_SIZE = 48 << 20  # bytes, of its ext4
_LONGEST = 240.0  # seconds, for anything

SPEC = """\
steps:
  - hostname: new.example.org
  - timezone: Europe/Warsaw
  - write: {path: /etc/new.conf, content: "new\\n"}
  - append-line: {path: /etc/hosts, line: "192.0.2.1 other"}
  - copy: {source: tree, path: /srv/tree}
  - delete: /home/alice/letter.txt
  - service: {enable: ssh.service}
"""


def environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def imgtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imgtool", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=_LONGEST,
        check=False,
    )


@dataclass(frozen=True)
class Run:
    """One command: its words for an image in a folder that `prepare` has filled."""

    name: str
    words: Callable[[Path, Path], tuple[str | Path, ...]]


RUNS = {
    run.name: run
    for run in (
        Run("copy-in", lambda image, folder: ("copy-in", image, folder / "tree", "/srv")),
        Run(
            "edit",
            lambda image, folder: ("edit", image, "/srv/large", "-e", "s/line 1/changed 1/"),
        ),
        Run("inject", lambda image, folder: ("inject", image, folder / "spec.yaml")),
    )
}


def prepare(folder: Path) -> Path:
    """The guest's disk, and what is written to it."""
    root = folder / "root"
    root.mkdir(parents=True)
    Root(root)
    (root / "srv").mkdir()
    (root / "srv/large").write_text("".join(f"line {n}\n" for n in range(200_000)))
    (root / "etc/fstab").write_text("/dev/sda1 / ext4 defaults 0 1\n")
    (root / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')
    tree = folder / "tree"
    for number in range(40):
        (tree / f"d{number % 4}").mkdir(parents=True, exist_ok=True)
        noise = hashlib.sha256(b"%d" % number).digest() * (1 << 12)
        (tree / f"d{number % 4}/{number}").write_bytes(noise)
    (folder / "spec.yaml").write_text(SPEC)

    part = folder / "part"
    with part.open("wb") as file:
        file.truncate(_SIZE)
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d", root, part)
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(_START + _SIZE + _START)
    _run("sfdisk", "-q", "--no-reread", disk, input=f"start={_START // 512}, size={_SIZE // 512}\n")
    _run("dd", f"if={part}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    part.unlink()
    shutil.rmtree(root)
    return disk


def _run(*words: str | Path, input: str | None = None) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, input=input)


def make(disk: Path, kind: str, folder: Path) -> Path:
    """The guest's disk as an image of this kind in an empty folder."""
    folder.mkdir()
    image = folder / ("disk.raw" if kind == "raw" else "disk.qcow2")
    if kind == "raw":
        _run("cp", "--sparse=always", disk, image)
    elif kind == "qcow2":
        _run("qemu-img", "convert", "-O", "qcow2", disk, image)
    else:
        base = folder / "base.qcow2"
        _run("qemu-img", "convert", "-O", "qcow2", disk, base)
        options = ("-f", "qcow2", "-F", "qcow2", "-b", base.name)
        _run("qemu-img", "create", "-q", *options, image)
    return image


def manifest(image: Path) -> str:
    """A checksum over every file of the guest: name, mode, owner, size, target and content."""
    whole = hashlib.sha256()
    with open_guest(image, engine="direct") as guest:
        for entry in guest.walk("/", checksum="sha256"):
            size = None if entry.type == "directory" else entry.size
            facts = (entry.path, entry.mode, entry.uid, entry.gid, size)
            whole.update(repr((*facts, entry.target, entry.checksum)).encode())
    return whole.hexdigest()


def sound(image: Path, kind: str, scratch: Path) -> None:
    """Raise unless QEMU calls the image sound, and e2fsck its filesystem."""
    if kind != "raw":
        assert checked(image) == {}
    flat = scratch / f"{image.parent.name}.flat"
    _run("qemu-img", "convert", "-O", "raw", image, flat)
    done = subprocess.run(
        ["e2fsck", "-fn", f"{flat}?offset={_START}"], capture_output=True, text=True, check=False
    )
    flat.unlink()
    assert done.returncode == 0, done.stdout


def start(words: tuple[str | Path, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "imgtool", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def step(process: subprocess.Popen[str], image: Path) -> str:
    """What is being done: `appliance`, `commit`, `ended`; `start` before them, or between."""
    if process.poll() is not None:
        return "ended"
    facts = read_facts(image)
    if facts.get("step") in ("commit", "written"):
        return "commit"
    return "appliance" if _qemus(process.pid) else "start"


def _qemus(parent: int) -> list[int]:
    """The QEMU programs that a process has started."""
    try:
        threads = Path(f"/proc/{parent}/task").iterdir()
        words = " ".join((thread / "children").read_text() for thread in threads)
        children = [int(word) for word in words.split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid for pid in children if any("qemu" in word for word in command_of(pid)[:1])]


def kill_qemu(process: subprocess.Popen[str]) -> bool:
    """Kill what there is of QEMU, as soon as there is one; whether there was."""
    while process.poll() is None:
        for pid in _qemus(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        time.sleep(0.005)
    return False


def processes_of(folder: Path) -> list[int]:
    return processes_naming(f"{folder}/")
