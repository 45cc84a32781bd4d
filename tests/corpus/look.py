"""Look at one image with every reading command, and say what is not as it should be."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 10.0, 500 << 20
# A machine that does other work lets a command wait, the longer the more it has to do; what waits
# longer than that waits for something that does not come.
_OTHER_WORK = 4
_GIVEN_UP = 120  # seconds after which a command is ended
_LONGEST_LINE, _MOST_LINES = 1000, 60
_KNOWN_LINE = re.compile(r"imgtool: |  hint: |\s")
_STEERS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
_CHECKERS: Mapping[str, Sequence[str]] = {
    "ext2": ("e2fsck", "-fn"),
    "ext3": ("e2fsck", "-fn"),
    "ext4": ("e2fsck", "-fn"),
    "xfs": ("xfs_repair", "-n", "-f", "-o", "force_geometry"),
    "btrfs": ("btrfs", "check", "--readonly", "--force"),
}
# imgtool's names of what blkid calls otherwise.
_TABLES = {"dos": "msdos", "sgi": "dvh"}
# What has a kind of its own has no type besides.
_KINDS = {"pv": "LVM2_member"}
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

COMMANDS: Mapping[str, Sequence[str]] = {
    "info": ("info", "{image}", "-o", "json"),
    "partitions": ("partitions", "{image}", "-o", "json"),
    "filesystems": ("filesystems", "--all", "{image}", "-o", "json", "--engine", "{engine}"),
    "table": ("filesystems", "--all", "-l", "{image}", "--engine", "{engine}"),
    "df": ("df", "{image}", "-o", "json", "--engine", "{engine}"),
    "ls": (
        *("ls", "-lR", "--checksum", "sha256", "{image}", "/"),
        *("-o", "jsonl", "--engine", "{engine}"),
    ),
    "inspect": ("inspect", "{image}", "-o", "json", "--engine", "{engine}"),
    "copy-out": ("copy-out", "{image}", "/", "{folder}", "--engine", "{engine}"),
    "check": ("check", "{image}"),
    "chain check": ("chain", "check", "{image}"),
    "chain show": ("chain", "show", "{image}"),
}


@dataclass(frozen=True)
class Answer:
    """How one command ended: seconds of processors and bytes are what it took, with its children;
    `waited` is how long it was waited for.
    """

    status: int
    out: bytes
    err: str
    seconds: float
    memory: int
    waited: float = 0.0

    def rows(self) -> list[dict[str, Any]]:
        """The rows of JSON, an array or one object a line; none where there are none."""
        text = self.out.decode()
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            return value if isinstance(value, list) else [value]
        return [json.loads(line) for line in text.splitlines()]


@dataclass
class Looked:
    """All answers about one image, and what is wrong with them, a line each."""

    image: Path
    answers: dict[str, Answer] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)
    compared: bool = False


# A process is said to have taken what the one took that made it: this one is always small.
_MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
took = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    file.write(f"{status} {took.ru_maxrss} {took.ru_utime + took.ru_stime}")
"""


def run(words: Sequence[str]) -> Answer:
    """Run imgtool; it is ended where it takes far too long."""
    command = [sys.executable, "-m", "imgtool", *words]
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.NamedTemporaryFile("r") as told,
    ):
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _MEASURED, told.name, *command],
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            env={**os.environ, "PATH": _PATH},
        ) as process:  # fmt: skip
            try:
                process.wait(_GIVEN_UP)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)
        waited = time.monotonic() - started
        status, memory, seconds = told.read().split() or (-signal.SIGTERM, 0, waited)
        out.seek(0)
        err.seek(0)
        return Answer(
            status=int(status),
            out=out.read(),
            err=err.read().decode(errors="replace"),
            seconds=float(seconds),
            memory=int(memory) << 10,
            waited=waited,
        )


def look(
    image: Path,
    *,
    engine: str = "direct",
    expected: Mapping[str, Any] | None = None,
    commands: Mapping[str, Sequence[str]] = COMMANDS,
) -> Looked:
    """Every command on one image.

    `expected` has for a command what must be: `status`, `says` (a part of what is on standard
    error), `rows` (fields of rows that must be there), `count` (how many rows). One with `words`
    is a command that is run for this image alone.
    """
    looked = Looked(image)
    own = {name: wanted["words"] for name, wanted in (expected or {}).items() if "words" in wanted}
    before = _state(image)
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        for name, words in {**commands, **own}.items():
            values = {"image": str(image), "engine": engine, "folder": folder}
            answer = run([word.format_map(values) for word in words])
            looked.answers[name] = answer
            looked.defects += [f"{name}: {line}" for line in misbehaviour(answer)]
            wanted = (expected or {}).get(name)
            if wanted is not None:
                looked.defects += [f"{name}: {line}" for line in _unexpected(answer, wanted)]
        if _state(image) != before:
            looked.defects.append("the image has changed")
        looked.defects += _known_better(looked, expected or {}, Path(folder))
    return looked


