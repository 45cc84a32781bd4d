"""Small real images and chains of them, made by qemu-img and damaged byte by byte."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.host.process import spawn

BACKING_FORMAT = bytes.fromhex("e2792aca")
CLUSTER = 4096
INCOMPATIBLE = 79  # the lowest byte of the incompatible features
DIRTY, CORRUPT = 1, 2


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def create_encrypted(*words: str | Path) -> None:
    """`qemu-img create` with a key. On a busy machine QEMU cannot measure how long it takes to
    derive one, and gives up: then again."""
    for left in reversed(range(50)):
        done = subprocess.run(["qemu-img", "create", *words], capture_output=True, text=True)
        if not left or "CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def raw(path: Path, size: int = 1 << 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


@functools.cache
def _template(size: int, options: str, format: str | None) -> bytes:
    """An image by qemu-img: making one takes longer than looking at it."""
    words = ["create", "-f", "qcow2", "-o", options]
    if format is not None:
        words += ["-u", "-b", "x" * 1000, "-F", format]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        qemu_img(*words, path, str(size))
        return path.read_bytes()


def qcow2(
    path: Path,
    backing: str | Path | None = None,
    format: str | None = "qcow2",
    *,
    size: int = 1 << 20,
    options: str = f"cluster_size={CLUSTER}",
) -> Path:
    """A qcow2; over `backing`, whatever that is, taken as `format` or with none written in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "data_file" in options:
        qemu_img("create", "-f", "qcow2", "-o", options, path, str(size))
        return path
    template = _template(size, options, None if backing is None else format or "raw")
    content = template if backing is None else renamed_base(template, str(backing))
    with path.open("wb") as file:
        file.write(content.rstrip(b"\0"))
        file.truncate(len(content))
    if backing is not None and format is None:
        patch(path, path.read_bytes().index(BACKING_FORMAT), b"\x12\x34\x56\x78")
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file, and leave its time as it was."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def named_format(path: Path, format: bytes) -> None:
    """Write another format of the backing file, not longer than the one that is there."""
    at = path.read_bytes().index(BACKING_FORMAT)
    patch(path, at + 4, struct.pack(">I", len(format)) + format)


def renamed_base(template: bytes, backing: str | bytes) -> bytes:
    """A header that names another backing file; longer names are cut off the first cluster."""
    name = os.fsencode(backing)
    (offset,) = struct.unpack_from(">Q", template, 8)
    length = struct.pack(">I", len(name))
    end = offset + len(name)
    return template[:16] + length + template[20:offset] + name + template[end:]


def write(path: Path, where: str = "0 64k", pattern: int = 7, format: str = "qcow2") -> None:
    command = ("qemu-io", "-f", format, "-c", f"write -P {pattern} {where}", path)
    subprocess.run(command, check=True, capture_output=True)


def linear(folders: Sequence[Path], links: int, *, absolute: bool, format: str) -> list[Path]:
    """A chain of so many images, base first, in the folders in turn."""
    made: list[Path] = []
    for number in range(links):
        path = folders[number % len(folders)] / f"link{number}"
        if not made:
            made.append(raw(path) if format == "raw" else qcow2(path))
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        below = made[-1]
        named = below if absolute else os.path.relpath(below, path.parent)
        made.append(qcow2(path, named, format if number == 1 else "qcow2"))
    return made


def older(path: Path) -> Path:
    """As if a file had been changed an hour ago."""
    past = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(past, past))
    return path


@contextlib.contextmanager
def held_by_qemu(path: Path, *, writable: bool = True, format: str = "qcow2") -> Iterator[int]:
    """A qemu-nbd that has the image open, alone; gives its process id."""
    socket, note = path.parent / "nbd.sock", path.parent / "nbd.pid"
    argv = ["qemu-nbd", "-t", "-k", str(socket), "-f", format, f"--pid-file={note}"]
    with spawn([*argv, *([] if writable else ["-r"]), str(path)]) as process:
        deadline = time.monotonic() + 20
        while not note.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        yield process.pid
    socket.unlink(missing_ok=True)
    note.unlink(missing_ok=True)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As an ordinary user, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
