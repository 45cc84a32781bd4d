"""Disks and filesystems made on the host, without the appliance."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.host.process import run

MIB = 1 << 20
SECTOR = 512

_GPT_TYPES = {
    "esp": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "bios": "21686148-6449-6E6F-744E-656564454649",
    "linux": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "lvm": "E6D6D379-F507-44C2-A23C-238F2A3DF928",
}
_MBR_TYPES = {"linux": "83", "ntfs": "7", "lvm": "8e"}


@dataclass(frozen=True)
class Slice:
    """One partition to make: start and size in MiB, a key of the type tables, a GPT name."""

    start: int
    size: int
    type: str = "linux"
    name: str = ""


def blank(path: Path, size: int) -> Path:
    """A file of `size` zero bytes that takes no space."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def partition(disk: Path, table: str, slices: Sequence[Slice]) -> None:
    """Write a partition table, `gpt` or `dos`; the identifiers are the same every time."""
    identifier = "5F1D3A52-0F8B-4B6C-9D31-0000000000FF" if table == "gpt" else "0x5f1d3a52"
    lines = [f"label: {table}", f"label-id: {identifier}"]
    for number, part in enumerate(slices, 1):
        words = [f"start={part.start * MIB // SECTOR}", f"size={part.size * MIB // SECTOR}"]
        if table == "gpt":
            words.append(f"type={_GPT_TYPES[part.type]}")
            words.append(f"uuid=5F1D3A52-0F8B-4B6C-9D31-0000000001{number:02}")
            if part.name:
                words.append(f'name="{part.name}"')
        else:
            words.append(f"type={_MBR_TYPES[part.type]}")
            if number == 1:
                words.append("bootable")
        lines.append(", ".join(words))
    run(["sfdisk", "--quiet", "--no-reread", disk], input="\n".join(lines).encode())


def _data_ranges(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is not a hole."""
    position = 0
    while position < size:
        try:
            start = os.lseek(file, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        position = os.lseek(file, start, os.SEEK_HOLE)
        yield start, position


def place(filesystem: Path, disk: Path, offset: int) -> None:
    """Copy a filesystem's image into a disk at `offset`; its holes leave the disk as it is."""
    with filesystem.open("rb") as source, disk.open("r+b") as target:
        for start, end in _data_ranges(source.fileno(), filesystem.stat().st_size):
            source.seek(start)
            target.seek(offset + start)
            while start < end:
                chunk = source.read(min(end - start, 4 * MIB))
                target.write(chunk)
                start += len(chunk)


def differences(old: Path, new: Path, block: int = 65536) -> list[tuple[int, bytes]]:
    """Offset and content of the blocks of `new` that are not as in `old`; sizes are equal."""
    found = []
    with old.open("rb") as before, new.open("rb") as after:
        for start, end in _data_ranges(after.fileno(), new.stat().st_size):
            for offset in range(start // block * block, end, block):
                before.seek(offset)
                after.seek(offset)
                content = after.read(block)
                if content != before.read(block):
                    found.append((offset, content))
    return found


def ext(
    path: Path,
    size: int,
    tree: Path | None,
    *,
    uuid: str,
    label: str = "",
    type: str = "ext4",
    options: Sequence[str] = (),
    indexed: bool = False,
) -> Path:
    """An ext2/3/4 filesystem of `size` bytes with the content of `tree`, owners and xattrs too.

    `indexed` gives large directories the hash index that the kernel would have given them.
    """
    words: list[str | Path] = ["mke2fs", "-q", "-F", "-t", type, "-U", uuid, "-L", label]
    words += options
    if tree is not None:
        words += ["-d", tree]
    run([*words, path, f"{size // 1024}k"])
    if indexed:
        run(["e2fsck", "-fyD", path], ok=(0, 1))
    return path


def debugfs(filesystem: Path, commands: Sequence[str], *, write: bool = False) -> str:
    """What debugfs says to these commands; a write that fails is an error."""
    words: list[str | Path] = ["debugfs", *(["-w"] if write else []), "-f", "-", filesystem]
    done = run(words, input="".join(f"{command}\n" for command in commands).encode())
    complaints = done.stderr.decode(errors="replace").splitlines()[1:]  # without the version
    if complaints:
        raise RuntimeError(f"debugfs: {complaints[0]}")
    return done.stdout.decode(errors="replace")


def to_qcow2(raw: Path, qcow2: Path) -> None:
    """The same disk as qcow2."""
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2])


def write_files(tree: Path, files: Mapping[str, bytes | str]) -> Path:
    """Files under `tree`, by their absolute guest path, with the folders that they need."""
    for name, content in files.items():
        path = tree / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return tree


def pack(tree: Path, archive: Path) -> Path:
    """A tar of what is in `tree`, for the appliance to unpack."""
    run(["tar", "-C", tree, "--numeric-owner", "--xattrs", "-cf", archive, "."])
    return archive
