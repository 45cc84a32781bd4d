"""Images of exFAT with what its reader must get right, filled by Linux's driver and by another."""

from __future__ import annotations

import shlex
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imgtool.engines.libguestfs.appliance.launch import launch_appliance
from tests.differential.matrix import MIB, Image, patch, run, tree_of_files
from tests.support.exfat_images import ENTRY, boot_sum, entry_sum
from tests.unmounting import unmount

_FRAGMENTED = """\
cd /sysroot
mkdir left right
gone=
for n in $(seq 1 150); do
    printf '%700s' $n >>left.bin
    printf '%1900s' $n >>right.bin
    echo $n >"left/a rather long name of a file $n.text"
    echo $n >"right/another rather long name of a file $n.text"
done
rm left/*1.text right/*[2-5].text
head -c 1500000 /dev/urandom >long.bin
"""
_ATTRIBUTES = """\
cd /sysroot
chmod a-w UPPER.TXT
mkdir '\U0001f41f \U0001f427'
echo fish >'\U0001f41f \U0001f427/\u00e9\u00c9\u0131\u00df \u0444\u0416.txt'
echo deleted >gone
mkdir gone.d
sync
rm -r gone gone.d 'deleted one.txt'
"""


@contextmanager
def loop_device(image: Path, sector: int = 512) -> Iterator[str]:
    """The image as a block device of the host."""
    words = ["losetup", "--find", "--show", "-b", str(sector), str(image)]
    found = subprocess.run(words, check=True, capture_output=True, text=True)
    device = found.stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def _make(path: Path, size: int, *options: object, sector: int = 512) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    with loop_device(path, sector) as device:
        run("mkfs.exfat", *options, device)
    return path


def _filled_by_linux(images: Sequence[Path], tree: Path, scripts: Sequence[str]) -> None:
    """The tree, and what the shell script adds, into each, in one appliance."""

    def add(handle: Any) -> None:
        for image in images:
            handle.add_drive_opts(str(image), format="raw")

    archive = tree.with_suffix(".tar")
    run("tar", "--owner=root", "--group=root", "-C", tree, "-cf", archive, ".")
    with launch_appliance(add, notice=print) as g:
        for device, script in zip(g.list_devices(), scripts, strict=True):
            g.mount(device, "/")
            g.tar_in(str(archive), "/")
            said = g.debug("sh", [f"sh -ec {shlex.quote(script)} 2>&1 || echo FAILED"])
            assert "FAILED" not in said, said
            g.umount_all()


def _filled_by_fuse(image: Path, tree: Path) -> None:
    mounted = image.with_suffix(".mounted")
    mounted.mkdir()
    with loop_device(image) as device:
        run("mount.exfat-fuse", device, mounted)
        try:
            run("cp", "-r", "--preserve=timestamps", f"{tree}/.", mounted)
            for number in range(0, 60, 2):
                (mounted / "many" / f"file with a long name {number}.text").unlink()
        finally:
            unmount(mounted)
    mounted.rmdir()


def _change(path: Path, name: str, change: Callable[[bytearray], None], mend: bool = True) -> None:
    """Change the entry set of a name; `mend` gives it the checksum that it then has."""
    content = path.read_bytes()
    wanted = name.encode("utf-16-le")
    found = content.index(b"\xc1\0" + wanted[:30].ljust(30, b"\0")) - 2 * ENTRY
    assert content[found] == 0x85
    raw = bytearray(content[found : found + (content[found + 1] + 1) * ENTRY])
    change(raw)
    if mend:
        raw[2:4] = entry_sum(bytes(raw)).to_bytes(2, "little")
    patch(path, found, bytes(raw))


def _set(offset: int, data: bytes) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        raw[offset : offset + len(data)] = data

    return change


