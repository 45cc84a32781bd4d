"""All that a qcow2 image holds, as QEMU and the host see it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = "secret,id=key,data=imgtool"
_PIECE = 1 << 20


@dataclass(frozen=True)
class Snapshot:
    """`content` is a checksum of the disk as it was then."""

    id: str
    name: str
    state_size: int
    content: str


@dataclass(frozen=True)
class State:
    """`content` is a checksum of what a guest sees, sizes are in bytes; `kind` is what sort of
    qcow2 it is, `attributes` the owner, mode and extended attributes of the file; `faults` what
    `qemu-img check` counts."""

    content: str
    size: int
    snapshots: tuple[Snapshot, ...]
    bitmaps: tuple[tuple[str, int, tuple[str, ...]], ...]
    backing: tuple[str | None, str | None]
    kind: tuple[tuple[str, object], ...]
    attributes: tuple[object, ...]
    faults: tuple[tuple[str, int], ...]


def options(image: Path, *, secret: str = "") -> list[str]:
    """How programs of QEMU are told of the image; `secret` is the way in which it is encrypted."""
    if not secret:
        return ["-f", "qcow2", str(image)]
    node = f"driver=qcow2,encrypt.format={secret},encrypt.key-secret=key,file.filename={image}"
    return ["--object", SECRET, "--image-opts", node]


def _qemu_img(*words: str) -> bytes:
    done = subprocess.run(["qemu-img", *words], check=False, capture_output=True)
    assert done.returncode == 0, f"qemu-img {' '.join(words)}: {done.stderr.decode()}"
    return done.stdout


def _content_then(image: Path, snapshot: str, bitmaps: Sequence[str]) -> str:
    """The disk of a snapshot, with the size that it had then: `qemu-img convert -l` would give it
    the present one. A copy goes back to it, which QEMU does only without bitmaps."""
    copy = image.with_name("copy")  # beside it, since its base may be too
    try:
        copy.write_bytes(image.read_bytes())
        for name in bitmaps:
            _qemu_img("bitmap", "--remove", str(copy), name)
        _qemu_img("snapshot", "-a", snapshot, str(copy))
        return _content(copy, secret="")
    finally:
        copy.unlink(missing_ok=True)


def _content(image: Path, *, secret: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        _qemu_img("convert", "-U", "-O", "raw", *options(image, secret=secret), str(raw))
        digest = hashlib.sha256()
        with raw.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()


def _kind(told: dict[str, Any]) -> tuple[tuple[str, object], ...]:
    data = dict(told["format-specific"]["data"])
    data.pop("bitmaps", None)
    encryption = data.pop("encrypt", None)
    kept = {name: value for name, value in data.items() if name != "corrupt" or value}
    kept["cluster-size"] = told["cluster-size"]
    kept["dirty"] = told.get("dirty-flag", False)
    kept["encryption"] = encryption and encryption["format"]
    return tuple(sorted(kept.items()))


def state_of(image: Path, *, secret: str = "") -> State:
    """All of it; of an encrypted image with its key, which is always the same one here."""
    told = json.loads(_qemu_img("info", "-U", "--output=json", "-f", "qcow2", str(image)))
    status = image.stat()
    checked = subprocess.run(
        ["qemu-img", "check", "-U", "--output=json", *options(image, secret=secret)],
        check=False,
        capture_output=True,
    )
    faults = json.loads(checked.stdout)
    bitmaps = told["format-specific"]["data"].get("bitmaps", ())
    return State(
        content=_content(image, secret=secret),
        size=told["virtual-size"],
        snapshots=tuple(
            Snapshot(
                row["id"],
                row["name"],
                row["vm-state-size"],
                _content_then(image, row["id"], [each["name"] for each in bitmaps]),
            )
            for row in told.get("snapshots", ())
        ),
        bitmaps=tuple(
            (row["name"], row["granularity"], tuple(sorted(row["flags"]))) for row in bitmaps
        ),
        backing=(told.get("backing-filename"), told.get("backing-filename-format")),
        kind=_kind(told),
        attributes=(
            status.st_uid,
            status.st_gid,
            status.st_mode,
            tuple(sorted((name, os.getxattr(image, name)) for name in os.listxattr(image))),
        ),
        faults=tuple(
            (kind, faults[kind])
            for kind in ("corruptions", "leaks", "check-errors")
            if faults.get(kind)
        ),
    )


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    """The files of a folder: time of change, and a checksum of the bytes."""
    return {
        path.name: (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.iterdir())
    }
