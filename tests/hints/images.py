"""Small images in the present folder, which bring hints up."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.guestmaker import disks, facts
from tests.guestmaker.trees import small_root
from tests.hints.following import MIB, run

UUID = "5f1d3a52-0f8b-4b6c-9d31-0000000000{:02x}"


def qemu_img(*words: str | Path) -> str:
    return run("qemu-img", *words)


def write(image: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", *words, image)


def qcow2(name: str = "disk.qcow2", *options: str, size: str = "8M") -> Path:
    """An image with a snapshot and a bitmap, in which something was written before and after."""
    qemu_img("create", "-q", "-f", "qcow2", *options, name, size)
    write(name, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "before", name)
    write(name, "write -P 2 64k 64k")
    if "compat=0.10" not in options:
        qemu_img("bitmap", "--add", name, "since")
    return Path(name)


def plain(name: str = "disk.qcow2", format: str = "qcow2", *options: str) -> Path:
    """An image in which something was written, with nothing besides."""
    qemu_img("create", "-q", "-f", format, *options, name, "8M")
    run("qemu-io", "-f", format, "-c", "write -P 1 0 64k", name)
    return Path(name)


def overlay(name: str, base: str, format: str = "qcow2") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-F", format, "-b", base, name)
    return Path(name)


def unbased() -> None:
    """An overlay whose base is not where its name leads."""
    words = ("-u", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2", "8M")
    qemu_img("create", "-q", "-f", "qcow2", *words)


def reads(image: str, byte: int, at: int = 0) -> bool:
    """Whether a guest sees this byte at a place of the image."""
    said = run("qemu-io", "-r", "-U", "-c", f"read -P {byte} {at} 4k", image)
    return "verification failed" not in said


@functools.cache
def _ext(files: tuple[tuple[str, str], ...], number: int, root: bool, size: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        given = dict(files)
        links = {name: text[3:] for name, text in given.items() if text.startswith("-> ")}
        texts = {name: text for name, text in given.items() if name not in links}
        if root:
            fstab = f"UUID={UUID.format(number)} / ext4 defaults 0 1\n" + texts.pop("etc/fstab", "")
            names = f"127.0.1.1\t{facts.HOSTNAME}\n"
            small_root(tree, fstab, files={"etc/hosts": names, **texts})
        else:
            tree.mkdir()
            disks.write_files(tree, texts)
        for name, target in links.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).unlink(missing_ok=True)
            (tree / name).symlink_to(target)
            if name.startswith("home/alice/"):
                os.chown(tree / name, 1000, 1000, follow_symlinks=False)
        made = disks.ext(Path(folder) / "fs", size * MIB, tree, uuid=UUID.format(number))
        return made.read_bytes()


def _put(content: bytes, path: Path, at: int = 0) -> None:
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(at)
        file.write(content.rstrip(b"\0"))
        file.truncate(max(at + len(content), path.stat().st_size))


def ext(name: str = "disk.raw", files: Mapping[str, str] | None = None, *, number: int = 1) -> Path:
    """A raw disk with ext4 on it, and one file, `name`, if not others are given."""
    path = Path(name)
    _put(_ext(tuple((files or {"name": "text"}).items()), number, False, 4), path)
    return path


def system(
    name: str = "disk.raw", files: Mapping[str, str] | None = None, *, number: int = 1
) -> Path:
    """A raw disk that holds a small Debian; what begins with '-> ' is a symbolic link."""
    path = Path(name)
    _put(_ext(tuple((files or {}).items()), number, True, 16), path)
    return path


def table(name: str, label: str, *lines: str, size: int = 16) -> Path:
    path = disks.blank(Path(name), size * MIB)
    text = "\n".join((f"label: {label}", *lines, ""))
    run(shutil.which("sfdisk") or "/sbin/sfdisk", "-q", path, input=text.encode())
    return path


def two_systems(name: str = "disk.raw") -> Path:
    """A disk with a small Debian on each of two partitions."""
    path = table(name, "dos", "start=2048,size=32768,type=83", "start=34816,size=32768,type=83",
                 size=34)  # fmt: skip
    for number, at in ((1, 1), (2, 17)):
        _put(_ext((("etc/motd", f"{number}\n"),), number, True, 16), path, at * MIB)
    return path
