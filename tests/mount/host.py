"""What the tests of host mounts ask the host, without imgtool: mounts, devices, processes, files.

Everything is looked at twice, before and after, and only what belongs to the test's own folder
counts: others may use loop devices, QEMU and imgtool on this machine at the same time.
"""

from __future__ import annotations

import base64
import calendar
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtool import cli
from tests.support.schemas import require_schema

STATE = Path("/run/imgtool")
SIGKILLED = -signal.SIGKILL
LIMIT = 120


@dataclass(frozen=True)
class Done:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `-o jsonl`."""
        return [json.loads(line) for line in self.out.splitlines()]


def _words(words: Sequence[object]) -> list[str]:
    return [str(word) for word in words]


def imgtool(
    *words: object,
    env: Mapping[str, str] | None = None,
    fail_at: str | None = None,
    limit: float = LIMIT,
) -> Done:
    """Run the command line in a process of its own; `fail_at` kills it there."""
    with started(*words, env=env, fail_at=fail_at) as process:
        out, err = process.communicate(timeout=limit)
    require_schema(_words(words), out)
    return Done(process.returncode, os.fsdecode(out), os.fsdecode(err))


@contextlib.contextmanager
def started(
    *words: object, env: Mapping[str, str] | None = None, fail_at: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The same, while it runs; killed with the block."""
    failing = {"IMGTOOL_MOUNT_FAILPOINT": fail_at} if fail_at else {}
    process = subprocess.Popen(
        [sys.executable, "-m", "imgtool", *_words(words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **failing, **(env or {})},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def good(*words: object, env: Mapping[str, str] | None = None) -> Done:
    """Run the command line; it must end with status 0."""
    done = imgtool(*words, env=env)
    assert done.status == 0, f"{words}: status {done.status}: {done.err}"
    return done


def here(*words: object) -> Done:
    """The same in this process, which saves the start of another one."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = int(cli._run(_words(words)))
        except SystemExit as ended:
            status = int(ended.code or 0)
    assert status == 0, f"{words}: status {status}: {err.getvalue()}"
    return Done(status, os.fsdecode(out.buffer.getvalue()), err.getvalue())


def run(
    *words: object,
    input: bytes | None = None,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """A program that must succeed; what it wrote."""
    done = subprocess.run(
        _words(words),
        input=input,
        capture_output=True,
        check=False,
        timeout=LIMIT,
        env={**os.environ, **(env or {})},
        cwd=folder,
    )
    assert done.returncode == 0, f"{words}: {os.fsdecode(done.stderr)}"
    return os.fsdecode(done.stdout)


def wait_for(done: Callable[[], object], what: str, limit: float = 60) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline, f"not in {limit} s: {what}"
        time.sleep(0.01)


# What the host holds


@dataclass(frozen=True, order=True)
class Loop:
    """An attached loop device."""

    name: str
    file: str
    offset: int
    size: int
    read_only: bool


def _number(path: Path) -> int:
    return int(path.read_text())


def loops() -> set[Loop]:
    """All attached loop devices, as sysfs shows them."""
    found = set()
    for folder in Path("/sys/block").glob("loop*/loop"):
        with contextlib.suppress(OSError):  # detached since it was listed
            found.add(
                Loop(
                    folder.parent.name,
                    os.fsdecode((folder / "backing_file").read_bytes()).rstrip("\n"),
                    _number(folder / "offset"),
                    _number(folder / "sizelimit"),
                    bool(_number(folder.parent / "ro")),
                )
            )
    return found


@dataclass(frozen=True)
class Mounted:
    """A line of /proc/mounts."""

    source: str
    target: str
    type: str
    options: frozenset[str]


def mounts() -> list[Mounted]:
    """What is mounted, oldest first."""
    found = []
    for line in Path("/proc/mounts").read_bytes().split(b"\n")[:-1]:
        words = [
            os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), word))
            for word in line.split(b" ")
        ]
        found.append(Mounted(words[0], words[1], words[2], frozenset(words[3].split(","))))
    return found


def mount_at(target: Path) -> Mounted:
    """The one mount at a directory."""
    (found,) = [row for row in mounts() if row.target == str(target)]
    return found


def processes() -> dict[int, str]:
    """The command lines of all processes but this one."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = os.fsdecode((entry / "cmdline").read_bytes())
    return found


def strangers(ours: Path, state: Path = STATE) -> set[str]:
    """The names of state folders that are other people's."""
    found = set()
    for folder in state.iterdir() if state.is_dir() else ():
        with contextlib.suppress(OSError):
            if str(ours) not in (folder / "journal.json").read_text():
                found.add(folder.name)
    return found


@dataclass(frozen=True, order=True)
class Held:
    """Something that the host holds: a loop, mount, process or folder, by its name."""

    kind: str
    name: str
    details: str = ""


def held(ours: Path, state: Path = STATE) -> set[Held]:
    """All that imgtool, or a test, holds of the host and that has to do with the folder `ours`."""
    others = [str(state / name) for name in strangers(ours, state)]

    def counts(text: str) -> bool:
        if any(other in text for other in others):
            return False
        return f"{ours}/" in text or f"{state}/" in text

    found = {Held("loop", row.name, str(row)) for row in loops() if counts(row.file)}
    for row in mounts():
        if counts(row.target) or counts(row.source):
            found.add(Held("mount", row.target, str(row)))
    for pid, command in processes().items():
        if ("qemu" in command or "imgtool" in command) and counts(command):
            found.add(Held("process", str(pid), command.replace("\0", " ")))
    for folder in state.iterdir() if state.is_dir() else ():
        if counts(f"{folder}/"):
            found.add(Held("folder", str(folder)))
    return found


def let_go(things: set[Held]) -> None:
    """Take away what a test that failed left, so that it does not spoil the others."""
    commands = {
        "mount": ("umount", "--lazy"),
        "loop": ("losetup", "--detach"),
        "process": ("kill", "-KILL"),
        "folder": ("rm", "-rf"),
    }
    for kind, command in commands.items():
        for thing in things:
            if thing.kind == kind:
                name = f"/dev/{thing.name}" if kind == "loop" else thing.name
                subprocess.run([*command, name], capture_output=True, check=False)


# What files are


def digest(path: Path) -> str:
    """SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(paths: Sequence[Path]) -> list[tuple[str, int]]:
    """The bytes and the time of change of files, to be compared."""
    return [(digest(path), path.stat().st_mtime_ns) for path in paths]


@dataclass(frozen=True)
class Node:
    """A name in a tree, as far as every way to read it must agree."""

    type: str
    mode: int
    uid: int
    gid: int
    size: int | None
    mtime_ns: int
    target: bytes | None
    checksum: str | None


_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


def _node(path: bytes) -> Node:
    status = os.lstat(path)
    kind = _TYPES[stat.S_IFMT(status.st_mode)]
    checksum = None
    if kind == "file":
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return Node(
        kind,
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_size if kind == "file" else None,
        status.st_mtime_ns,
        os.readlink(path) if kind == "symlink" else None,
        checksum,
    )


def tree(root: Path) -> dict[bytes, Node]:
    """Everything below a directory, by its path in it."""
    top = os.fsencode(root)
    found = {}
    for folder, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            found[path.removeprefix(top)] = _node(path)
    return found


def _nanoseconds(text: str) -> int:
    whole, _, rest = text.removesuffix("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) * 10**9 + int(rest)


def _bytes(row: dict[str, str], key: str) -> bytes:
    if f"{key}_bytes" in row:
        return base64.b64decode(row[f"{key}_bytes"])
    return row[key].encode()


def as_the_engine_reads_it(image: Path, *words: object) -> dict[bytes, Node]:
    """The tree as `ls` lists it, without a mount."""
    options = ("-R", "--checksum", "sha256", "-o", "jsonl", "--engine", "direct")
    rows = here("ls", image, *options, *words, "/").rows
    return {
        _bytes(row, "path"): Node(
            row["type"],
            int(row["mode"], 8),
            row["uid"],
            row["gid"],
            row["size"] if row["type"] == "file" else None,
            _nanoseconds(row["mtime"]),
            _bytes(row, "target") if row["target"] is not None else None,
            row["checksum"],
        )
        for row in rows
    }


def without_times(nodes: dict[bytes, Node]) -> dict[bytes, tuple[object, ...]]:
    """The trees as far as two that were made one after the other agree."""
    return {
        path: (node.type, node.mode, node.uid, node.gid, node.size, node.target, node.checksum)
        for path, node in nodes.items()
    }
