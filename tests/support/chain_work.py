"""Work that takes long enough to be cut off: what it is done on, and how its result is known."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imgtool.image.chain.chain import open_chain
from imgtool.image.intent.intent_log import is_ours
from imgtool.image.qemu.disk_reader import open_contents

SIZE = 24 << 20
CLUSTER = "cluster_size=2k"  # many tables to write
_PIECE = 1 << 20


def qemu_img(*words: str | Path) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True).stdout


def start(*words: str | Path) -> subprocess.Popen[bytes]:
    """imgtool in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "imgtool", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def imgtool(*words: str | Path) -> tuple[int, str]:
    """The exit status, and what was said on standard error."""
    process = start(*words)
    said = process.communicate()[1]
    return process.returncode, said.decode()


def content(image: Path) -> str:
    """A checksum of what a guest would see, as imgtool itself reads it."""
    digest = hashlib.sha256()
    with open_contents(open_chain(image)) as (read, size):
        for at in range(0, size, _PIECE):
            digest.update(read(at, min(_PIECE, size - at)))
    return digest.hexdigest()


def checked(image: Path) -> dict[str, int]:
    """What `qemu-img check` finds wrong."""
    said = subprocess.run(
        ["qemu-img", "check", "--output=json", image], check=False, capture_output=True
    )
    answer = json.loads(said.stdout)
    kinds = ("corruptions", "leaks", "check-errors")
    return {kind: answer[kind] for kind in kinds if answer.get(kind)}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if is_ours(path.name)]


def _disk(path: Path, seed: int, *parts: tuple[int, int]) -> Path:
    """A sparse raw disk with noise in these parts of it, in MiB."""
    noise = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for start_at, end in parts:
            file.seek(start_at << 20)
            file.write(noise.randbytes((end - start_at) << 20))
    return path


def _qcow2(raw: Path, new: Path) -> Path:
    qemu_img("convert", "-O", "qcow2", "-o", CLUSTER, raw, new)
    return new


def _write_noise(image: Path, seed: int, start_at: int, end: int) -> None:
    """Over what is there, in MiB."""
    noise = image.with_name("noise")
    noise.write_bytes(random.Random(seed).randbytes((end - start_at) << 20))
    length = (end - start_at) << 20
    command = f"write -s {noise} {start_at << 20} {length}"
    subprocess.run(
        ["qemu-io", "-t", "writeback", "-f", "qcow2", "-c", command, image],
        check=True,
        capture_output=True,
    )
    noise.unlink()


def _overlay(folder: Path) -> None:
    raw = _disk(folder / "raw", 1, (0, 12))
    _qcow2(raw, folder / "base.qcow2")
    raw.unlink()
    top = folder / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", CLUSTER, "-b", "base.qcow2", "-F", "qcow2", top)
    _write_noise(top, 2, 8, 16)


def _overlay_and_another_base(folder: Path) -> None:
    _overlay(folder)
    raw = _disk(folder / "raw", 3, (0, 6), (18, 22))
    _qcow2(raw, folder / "other.qcow2")
    raw.unlink()


def _with_holes(folder: Path) -> None:
    raw = _disk(folder / "raw", 4, (0, 16))
    image = _qcow2(raw, folder / "disk.qcow2")
    raw.unlink()
    _write_zeros(image, 4, 12)


def _write_zeros(image: Path, start_at: int, end: int) -> None:
    command = f"write {'-z' if start_at % 2 else '-P 0'} {start_at << 20} {(end - start_at) << 20}"
    subprocess.run(
        ["qemu-io", "-t", "writeback", "-f", "qcow2", "-c", command, image],
        check=True,
        capture_output=True,
    )


def _snapshotted(folder: Path) -> None:
    raw = _disk(folder / "raw", 5, (0, 16))
    image = _qcow2(raw, folder / "disk.qcow2")
    raw.unlink()
    qemu_img("snapshot", "-c", "before", image)
    _write_noise(image, 6, 4, 12)


def _with_a_snapshot_less(folder: Path) -> None:
    _snapshotted(folder)
    image = folder / "disk.qcow2"
    qemu_img("snapshot", "-c", "middle", image)
    _write_noise(image, 7, 12, 18)
    qemu_img("snapshot", "-d", "middle", image)


