"""Images of every format and subformat that qemu-img makes, and as other makers leave them."""

from __future__ import annotations

import functools
import os
import re
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SIZE = 24 << 20


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True).stdout


def qemu_io(image: Path | str, format: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", format, *words, image], check=True, capture_output=True)


@functools.cache
def source() -> bytes:
    """A disk with a part that is written, one that is zeros, and one that never was."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk"
        qemu_img("create", "-f", "raw", path, str(SIZE))
        qemu_io(path, "raw", "write -P 1 0 3M", "write -P 2 5M 1M", "write -P 3 20M 100k")
        return path.read_bytes()


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def vhd_checked(data: bytes, at: int) -> bytes:
    """A footer or header of a VHD with its checksum, which is at `at`, made right."""
    data = data[:at] + bytes(4) + data[at + 4 :]
    return data[:at] + struct.pack(">I", ~sum(data) & 0xFFFF_FFFF) + data[at + 4 :]


def patch_footer(path: Path, offset: int, data: bytes) -> None:
    """Change the footer of a VHD, and its copy, as their maker would have."""
    places = [path.stat().st_size - 512]
    with path.open("rb") as file:
        if file.read(8) == b"conectix":
            places.append(0)
    for place in places:
        with path.open("rb") as file:
            file.seek(place)
            footer = file.read(512)
        patch(path, place, vhd_checked(footer[:offset] + data + footer[offset + len(data) :], 64))


def _line(old: bytes, new: bytes) -> Callable[[Path], None]:
    """What puts another line in the place of one of a VMDK's descriptor."""

    def change(path: Path) -> None:
        content = path.read_bytes()
        at = content.index(old)
        end = content.index(b"\0", at) if b"\0" in content[at:] else len(content)
        text = content[at:end].replace(old, new, 1)
        path.write_bytes(
            content[:at] + text + content[end + len(new) - len(old) :]
            if end < len(content)
            else content[:at] + text
        )

    return change


@dataclass(frozen=True)
class Kind:
    """How an image is made: the format and options of `qemu-img convert`, whether compressed, and
    what is done to it after."""

    format: str
    options: str = ""
    compressed: bool = False
    change: Callable[[Path], None] | None = None

    def make(self, path: Path) -> Path:
        """An image at `path` that holds `source()`."""
        raw = path.with_name("source")
        raw.write_bytes(source())
        words = ["convert", "-O", self.format]
        if self.options:
            words += ["-o", self.options.replace("DATA", str(path.with_name("data")))]
        if self.compressed:
            words.append("-c")
        qemu_img(*words, raw, path)
        raw.unlink()
        if self.change is not None:
            self.change(path)
        return path


def _suspended(path: Path) -> None:
    patch_footer(path, 84, b"\1")


WRITABLE = {
    "raw": Kind("raw"),
    "qcow2": Kind("qcow2"),
    "qcow2 0.10": Kind("qcow2", "compat=0.10"),
    "qcow2 extended L2": Kind("qcow2", "extended_l2=on,cluster_size=128k"),
    "qcow2 lazy": Kind("qcow2", "lazy_refcounts=on"),
    "qcow2 small": Kind("qcow2", "cluster_size=512,refcount_bits=1"),
    "qcow2 large": Kind("qcow2", "cluster_size=2M,refcount_bits=64"),
    "qcow2 compressed": Kind("qcow2", compressed=True),
    "qcow2 zstd": Kind("qcow2", "compression_type=zstd", compressed=True),
    "qcow2 data": Kind("qcow2", "data_file=DATA"),
    "qcow2 data raw": Kind("qcow2", "data_file=DATA,data_file_raw=on"),
    "qed": Kind("qed"),
    "vmdk": Kind("vmdk"),
    "vmdk monolithicSparse": Kind("vmdk", "subformat=monolithicSparse"),
    "vmdk monolithicFlat": Kind("vmdk", "subformat=monolithicFlat"),
    "vmdk twoGbMaxExtentSparse": Kind("vmdk", "subformat=twoGbMaxExtentSparse"),
    "vmdk twoGbMaxExtentFlat": Kind("vmdk", "subformat=twoGbMaxExtentFlat"),
    "vmdk zeroed grain": Kind("vmdk", "zeroed_grain=on"),
    "vmdk compat6": Kind("vmdk", "compat6=on"),
    "vdi": Kind("vdi"),
    "vdi static": Kind("vdi", "static=on"),
    "vpc": Kind("vpc"),
    "vpc dynamic": Kind("vpc", "subformat=dynamic,force_size=on"),
    "vpc fixed": Kind("vpc", "subformat=fixed"),
    "vpc fixed, exact": Kind("vpc", "subformat=fixed,force_size=on"),
    "vpc of Hyper-V": Kind(
        "vpc", "force_size=on", change=lambda path: patch_footer(path, 28, b"win \0\n\0\0Wi2k")
    ),
}
UNWRITABLE = {
    "qcow": Kind("qcow"),
    "vmdk streamOptimized": Kind("vmdk", "subformat=streamOptimized"),
    "vmdk streamOptimized, compressed": Kind("vmdk", "subformat=streamOptimized", compressed=True),
    "vmdk streamOptimized, version 1": Kind(
        "vmdk", "subformat=streamOptimized", change=lambda path: patch(path, 4, b"\1")
    ),
    "vmdk version 3": Kind("vmdk", change=lambda path: patch(path, 4, b"\3")),
    "vmdk with change tracking": Kind(
        "vmdk",
        "subformat=monolithicFlat",
        change=_line(b"# The Disk Data Base", b'changeTrackPath="disk-ctk.vmdk"\n#'),
    ),
    "vmdk open": Kind("vmdk", change=lambda path: patch(path, 72, b"\1")),
    "vpc suspended": Kind("vpc", "force_size=on", change=_suspended),
    "vpc fixed, suspended": Kind("vpc", "subformat=fixed,force_size=on", change=_suspended),
    "vhdx": Kind("vhdx"),
    "vhdx dynamic": Kind("vhdx", "subformat=dynamic"),
    "vhdx fixed": Kind("vhdx", "subformat=fixed"),
}


def subformats(format: str) -> set[str]:
    """Those that the installed qemu-img offers to make."""
    text = qemu_img("create", "-f", format, "-o", "help")
    found = re.search(r"subformat=.*\{(.*)\}", text) or re.search(
        r"subformat=.*either (.*)\. Default", text
    )
    if found is None:
        return set()
    words = re.split(r"[|]|\bor\b", found[1].replace("(default)", ""))
    return {word.strip(" '") for word in words}


def differencing_vhd(path: Path, parent: Path, name: str, locator: str | None = None) -> Path:
    """A VHD that holds nothing but that it stands on `parent`, whose name it has as `name`, and,
    if given, as a relative name of Windows."""
    content = bytearray(parent.read_bytes())
    footer, header = bytes(content[:512]), content[512:1536]
    header[40:56] = footer[68:84]
    encoded = name.encode("utf-16-be")
    header[64 : 64 + len(encoded)] = encoded
    table, count = struct.unpack_from(">Q", header, 16)[0], struct.unpack_from(">I", header, 28)[0]
    content[table : table + 4 * count] = b"\xff" * (4 * count)
    end = -(-(table + 4 * count) // 512) * 512
    if locator is not None:
        written = locator.encode("utf-16-le")
        struct.pack_into(">4sIIIQ", header, 576, b"W2ru", 512, len(written), 0, end)
        content[end : end + 512] = written.ljust(512, b"\0")
        end += 512
    own = footer[:60] + struct.pack(">I", 4) + footer[64:68] + uuid.uuid4().bytes + footer[84:]
    footer = vhd_checked(own, 64)
    content[512:1536] = vhd_checked(bytes(header), 36)
    path.write_bytes(footer + bytes(content[512:end]) + footer)
    return path


def differencing_vdi(path: Path, parent: Path) -> Path:
    """A VDI that holds nothing but that it stands on `parent`."""
    content = bytearray(parent.read_bytes())
    struct.pack_into("<I", content, 0x4C, 4)
    content[0x1A8:0x1B8] = content[0x188:0x198]
    content[0x188:0x198] = uuid.uuid4().bytes
    path.write_bytes(content)
    return path


PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_OF_VHDX = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913").bytes_le


def data_guid(path: Path) -> uuid.UUID:
    """What a VHDX is known by to those that stand on it."""
    content = path.read_bytes()
    headers = [content[at : at + 80] for at in (64 << 10, 128 << 10)]
    return uuid.UUID(bytes_le=max(headers, key=lambda data: data[8:16][::-1])[32:48])


def differencing_vhdx(path: Path, parent: Path, name: str) -> Path:
    """A VHDX that says that it stands on `parent`, which it calls by a name of Windows."""
    content = bytearray(parent.read_bytes())
    table = content.index(b"metadata", 1 << 20)
    at = content.index(PARAMETERS, table)
    place = table + struct.unpack_from("<I", content, at + 16)[0]
    struct.pack_into("<I", content, place + 4, 2)
    words = {"parent_linkage": f"{{{data_guid(parent)}}}", "relative_path": name}
    item, texts = bytearray(_OF_VHDX + struct.pack("<HH", 0, len(words))), b""
    for key, value in words.items():
        one, two = key.encode("utf-16-le"), value.encode("utf-16-le")
        start = 20 + 12 * len(words) + len(texts)
        item += struct.pack("<IIHH", start, start + len(one), len(one), len(two))
        texts += one + two
    item += texts
    count = struct.unpack_from("<H", content, table + 10)[0]
    struct.pack_into("<H", content, table + 10, count + 1)
    entry = _LOCATOR + struct.pack("<IIII", 512 << 10, len(item), 4, 0)
    content[table + 32 + 32 * count : table + 64 + 32 * count] = entry
    content[table + (512 << 10) : table + (512 << 10) + len(item)] = item
    for header in (64 << 10, 128 << 10):
        content[header + 32 : header + 48] = uuid.uuid4().bytes
    path.write_bytes(content)
    return path


def cut(path: Path, part: float) -> Path:
    """Leave only the first part of a file."""
    os.truncate(path, int(path.stat().st_size * part))
    return path