def _state(image: Path) -> tuple[int, ...]:
    status = image.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def misbehaviour(answer: Answer) -> Iterator[str]:
    """What no command may do, whatever the image is."""
    if not 0 <= answer.status <= 6:
        yield f"status {answer.status}"
    if "Traceback" in answer.err or "internal error" in answer.err:
        yield "a traceback: " + answer.err[-300:]
    if answer.seconds > SECONDS:
        yield f"it took {answer.seconds:.1f} s"
    if answer.waited > SECONDS + _OTHER_WORK * answer.seconds:
        yield f"it was waited for {answer.waited:.1f} s, of which it worked {answer.seconds:.1f}"
    if answer.memory > MEMORY:
        yield f"it took {answer.memory >> 20} MiB"
    lines = answer.err.splitlines()
    if any(len(line) > _LONGEST_LINE for line in lines) or len(lines) > _MOST_LINES:
        yield f"it says too much: {len(lines)} lines, the longest {max(map(len, lines))} characters"
    if any(not _KNOWN_LINE.match(line) for line in lines if line):
        yield "a line that is not imgtool's: " + next(
            line for line in lines if line and not _KNOWN_LINE.match(line)
        )
    if _STEERS.search(answer.err.encode()) or _STEERS.search(answer.out):
        yield "it steers the terminal"
    if answer.status and not lines and not answer.out:
        yield f"status {answer.status} without a word"


def _unexpected(answer: Answer, wanted: Mapping[str, Any]) -> Iterator[str]:
    if "status" in wanted and answer.status != wanted["status"]:
        yield f"status {answer.status}, not {wanted['status']}: {answer.err.strip()[:200]}"
    if "says" in wanted and wanted["says"] not in answer.err:
        yield f"it does not say {wanted['says']!r}: {answer.err.strip()[:200]}"
    rows = answer.rows() if wanted.keys() & {"rows", "count"} else []
    if "count" in wanted and len(rows) != wanted["count"]:
        yield f"{len(rows)} rows, not {wanted['count']}"
    if "rows" in wanted:
        for fields in wanted["rows"]:
            if not any(all(row.get(key) == value for key, value in fields.items()) for row in rows):
                yield f"no row with {fields}"


def _known_better(looked: Looked, expected: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Where another program or the kernel knows better than an answer that was given as sure."""
    probed = _probe(looked.image)
    filesystems = looked.answers.get("filesystems")
    if filesystems and filesystems.status == 0 and "filesystems" not in expected:
        rows = filesystems.rows()
        kinds = {row["type"] for row in rows} | {_KINDS.get(row["kind"]) for row in rows}
        if probed.get("TYPE") and probed["TYPE"] not in kinds:
            yield f"filesystems: blkid says {probed['TYPE']}, not {sorted(map(str, kinds))}"
    partitions = looked.answers.get("partitions")
    if partitions and partitions.status == 0 and "partitions" not in expected:
        tables = {row["table"] for row in partitions.rows()} or {"none"}
        table = probed.get("PTTYPE")  # where it names none there may be one that it does not know
        if table and "TYPE" not in probed and _TABLES.get(table, table) not in tables:
            yield f"partitions: blkid says {table}, not {sorted(map(str, tables))}"
    listed = looked.answers.get("ls")
    if listed and listed.status == 0 and _is_sound(looked.image, probed.get("TYPE")):
        theirs = _of_the_kernel(looked.image, folder)
        looked.compared = theirs is not None
        if theirs is not None:
            yield from _differences(listed, theirs)


def _probe(image: Path) -> dict[str, str]:
    # Of whole sectors, as a guest has it: what is cut off within one is not compared.
    size = -(-image.stat().st_size // 512) * 512
    done = subprocess.run(
        ["blkid", "-p", "-o", "export", "--size", str(size), image], capture_output=True, text=True,
        env={**os.environ, "PATH": _PATH},
    )  # fmt: skip
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _is_sound(image: Path, kind: str | None) -> bool:
    checker = _CHECKERS.get(kind or "")
    if checker is None or os.geteuid() != 0 or shutil.which(checker[0], path=_PATH) is None:
        return False
    words = [*checker, str(image)]
    env = {**os.environ, "PATH": _PATH}
    try:
        done = subprocess.run(words, capture_output=True, env=env, timeout=_GIVEN_UP)
    except subprocess.TimeoutExpired:  # e2fsck needs as good as for ever for some
        return False
    return done.returncode == 0


_Content = tuple[int | None, str | None]  # size and checksum, of files


def _of_the_kernel(image: Path, folder: Path) -> dict[bytes, _Content] | None:
    """What the host's kernel shows; None where it does not mount it: it no longer knows XFS of
    version 4, and replays no journal on what it may not write to."""
    place = folder / "mounted"
    place.mkdir()
    options = "loop,ro,nodev,nosuid,noexec"
    done = subprocess.run(["mount", "-o", options, image, place], capture_output=True)
    if done.returncode:
        return None
    try:
        return dict(_walk(os.fsencode(place)))
    finally:
        subprocess.run(["umount", place], check=True)


def _differences(listed: Answer, theirs: Mapping[bytes, _Content]) -> Iterator[str]:
    ours = {
        _path(row): (row["size"] if row["type"] == "file" else None, row.get("checksum"))
        for row in listed.rows()
    }
    ours.pop(b"/", None)
    for path in sorted({*ours, *theirs}):
        if ours.get(path) != theirs.get(path):
            yield f"ls: {path!r} is {ours.get(path)}, the kernel has {theirs.get(path)}"
            return


def _path(row: Mapping[str, Any]) -> bytes:
    import base64

    return base64.b64decode(row["path_bytes"]) if row.get("path_bytes") else row["path"].encode()


def _walk(top: bytes) -> Iterator[tuple[bytes, _Content]]:
    for directory, folders, files in os.walk(top):
        for name in [*folders, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            size = checksum = None
            if stat.S_ISREG(status.st_mode):
                size = status.st_size
                with open(path, "rb") as file:
                    checksum = hashlib.file_digest(file, "sha256").hexdigest()
            yield path[len(top) :], (size, checksum)