def _holding(folder: Path) -> None:
    """A base with a snapshot and a dirty bitmap, which QEMU's repairs of 7.2 could not keep both;
    and an overlay on it."""
    _overlay(folder)
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    qemu_img("snapshot", "-c", "before", base)
    qemu_img("bitmap", "--add", base, "since")
    _write_noise(base, 8, 2, 6)
    os.utime(top)


def _holding_above(folder: Path) -> None:
    """The same, and a bitmap in the overlay."""
    _holding(folder)
    qemu_img("bitmap", "--add", folder / "top.qcow2", "above")


def _with_a_bitmap(folder: Path) -> None:
    _with_a_snapshot_less(folder)
    image = folder / "disk.qcow2"
    qemu_img("snapshot", "-c", "middle", image)
    qemu_img("bitmap", "--add", image, "since")
    _write_noise(image, 9, 1, 20)


@dataclass(frozen=True)
class Scene:
    """What a command is tried on: images in a folder, made once and copied for every trial.

    `words` are the command, with names of files in that folder; `image` is the one that the
    record is beside.
    """

    make: Callable[[Path], None]
    words: tuple[str, ...]
    image: str
    images: tuple[str, ...]

    def command(self, folder: Path) -> list[str | Path]:
        names = {*self.images, "new.qcow2"}
        return [folder / word if word in names else word for word in self.words]

    def copy(self, template: Path, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in self.images:
            # Copied with its holes; the times stay, as an overlay is younger than its base.
            subprocess.run(["cp", "-p", template / name, folder / name], check=True)
        return folder

    def contents(self, folder: Path) -> dict[str, str]:
        return {name: content(folder / name) for name in self.images}


SCENES = {
    "commit": Scene(
        _overlay,
        ("overlay", "commit", "top.qcow2"),
        "base.qcow2",
        ("base.qcow2", "top.qcow2"),
    ),
    "rebase": Scene(
        _overlay_and_another_base,
        ("overlay", "rebase", "top.qcow2", "other.qcow2"),
        "top.qcow2",
        ("base.qcow2", "other.qcow2", "top.qcow2"),
    ),
    "flatten": Scene(
        _overlay,
        ("overlay", "flatten", "top.qcow2"),
        "top.qcow2",
        ("base.qcow2", "top.qcow2"),
    ),
    "compact": Scene(_with_holes, ("compact", "disk.qcow2"), "disk.qcow2", ("disk.qcow2",)),
    "compact-snapshots": Scene(
        _with_a_snapshot_less, ("compact", "disk.qcow2"), "disk.qcow2", ("disk.qcow2",)
    ),
    "commit-holding": Scene(
        _holding,
        ("overlay", "commit", "top.qcow2"),
        "base.qcow2",
        ("base.qcow2", "top.qcow2"),
    ),
    "flatten-holding": Scene(
        _holding_above,
        ("overlay", "flatten", "top.qcow2"),
        "top.qcow2",
        ("base.qcow2", "top.qcow2"),
    ),
    "delete-holding": Scene(
        _with_a_bitmap,
        ("snapshot", "delete", "disk.qcow2", "middle"),
        "disk.qcow2",
        ("disk.qcow2",),
    ),
    "revert": Scene(
        _snapshotted,
        ("snapshot", "revert", "disk.qcow2", "before", "--discard"),
        "disk.qcow2",
        ("disk.qcow2",),
    ),
}


def backing(image: Path) -> str | None:
    said = json.loads(qemu_img("info", "--output=json", image))
    name: str | None = said.get("backing-filename")
    return name


def snapshots(image: Path) -> list[str]:
    said = json.loads(qemu_img("info", "--output=json", image))
    return [row["name"] for row in said.get("snapshots", ())]


def bitmaps(image: Path) -> list[str]:
    said = json.loads(qemu_img("info", "--output=json", image))
    return [row["name"] for row in said["format-specific"]["data"].get("bitmaps", ())]


def children_of(pid: int) -> list[list[str]]:
    """The command lines of a process's children."""
    found = []
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    for child in pids:
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found.append([os.fsdecode(word) for word in words])
    return found
