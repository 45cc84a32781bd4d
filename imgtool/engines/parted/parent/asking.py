"""Asking libparted what it reads of a disk, in a sandbox that is gone with the answer.

The program in it, `imgtool.engines.parted.confined`, has the table sectors of the disk and no file
of the host. What it answers is looked at as all that comes out of a sandbox.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from imgtool.engines.direct.parent import sandbox
from imgtool.engines.direct.wire import frames
from imgtool.engines.direct.wire.frames import BadMessage
from imgtool.engines.direct.wire.messages import items, mapping, string, whole
from imgtool.engines.direct.wire.refusals import NoSandbox, SandboxFailed
from imgtool.engines.parted.parent.sectors import Read, table_sectors
from imgtool.errors import EngineError, shorten
from imgtool.text import printable

if TYPE_CHECKING:
    import subprocess

log = logging.getLogger(__name__)

_MAIN = "imgtool.engines.parted.confined.__main__"
MEMORY = 512 << 20
CPU, PATIENCE = 10, 20.0  # seconds
_MOST_HEARD = 1 << 20
_MOST_ROWS = 4096
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
# libparted asks a shell for the machine's maker as it is loaded, and crashes if it can start none.
# That is before anything of a disk is there; no program can be started then. No maker is told.
_SHELL = {
    sandbox.Kind.NAMESPACES: ("true", ("--symlink", "/usr/bin/true", "/bin/sh")),
    sandbox.Kind.LANDLOCK: ("sh", ()),
}
_KINDS = ("primary", "logical", "extended")


@dataclass(frozen=True)
class Row:
    """A partition as libparted reads it; `start` and `size` in bytes."""

    number: int
    kind: str
    start: int
    size: int
    name: str | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Label:
    """What libparted reads of a disk: the name that it has for the table's kind, None if it reads
    none; and what it said about it, in lines of its own.
    """

    name: str | None
    rows: tuple[Row, ...]
    said: tuple[str, ...]


def ask(read: Read, size: int, *, sector_size: int = 512) -> Label:
    """What libparted reads of a disk of so many bytes, of which `read` gives some.

    Of a file libparted cannot tell how large its sectors are: it takes them for `sector_size`.
    Raises `Unsupported` where it cannot be asked, `EngineError` where it fails.
    """
    reasons = []
    for kind in sandbox.Kind:
        try:
            return _answer(kind, read, size, sector_size)
        except NoSandbox as error:
            log.info("libparted: no sandbox by %s: %s", kind.value, error)
            reasons.append(f"{kind.value}: {error}")
    raise NoSandbox(f"no sandbox can be had ({'; '.join(reasons)})")


def _answer(kind: sandbox.Kind, read: Read, size: int, sector_size: int) -> Label:
    started = time.monotonic()
    images = sandbox.Images(())
    shell, options = _SHELL[kind]
    with contextlib.ExitStack() as stack:
        stack.callback(images.close)
        request = stack.enter_context(_memory())
        shared, path = [], None
        if kind is sandbox.Kind.LANDLOCK:  # there is no place to write to
            disk = stack.enter_context(_memory())
            disk.truncate(size)
            for at, data in table_sectors(read, size):
                os.pwrite(disk.fileno(), data, at)
            fcntl.fcntl(disk, fcntl.F_ADD_SEALS, _SEALS)
            shared, path = [disk.fileno()], f"/proc/self/fd/{disk.fileno()}"
        asked = {"size": size, "sector_size": sector_size, "path": path}
        frames.send_json(request, frames.JSON, asked)
        if path is None:
            for at, data in table_sectors(read, size):
                frames.send(request, frames.DATA, at.to_bytes(8, "big") + data)
            frames.send(request, frames.END)
        request.flush()
        request.seek(0)
        process = stack.enter_context(
            sandbox.start_worker(
                images,
                kind=kind,
                main=_MAIN,
                programs=(shell,),
                modules=("_ped",),
                options=options,
                memory=MEMORY,
                cpu=CPU,
                stdin=request.fileno(),
                shared=shared,
            )
        )
        try:
            heard = _heard(process)
            if not heard.startswith(frames.READY):
                raise SandboxFailed(_last_line(process))
            label = parse_answer(heard, size, sector_size)
        except frames.Ended as error:
            log.info("libparted: %s", _last_line(process))
            raise _failure("it ended without an answer") from error
        except BadMessage as error:
            raise _failure(f"its answer makes no sense: {error}") from error
        log.info("libparted: asked in %.3f s, by %s", time.monotonic() - started, kind.value)
        return label


@contextlib.contextmanager
def _memory() -> Iterator[BinaryIO]:
    descriptor = os.memfd_create("imgtool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "w+b") as file:  # noqa: PTH123
        yield file


def _failure(reason: str) -> EngineError:
    return EngineError(f"libparted failed at the partition table: {reason}")


def _heard(process: subprocess.Popen[bytes]) -> bytes:
    """All that it says, within limits of length and time."""
    assert process.stdout is not None
    deadline = time.monotonic() + PATIENCE
    heard = bytearray()
    while True:
        left = max(deadline - time.monotonic(), 0)
        if not select.select([process.stdout], [], [], left)[0]:
            process.kill()
            raise _failure(f"no answer within {PATIENCE:g} s")
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            return bytes(heard)
        heard += part
        if len(heard) > _MOST_HEARD:
            process.kill()
            raise BadMessage("it is too long")


def _last_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    lines = os.read(process.stderr.fileno(), 1 << 16).decode(errors="replace").strip().splitlines()
    return printable(lines[-1][:200]) if lines else "it ended"


def parse_answer(heard: bytes, size: int, sector_size: int) -> Label:
    """The answer in what was heard; `BadMessage` for anything else."""
    stream = io.BytesIO(heard)
    said = [frames.receive(stream) for _ in range(3)]
    if [kind for kind, _ in said] != [frames.READY, frames.JSON, frames.END] or stream.read(1):
        raise BadMessage("not one answer")
    told = mapping(frames.parse_json(said[1][1]), frozenset(("label", "rows", "said")))
    rows = items(told["rows"])
    if len(rows) > _MOST_ROWS:
        raise BadMessage("too many rows")
    found = tuple(_row(row, size // sector_size, sector_size) for row in rows)
    if len({row.number for row in found}) != len(found):
        raise BadMessage("a number twice")
    name = None if told["label"] is None else _word(told["label"])
    if name is None and found:
        raise BadMessage("rows of no table")
    lines = tuple(shorten(printable(string(line))) for line in items(told["said"]))
    return Label(name, found, lines)


def _word(value: object) -> str:
    word = string(value)
    if not (0 < len(word) <= 32 and word.isascii() and word.replace("_", "").isalnum()):
        raise BadMessage("no word")
    return word


def _row(row: object, sectors: int, sector_size: int) -> Row:
    number, kind, start, count, name, flags = items(row, 6)
    if kind not in _KINDS:
        raise BadMessage("no kind of a partition")
    # A hostile table may lie about where the disk ends: such a row is told of, not believed.
    most = (1 << 63) // sector_size - 1
    first = whole(start, most=most)
    return Row(
        number=whole(number, 1, 1 << 16),
        kind=kind,
        start=first * sector_size,
        size=whole(count, 1, most - first) * sector_size,
        name=None if name is None else string(name)[:256],
        flags=tuple(_word(flag) for flag in items(flags)),
    )
