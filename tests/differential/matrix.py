"""What the matrices of images have in common."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

MIB = 1024 * 1024
_ENVIRONMENT = {**os.environ, "LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1"}


class Image(NamedTuple):
    """An image of one filesystem; `refused` is part of the reason where it is not to be read."""

    path: Path
    type: str
    refused: str | None = None


def run(*arguments: object) -> None:
    """A program that must succeed."""
    subprocess.run(
        [str(argument) for argument in arguments],
        check=True,
        env=_ENVIRONMENT,
        capture_output=True,
        timeout=120,
    )


def tree_of_files(folder: Path, files: int) -> Path:
    """Ordinary and awkward names, deep directories, many files, sizes around a cluster's."""
    noise = random.Random(7)
    deep = folder / "one" / "two" / "three four" / "five"
    deep.mkdir(parents=True)
    (folder / "empty directory").mkdir()
    many = folder / "many"
    many.mkdir()
    for number in range(files):
        (many / f"file with a long name {number}.text").write_bytes(b"%d\n" % number * 9)
    for size in (0, 1, 511, 512, 513, 4096, 65537, 300_000):
        (deep / f"size-{size}.bin").write_bytes(noise.randbytes(size))
    for name in ("UPPER.TXT", "lower.txt", "Mixed.Txt", "two.dots.gz", ".hidden", "żółw ✓.txt"):
        (folder / name).write_bytes(name.encode())
    (folder / ("x" * 200 + ".long")).write_bytes(b"long")
    (folder / "a+b,c;d=e[f]").write_bytes(b"odd")
    for name in ("deleted one.txt", "DELETED.TXT"):
        (folder / name).write_bytes(b"gone" * 2000)
    return folder


def patch(path: Path, offset: int, data: bytes) -> None:
    """Write bytes into a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