def _date(year: int, month: int, day: int, hour: int, minute: int, second: int) -> bytes:
    date = year - 1980 << 9 | month << 5 | day
    return struct.pack("<HH", hour << 11 | minute << 5 | second // 2, date)


def _times(path: Path) -> None:
    """Hundredths of a second, offsets from UTC on both sides, none, and the ends of the range."""
    for name, date, hundredths, offset in (
        ("UPPER.TXT", _date(1980, 1, 1, 0, 0, 0), 0, 0x80),
        ("lower.txt", _date(2107, 12, 31, 23, 59, 58), 199, 0x80),
        ("Mixed.Txt", _date(2024, 2, 29, 1, 2, 4), 137, 0x80 | 4),
        ("two.dots.gz", _date(2023, 7, 14, 12, 30, 0), 50, 0x80 | 0x7C),
        (".hidden", _date(2022, 12, 31, 23, 59, 58), 7, 0x20),
        ("a+b,c;d=e[f]", _date(1999, 3, 1, 0, 0, 2), 100, 0x80 | 0x40),
    ):
        _change(path, name, _set(12, date))
        _change(path, name, _set(21, bytes([hundredths])))
        _change(path, name, _set(23, bytes([offset])))
    # Read-only, hidden, system; a directory that is read-only.
    _change(path, "Mixed.Txt", _set(4, b"\x27"))
    _change(path, "empty directory", _set(4, b"\x11"))


def _mend_boot(path: Path) -> None:
    """The checksum of the boot region."""
    content = path.read_bytes()
    sector = 1 << content[108]
    patch(path, 11 * sector, boot_sum(content[: 11 * sector]) * (sector // 4))


def _root(path: Path) -> int:
    content = path.read_bytes()[:512]
    data, _, cluster = struct.unpack_from("<III", content, 88)
    place: int = (data << content[108]) + ((cluster - 2) << content[108] + content[109])
    return place


def _refused(folder: Path, sound: Path) -> list[Image]:
    """What is odd, damaged, or taken differently by versions of Linux."""

    def copy(name: str, reason: str) -> Path:
        path = folder / name
        run("cp", "--sparse=always", sound, path)
        images.append(Image(path, "exfat", reason))
        return path

    images: list[Image] = []
    patch(copy("exfat-boot", "checksum of the boot region"), 5 * 512, b"\1")
    two = copy("exfat-two-tables", "2 tables")
    patch(two, 110, b"\2")
    _mend_boot(two)
    newer = copy("exfat-revision", "revision 2.00")
    patch(newer, 104, b"\0\2")
    _mend_boot(newer)
    patch(copy("exfat-media", "volume flags 0x4"), 106, b"\4")
    larger = copy("exfat-larger", "outside of the volume")
    patch(larger, 72, (1 << 30).to_bytes(8, "little"))
    _mend_boot(larger)
    _change(copy("exfat-hash", "wrong hash"), "lower.txt", _set(ENTRY + 4, b"\0\0"))
    _change(copy("exfat-sum", "wrong checksum"), "lower.txt", _set(12, b"\0\1"), mend=False)
    same = copy("exfat-same-name", "two entries of one name")
    found: dict[str, bytes] = {}
    _change(same, "UPPER.TXT", lambda raw: found.update(name=bytes(raw)))
    # Another file with that name: its name's entry and hash.
    _change(same, "lower.txt", _set(ENTRY + 4, found["name"][ENTRY + 4 : ENTRY + 6]))
    _change(same, "lower.txt", _set(2 * ENTRY, found["name"][2 * ENTRY :]))
    root = _root(sound)
    for name, reason, kind in (
        ("exfat-no-upcase", "0 up-case tables", 0x82),
        ("exfat-no-bitmap", "0 allocation bitmaps", 0x81),
    ):
        raw = sound.read_bytes()[root : root + 4096]
        at = next(n for n in range(0, 4096, ENTRY) if raw[n] == kind)
        patch(copy(name, reason), root + at, b"\x05")
    upcase = copy("exfat-upcase", "damaged up-case table")
    patch(upcase, sound.read_bytes().index("ABC".encode("utf-16-le"), 4096), b"Z")
    _change(copy("exfat-odd-type", "type 0xe0"), "UPPER.TXT", _set(0, b"\xe0"), mend=False)
    return images


def make_images(folder: Path) -> list[Image]:
    """All of them, in an empty folder."""
    folder.mkdir(exist_ok=True)
    tree = tree_of_files(folder / "exfat-tree", 60)
    made = {
        "exfat": (_make(folder / "exfat", 40 * MIB, "-L", "A label"), _ATTRIBUTES),
        "exfat-512": (_make(folder / "exfat-512", 24 * MIB, "-c", 512), _FRAGMENTED),
        "exfat-4k": (_make(folder / "exfat-4k", 24 * MIB + 1536, "-c", "4K"), _FRAGMENTED),
        "exfat-32k": (_make(folder / "exfat-32k", 40 * MIB, "-c", "32K"), _FRAGMENTED),
        "exfat-1m": (_make(folder / "exfat-1m", 400 * MIB, "-c", "1M"), _ATTRIBUTES),
        "exfat-packed": (_make(folder / "exfat-packed", 33 * MIB, "--pack-bitmap"), _ATTRIBUTES),
        "exfat-4096": (_make(folder / "exfat-4096", 48 * MIB, sector=4096), _FRAGMENTED),
        "exfat-times": (_make(folder / "exfat-times", 40 * MIB), _ATTRIBUTES),
    }
    _filled_by_linux(
        [path for path, _ in made.values()], tree, [script for _, script in made.values()]
    )
    images = [Image(path, "exfat") for path, _ in made.values()]
    _times(folder / "exfat-times")
    dirty = folder / "exfat-dirty"
    run("cp", "--sparse=always", folder / "exfat", dirty)
    patch(dirty, 106, b"\2")
    images.append(Image(dirty, "exfat"))
    images += make_without_appliance(folder, tree)
    return [*images, *_refused(folder, folder / "exfat")]


def make_without_appliance(folder: Path, tree: Path) -> list[Image]:
    """One image with the tree, which exfat-fuse has written, and one with nothing in it."""
    fuse = _make(folder / "exfat-fuse", 40 * MIB, "-c", "2K")
    _filled_by_fuse(fuse, tree)
    return [Image(fuse, "exfat"), Image(_make(folder / "exfat-empty", 9 * MIB), "exfat")]


def part_written(path: Path) -> None:
    """Give the file lower.txt a length past what is written of it."""

    def change(raw: bytearray) -> None:
        (size,) = struct.unpack_from("<Q", raw, ENTRY + 8)
        raw[ENTRY + 8 : ENTRY + 16] = (size - 2).to_bytes(8, "little")

    _change(path, "lower.txt", change)
