"""Images of FAT, NTFS, ISO 9660 and exFAT with what their readers must get right."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.differential import matrix_exfat
from tests.differential.matrix import MIB, Image, patch, run, tree_of_files
from tests.unmounting import unmount


def _fat(path: Path, size: int, tree: Path, *options: object) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    run("mkfs.vfat", "-n", "A LABEL", *options, path)
    for top in sorted(tree.iterdir()):
        run("mcopy", "-m", "-s", "-i", path, top, "::/")
    run("mattrib", "-i", path, "+r", "::/UPPER.TXT")
    run("mattrib", "-i", path, "+h", "+s", "::/Mixed.Txt")
    run("mdel", "-i", path, "::/deleted one.txt", "::/DELETED.TXT")
    for name in ("BOTHCASE.TXT", "BASECASE.TXT", "EXTCASE.TXT"):
        run("mcopy", "-i", path, tree / "lower.txt", f"::/{name}")
    with path.open("r+b") as file:
        raw = file.read(16 * MIB)
        for short, bits in ((b"BOTHCASETXT", 24), (b"BASECASETXT", 8), (b"EXTCASE TXT", 16)):
            file.seek(raw.index(short) + 12)
            file.write(bytes([bits]))


def _entry_after_the_end(path: Path) -> None:
    """A whole entry, of an empty file, behind zeros in the root directory: the kernel lists it."""
    raw = path.read_bytes()
    entry = raw.index(b"BOTHCASETXT")
    last = entry
    while raw[last]:
        last += 32
    # Without clusters: two entries of one chain would be damage.
    patch(path, last + 96, b"BEHIND  TXT" + raw[entry + 11 : entry + 26] + bytes(6))


def _ntfs(path: Path, size: int, fill: Callable[[Path], None], *options: object) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    run("mkntfs", "-q", "-Q", "-F", "-L", "A label", *options, path)
    mounted = path.with_suffix(".mounted")
    mounted.mkdir()
    run("ntfs-3g", "-o", "compression,streams_interface=xattr", path, mounted)
    try:
        fill(mounted)
    finally:
        unmount(mounted)
        mounted.rmdir()


def _attributes(path: Path, flags: int) -> None:
    os.setxattr(path, "system.ntfs_attrib_be", flags.to_bytes(4, "big"), follow_symlinks=False)


def _special(mounted: Path) -> None:
    """Compressed and sparse files, streams, DOS names, hard links, links and other kinds."""
    packed = mounted / "packed"
    packed.mkdir()
    _attributes(packed, 0x800)
    noise = random.Random(3)
    (packed / "text").write_bytes(b"hello world, this is a line of text\n" * 20_000)
    (packed / "words").write_bytes(
        b" ".join(noise.choice((b"one", b"two", b"three", b"four")) for _ in range(60_000))
    )
    mixed = b"abc" * 40_000 + noise.randbytes(100_000) + bytes(200_000) + b"x"
    (packed / "mixed").write_bytes(mixed)
    for name, at in (("holes", 500_000), ("far", 5_000_000)):
        with (packed / name).open("wb") as file:
            file.truncate(at)
        with (mounted / name).open("wb") as file:
            file.write(b"a" * 70_000)
            file.seek(at)
            file.write(b"end")
    plain = mounted / "plain"
    plain.write_bytes(b"content")
    os.setxattr(plain, "user.stream", b"a stream of its own")
    os.link(plain, mounted / "hard link")
    os.symlink("packed/żółw", mounted / "link")
    os.symlink("/abs", mounted / "absolute")
    os.mkfifo(mounted / "fifo")
    for name, size, flags in (("s0", 0, 4), ("s1", 1, 4), ("h0", 0, 6), ("s9", 9, 4), ("ro", 3, 1)):
        (mounted / name).write_bytes(b"z" * size)
        _attributes(mounted / name, flags)
    (mounted / "LongFileName.txt").write_bytes(b"dos")
    os.setxattr(mounted / "LongFileName.txt", "system.ntfs_dos_name", b"LONGFI~1.TXT")
    (mounted / "old").write_bytes(b"")
    os.utime(mounted / "old", ns=(-(10**18), -(10**18) - 500))


def _fragmented(mounted: Path) -> None:
    """Files in so many pieces that their run lists need further records; and gaps in an index."""
    noise = random.Random(5)
    with (mounted / "left").open("wb") as left, (mounted / "right").open("wb") as right:
        for number in range(1200):
            for file in (left, right):
                file.write(noise.randbytes(512 + number % 7))
                file.flush()
    many = mounted / "many"
    many.mkdir()
    for number in range(1500):
        (many / f"file with a long name {number}").write_bytes(b"%d" % number)
    for number in range(0, 1500, 3):
        (many / f"file with a long name {number}").unlink()


def _copy(tree: Path) -> Callable[[Path], None]:
    return lambda mounted: run("cp", "-r", "--preserve=timestamps", f"{tree}/.", mounted)


def make_images(folder: Path) -> Sequence[Image]:
    """All of them, in an empty folder. Linux in the appliance writes to those of exFAT."""
    return [*make_without_appliance(folder), *matrix_exfat.make_images(folder)]


def make_without_appliance(folder: Path) -> list[Image]:
    """Those of FAT, NTFS and ISO 9660, in an empty folder."""
    tree = tree_of_files(folder / "tree", 60)
    made: list[Image] = []
    for name, size, options in (
        ("fat12", 4 * MIB, ("-F", 12)),
        ("fat12-behind", 4 * MIB, ("-F", 12, "-s", 4)),
        ("fat12-one-table", 4 * MIB, ("-F", 12, "-f", 1, "-s", 8)),
        ("fat16", 32 * MIB, ("-F", 16)),
        ("fat16-dirty", 16 * MIB, ("-F", 16, "-s", 4)),
        ("fat32", 40 * MIB, ("-F", 32, "-s", 1)),
        ("fat32-16k", 1100 * MIB, ("-F", 32, "-s", 32)),
        ("fat32-32k", 2200 * MIB, ("-F", 32, "-s", 64)),
        ("fat32-4096", 300 * MIB, ("-F", 32, "-S", 4096, "-s", 1)),
    ):
        _fat(folder / name, size, tree, *options)
        made.append(Image(folder / name, "vfat"))
    _entry_after_the_end(folder / "fat12-behind")
    patch(folder / "fat16-dirty", 37, b"\1")
    for name, size, fill, cluster in (
        ("ntfs", 24 * MIB, _copy(tree), ()),
        ("ntfs-64k", 32 * MIB, _copy(tree), ("-c", 65536)),
        ("ntfs-special", 24 * MIB, _special, ()),
        ("ntfs-fragmented", 24 * MIB, _fragmented, ("-c", 512)),
        ("ntfs-empty", 16 * MIB, lambda mounted: None, ()),
    ):
        _ntfs(folder / name, size, fill, *cluster)
        made.append(Image(folder / name, "ntfs"))
    rocky = tree_of_files(folder / "rocky", 60)
    os.symlink("one/two", rocky / "link")
    os.symlink("/usr/../x/./y", rocky / "absolute")
    os.link(rocky / "lower.txt", rocky / "hard link")
    os.mkfifo(rocky / "fifo")
    (rocky / "UPPER.TXT").chmod(0o4751)
    os.chown(rocky / "UPPER.TXT", 1234, 5678)
    for name, kind in (
        ("iso-plain", ("-iso-level", 1)),
        ("iso-level-3", ("-iso-level", 3)),
        ("iso-joliet", ("-J", "-joliet-long")),
        ("iso-rock", ("-R",)),
        ("iso-rock-joliet", ("-r", "-J", "-joliet-long")),
    ):
        run("genisoimage", "-quiet", *kind, "-o", folder / name, rocky)
        made.append(Image(folder / name, "iso9660"))
    run("xorriso", "-as", "mkisofs", "-R", "-J", "-o", folder / "iso-xorriso", rocky)
    made.append(Image(folder / "iso-xorriso", "iso9660"))
    return made
