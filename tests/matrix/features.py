"""One image of each kind of qcow2, with noise in it; QEMU itself makes them."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.matrix.state import options
from tests.support.chain_images import create_encrypted

SIZE = 8 << 20
_FLAGS_OF_BITMAP = struct.Struct(">QIIBBHI")  # an entry of the directory of bitmaps, without name
_IN_USE = 1


@dataclass(frozen=True)
class Feature:
    """`make` puts `disk.qcow2`, and what it stands on, into a folder; `secret` is the way in which
    QEMU encrypts it, if it does."""

    make: Callable[[Path], None]
    secret: str = ""


def run(*words: str | Path) -> None:
    """A program that must succeed."""
    done = subprocess.run([*words], capture_output=True)
    assert done.returncode == 0, f"{words}: {done.stderr.decode()}"


def write(image: Path, seed: int, start: int, length: int, *, secret: str = "") -> None:
    """Noise into an image, offset and length in KiB."""
    noise = image.parent / "noise"
    noise.write_bytes(random.Random(seed).randbytes(length << 10))
    where = options(image, secret=secret)
    run("qemu-io", "-c", f"write -s {noise} {start << 10} {length << 10}", *where)
    noise.unlink()


def _create(folder: Path, how: str = "", *words: str, size: int = SIZE) -> Path:
    image = folder / "disk.qcow2"
    options = ["-f", "qcow2", *(["-o", how] if how else [])]
    create_encrypted(*options, *words, image, str(size))
    return image


def _filled(how: str = "", *, secret: str = "") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        words = ("--object", "secret,id=key,data=imgtool") if secret else ()
        image = _create(folder, how, *words)
        write(image, 1, 0, 3072, secret=secret)

    return make


def _snapshots(how: str = "") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _filled(how)(folder)
        image = folder / "disk.qcow2"
        run("qemu-img", "snapshot", "-c", "first", image)
        write(image, 2, 1024, 1024)
        run("qemu-img", "snapshot", "-c", "second", image)
        write(image, 3, 2048, 2048)

    return make


def _external_data(how: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _create(folder, f"data_file={folder / 'disk.data'}{how}")
        write(folder / "disk.qcow2", 1, 0, 3072)

    return make


def _compressed(how: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        raw = folder / "raw"
        raw.write_bytes((b"a line that is there often\n" * 100_000).ljust(SIZE, b"\0"))
        run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", how, raw, folder / "disk.qcow2")
        raw.unlink()

    return make


def _bitmaps(make_first: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        make_first(folder)
        image = folder / "disk.qcow2"
        run("qemu-img", "bitmap", "--add", image, "backup")
        run("qemu-img", "bitmap", "--add", "--disable", "-g", "128k", image, "old")

    return make


def _bitmap_in_use(folder: Path) -> None:
    """As after a crash: QEMU does not use such a bitmap, and has not removed it."""
    _bitmaps(_snapshots())(folder)
    image = folder / "disk.qcow2"
    content = bytearray(image.read_bytes())
    for name in (b"backup", b"old"):
        at = content.index(name) - _FLAGS_OF_BITMAP.size
        fields = list(_FLAGS_OF_BITMAP.unpack_from(content, at))
        fields[2] |= _IN_USE
        _FLAGS_OF_BITMAP.pack_into(content, at, *fields)
    image.write_bytes(content)


def _memory(folder: Path) -> None:
    """A snapshot that has the state of a virtual machine, as `savevm` takes it."""
    _filled()(folder)
    image = folder / "disk.qcow2"
    words = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S"]
    node = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"
    done = subprocess.run(
        [*words, "-blockdev", node, "-monitor", "stdio"],
        input=b"savevm first\nquit\n",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    write(image, 2, 1024, 1024)
    run("qemu-img", "snapshot", "-c", "second", image)


def _other_sizes(folder: Path) -> None:
    """Snapshots of a smaller, and of a larger disk."""
    _snapshots()(folder)
    image = folder / "disk.qcow2"
    run("qemu-img", "resize", image, str(SIZE * 2))
    write(image, 4, 9 << 10, 1024)
    run("qemu-img", "snapshot", "-c", "larger", image)
    run("qemu-img", "resize", "--shrink", image, str(SIZE + (4 << 20)))


def _overlay(how: str = "", *, absolute: bool = False, size: int = SIZE) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _filled()(folder)
        base = (folder / "disk.qcow2").rename(folder / "base.qcow2")
        name = str(base) if absolute else base.name
        image = _create(folder, how, "-F", "qcow2", "-b", name, size=size)
        write(image, 5, 2048, 2048)

    return make


def _overlay_with_snapshots(folder: Path) -> None:
    _overlay()(folder)
    image = folder / "disk.qcow2"
    run("qemu-img", "snapshot", "-c", "first", image)
    write(image, 6, 1024, 512)
    run("qemu-img", "snapshot", "-c", "second", image)


def _dirty(folder: Path) -> None:
    """As after a crash of QEMU with lazy refcounts."""
    _snapshots("lazy_refcounts=on")(folder)
    image = folder / "disk.qcow2"
    command = ("qemu-io", "-c", "write -P 7 6M 1M", "-c", "abort", image)
    subprocess.run(command, capture_output=True)


FEATURES: Mapping[str, Feature] = {
    "plain": Feature(_filled()),
    "compat-0.10": Feature(_filled("compat=0.10")),
    "compat-0.10-snapshots": Feature(_snapshots("compat=0.10")),
    "snapshots": Feature(_snapshots()),
    "memory": Feature(_memory),
    "other-sizes": Feature(_other_sizes),
    "bitmaps": Feature(_bitmaps(_filled())),
    "bitmaps-snapshots": Feature(_bitmaps(_snapshots())),
    "bitmaps-in-use": Feature(_bitmap_in_use),
    "lazy": Feature(_snapshots("lazy_refcounts=on")),
    "dirty": Feature(_dirty),
    "extended-l2": Feature(_snapshots("extended_l2=on,cluster_size=128k")),
    "zlib": Feature(_compressed("compression_type=zlib")),
    "zstd": Feature(_compressed("compression_type=zstd")),
    "clusters-512": Feature(_snapshots("cluster_size=512")),
    "clusters-2m": Feature(_snapshots("cluster_size=2M")),
    "refcounts-64": Feature(_snapshots("refcount_bits=64")),
    "refcounts-1": Feature(_filled("refcount_bits=1")),
    "preallocated": Feature(_filled("preallocation=metadata")),
    "data-file": Feature(_external_data("")),
    "data-file-raw": Feature(_external_data(",data_file_raw=on")),
    "encrypted": Feature(_filled("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=100",
                                 secret="luks"), secret="luks"),
    "encrypted-aes": Feature(_filled("encrypt.format=aes,encrypt.key-secret=key", secret="aes"),
                             secret="aes"),
    "overlay": Feature(_overlay()),
    "overlay-absolute": Feature(_overlay(absolute=True)),
    "overlay-larger": Feature(_overlay(size=SIZE * 2)),
    "overlay-bitmaps": Feature(_bitmaps(_overlay())),
    "overlay-snapshots": Feature(_overlay_with_snapshots),
    "overlay-bitmaps-snapshots": Feature(_bitmaps(_overlay_with_snapshots)),
}  # fmt: skip


def make(name: str, folder: Path) -> Path:
    """The image of a kind, in a new folder, with attributes that are not the usual ones."""
    folder.mkdir(parents=True)
    FEATURES[name].make(folder)
    image = folder / "disk.qcow2"
    os.setxattr(image, "user.note", b"kept")
    image.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(image, 1234, 2345)
    return image
