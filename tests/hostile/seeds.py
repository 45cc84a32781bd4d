"""Small sound images, made without root, and where the structures lie that are worth changing."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from imgtool.engines.direct.worker.fs import checksums
from tests.support.exfat_images import ENTRY, Exfat, Tree, boot_sum, entry_sum

MIB = 1 << 20
SECTOR = 512
Repair = Callable[[bytearray, int], None]


class Region(NamedTuple):
    """A structure: `repair` makes its checksums right again, given the image and its offset."""

    what: str
    offset: int
    length: int
    repair: Repair | None = None


class Seed(NamedTuple):
    """A sound image, its structures, and the filesystem that it is from its first byte on."""

    name: str
    content: bytes
    regions: tuple[Region, ...]
    format: str = "raw"
    filesystem: str | None = None


def crc32c(seed: int, data: bytes | bytearray) -> int:
    """As ext4 uses it."""
    return checksums.crc32c(seed, bytes(data))


def _run(*command: object, env: dict[str, str] | None = None, stdin: bytes | None = None) -> None:
    subprocess.run(
        [str(word) for word in command],
        check=True,
        capture_output=True,
        input=stdin,
        timeout=60,
        env=os.environ | {"LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1"} | (env or {}),
    )


def _tree(folder: Path) -> Path:
    """Files of every way to be stored, many names, links."""
    many = folder / "many"
    deep = folder / "one" / "two" / "three"
    many.mkdir(parents=True)
    deep.mkdir(parents=True)
    for number in range(60):
        (many / f"a file with a name of some length {number}").write_bytes(b"%d\n" % number)
    for size in (0, 1, 4097, 70_000):
        (deep / f"size-{size}").write_bytes(bytes([size % 251]) * size)
    with (folder / "sparse").open("wb") as file:
        for number in range(12):
            file.seek(number * 40_000)
            file.write(b"%d" % number * 2000)
    (folder / "short link").symlink_to("one/two")
    (folder / "long link").symlink_to("x" * 100 + "/../../../outside")
    os.link(folder / "sparse", deep / "hard link")
    os.setxattr(deep / "size-4097", "user.small", b"in the inode")
    os.setxattr(deep / "size-70000", "user.large", b"in a block" * 60)
    return folder


def _blank(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


# ext


def _ext_super(image: bytearray, at: int) -> None:
    image[at + 0x3FC : at + 0x400] = crc32c(0xFFFFFFFF, image[at : at + 0x3FC]).to_bytes(
        4, "little"
    )


def _ext_regions(image: bytes) -> Iterator[Region]:
    """Of an image with one block group."""
    block = 1024 << image[1024 + 0x18]
    (inodes,) = struct.unpack_from("<I", image, 1024)
    (inode_size,) = struct.unpack_from("<H", image, 1024 + 0x58)
    has_checksums = image[1024 + 0x65] & 4
    seed = crc32c(0xFFFFFFFF, image[1024 + 0x68 : 1024 + 0x78])
    yield Region("superblock", 1024, 1024, _ext_super if has_checksums else None)

    def group(image: bytearray, at: int) -> None:
        size = 64 if image[1024 + 0x60] & 0x80 else 32
        found = crc32c(seed, bytes(4) + image[at : at + 0x1E] + b"\0\0")
        found = crc32c(found, image[at + 0x20 : at + size])
        image[at + 0x1E : at + 0x20] = (found & 0xFFFF).to_bytes(2, "little")

    descriptors = 2048 if block == 1024 else block
    yield Region("group descriptor", descriptors, 64, group if has_checksums else None)
    (table,) = struct.unpack_from("<I", image, descriptors + 8)
    for number in range(2, inodes + 1):
        at = table * block + (number - 1) * inode_size
        (mode,) = struct.unpack_from("<H", image, at)
        if not mode or 2 < number < 8:
            continue
        own = crc32c(seed, number.to_bytes(4, "little") + image[at + 0x64 : at + 0x68])

        def inode(image: bytearray, at: int, number: int = number) -> None:
            value = bytearray(image[at : at + inode_size])
            value[0x7C:0x7E] = value[0x82:0x84] = b"\0\0"
            own = crc32c(seed, number.to_bytes(4, "little") + value[0x64:0x68])
            found = crc32c(own, value)
            image[at + 0x7C : at + 0x7E] = (found & 0xFFFF).to_bytes(2, "little")
            image[at + 0x82 : at + 0x84] = (found >> 16).to_bytes(2, "little")

        kind = "directory's inode" if mode & 0xF000 == 0x4000 else "inode"
        yield Region(kind, at, inode_size, inode if has_checksums else None)
        (attributes,) = struct.unpack_from("<I", image, at + 0x68)
        if attributes:

            def xattrs(image: bytearray, at: int) -> None:
                found = crc32c(seed, (at // block).to_bytes(8, "little") + image[at : at + 16])
                found = crc32c(found, bytes(4) + image[at + 20 : at + block])
                image[at + 16 : at + 20] = found.to_bytes(4, "little")

            whole = Region("attributes", attributes * block, block, xattrs)
            yield whole if has_checksums else whole._replace(repair=None)
        place = _ext_first_block(image, at, block)
        if not place or mode & 0xF000 not in (0x4000, 0x8000):
            continue
        if mode & 0xF000 == 0x4000:

            def directory(image: bytearray, at: int, own: int = own) -> None:
                found = crc32c(own, image[at : at + block - 12])
                image[at + block - 4 : at + block] = found.to_bytes(4, "little")

            yield Region("directory", place * block, block, directory if has_checksums else None)
        elif image[place * block : place * block + 2] == b"\x0a\xf3":

            def extents(image: bytearray, at: int, own: int = own) -> None:
                (most,) = struct.unpack_from("<H", image, at + 4)
                tail = min(12 + 12 * most, block - 4)
                found = crc32c(own, image[at : at + tail])
                image[at + tail : at + tail + 4] = found.to_bytes(4, "little")

            yield Region("extents", place * block, 200, extents if has_checksums else None)
        (indirect,) = struct.unpack_from("<I", image, at + 0x28 + 48)
        if not image[at + 0x22] & 8 and 0 < indirect * block < len(image):
            yield Region("block map", indirect * block, 256)


def _ext_first_block(image: bytes, at: int, block: int) -> int:
    """The block of an inode's first extent or of its extent tree, or its first mapped one."""
    if image[at + 0x28 : at + 0x2A] != b"\x0a\xf3":
        return int(struct.unpack_from("<I", image, at + 0x28)[0])
    depth = image[at + 0x2E]
    place = struct.unpack_from("<I", image, at + 0x28 + 12 + (4 if depth else 8))[0]
    return int(place) if place * block < len(image) else 0


def _ext(folder: Path, tree: Path, name: str, *options: object) -> Seed:
    path = folder / name
    _run("mke2fs", "-q", "-F", "-N", 128, "-d", tree, *options, path, "4M")
    content = path.read_bytes()
    return Seed(name, content, tuple(_ext_regions(content)), filesystem="ext")


# XFS

_XFS_BLOCKS = {b"XDB3": 4, b"XDD3": 4, b"XSLM": 12, b"BMA3": 64}


def _xfs_repair(crc_at: int, length: int) -> Repair:
    def repair(image: bytearray, at: int) -> None:
        image[at + crc_at : at + crc_at + 4] = bytes(4)
        found = checksums.standard_crc32c(bytes(image[at : at + length]))
        image[at + crc_at : at + crc_at + 4] = found.to_bytes(4, "little")

    return repair


def _xfs_regions(image: bytes) -> Iterator[Region]:
    (block,) = struct.unpack_from(">I", image, 4)
    (log,) = struct.unpack_from(">Q", image, 48)
    (group_blocks,) = struct.unpack_from(">I", image, 84)
    (inode_size,) = struct.unpack_from(">H", image, 104)
    has_checksums = image[101] & 15 == 5
    for sector, what, crc_at in ((0, "superblock", 224), (1, "AGF", 216), (2, "AGI", 312)):
        repair = _xfs_repair(crc_at, SECTOR) if has_checksums else None
        yield Region(what, sector * SECTOR, 280, repair)
    log_bits = image[124]
    place = (log >> log_bits) * group_blocks + (log & (1 << log_bits) - 1)
    yield Region("log", place * block, 2048)
    for at in range(block, len(image), inode_size):
        if image[at : at + 2] == b"IN" and image[at + 2 : at + 4] != b"\0\0":
            repair = _xfs_repair(100, inode_size) if has_checksums else None
            yield Region("inode", at, inode_size, repair)
        magic = image[at : at + 4]
        if at % block == 0 and magic in _XFS_BLOCKS:
            yield Region("block", at, block, _xfs_repair(_XFS_BLOCKS[magic], block))
        elif at % block == 0 and magic in (b"XD2B", b"XD2D"):
            yield Region("block", at, block)


def _xfs(folder: Path, tree: Path, name: str, *options: object) -> Seed:
    """Filled from a prototype, so that nothing has to be mounted."""
    lines = ["/", "0 0", "d--755 0 0"]

    def add(directory: Path) -> None:
        for path in sorted(directory.iterdir()):
            shown = path.name.replace(" ", "_")
            if path.is_symlink():
                lines.append(f"{shown} l--777 0 0 {os.readlink(path)}")
            elif path.is_dir():
                lines.append(f"{shown} d--755 0 0")
                add(path)
                lines.append("$")
            else:
                plain = folder / f"{name}-{len(lines)}"
                plain.write_bytes(path.read_bytes())
                lines.append(f"{shown} ---644 1 2 {plain}")

    add(tree)
    prototype = folder / f"{name}.proto"
    prototype.write_text("\n".join([*lines, "$", ""]))
    path = _blank(folder / name, 16 * MIB)
    # Below 300 MB only for its own test suite.
    environment = {"TEST_DIR": "/", "TEST_DEV": "none", "QA_CHECK_FS": "1"}
    _run("mkfs.xfs", "-q", "-f", "-p", prototype, *options, path, env=environment)
    content = path.read_bytes()
    # Kernels of today do not mount the old version: nothing to compare with.
    filesystem = "xfs" if content[101] & 15 == 5 else None
    return Seed(name, content, tuple(_xfs_regions(content)), filesystem=filesystem)


# FAT, NTFS, ISO 9660


def _fat(folder: Path, tree: Path, name: str, size: int, *options: object) -> Seed:
    path = _blank(folder / name, size)
    _run("mkfs.vfat", "-n", "LABEL", *options, path)
    for top in ("many", "one"):
        _run("mcopy", "-s", "-i", path, tree / top, "::/")
    content = path.read_bytes()
    reserved = struct.unpack_from("<H", content, 14)[0] * SECTOR
    regions = [Region("boot sector", 0, 90), Region("table", reserved, 600)]
    for at in range(0, len(content), SECTOR):
        start = content[at : at + 11]
        if start == b".          ":
            regions.append(Region("directory", at, 1024))
        elif start == b"LABEL      ":
            regions.append(Region("root", at, 256))
    return Seed(name, content, tuple(regions))


def _exfat_boot(image: bytearray, at: int) -> None:
    image[11 * SECTOR : 12 * SECTOR] = boot_sum(bytes(image[: 11 * SECTOR])) * (SECTOR // 4)


def _exfat(folder: Path, tree: Path) -> Seed:
    volume = Exfat(folder / "exfat", 4 * MIB, SECTOR)

    def files(directory: Path) -> Tree:
        return {
            path.name: files(path) if path.is_dir() else path.read_bytes()
            for path in sorted(directory.iterdir())
            if not path.is_symlink()
        }

    content = files(tree / "one/two/three")
    volume.fill({"many": files(tree / "many"), "chained": content, "sparse": bytes(40_000)})

    def directory(image: bytearray, at: int) -> None:
        """The checksums of the sets that begin in a cluster; those that go on in it are first."""
        for start in range(at, at + SECTOR, ENTRY):
            length = (image[start + 1] + 1) * ENTRY
            if image[start] == 0x85 and start + length <= at + SECTOR:
                found = entry_sum(bytes(image[start : start + length]))
                image[start + 2 : start + 4] = found.to_bytes(2, "little")

    regions = [
        Region("boot sector", 0, 120, _exfat_boot),
        Region("table", volume.table, 1024),
        Region("bitmap", volume.bitmap, 128),
        *(Region("directory", at, SECTOR, directory) for at in volume.directories),
    ]
    return Seed("exfat", bytes(volume.image), tuple(regions))


def _ntfs(folder: Path, tree: Path) -> Seed:
    path = _blank(folder / "ntfs", 4 * MIB)
    _run("mkntfs", "-q", "-Q", "-F", "-L", "label", "-c", 4096, path)
    for source in sorted((tree / "one/two/three").iterdir()):
        _run("ntfscp", path, source, source.name)
    for source in sorted((tree / "many").iterdir())[:12]:
        _run("ntfscp", path, source, source.name)
    content = path.read_bytes()
    table, mirror = (n * 4096 for n in struct.unpack_from("<QQ", content, 48))
    regions = [Region("boot sector", 0, 96)]

    def mirrored(image: bytearray, at: int) -> None:
        if table <= at < table + 4096:
            image[mirror + at - table : mirror + at - table + 1024] = image[at : at + 1024]

    for at in range(0, len(content), 1024):
        if content[at : at + 4] == b"FILE" and not mirror <= at < mirror + 4096:
            # Nothing that would be a torn write: that is another check.
            regions.append(Region("record", at, 510, mirrored))
        elif content[at : at + 4] == b"INDX":
            regions.append(Region("index", at, 510))
    return Seed("ntfs", content, tuple(regions))


def _iso(folder: Path, tree: Path) -> Seed:
    path = folder / "iso"
    (tree / "long link").unlink()
    _run("genisoimage", "-quiet", "-R", "-J", "-joliet-long", "-o", path, tree)
    content = path.read_bytes()
    regions = [Region("descriptor", block * 2048, 200) for block in (16, 17, 18)]
    for at in range(19 * 2048, len(content), 2048):
        if content[at] >= 34 and content[at + 32 : at + 34] == b"\1\0" and content[at + 25] == 2:
            regions.append(Region("directory", at, 600))
    return Seed("iso", content, tuple(regions))


# Disks


def _inner(folder: Path, tree: Path) -> bytes:
    path = folder / "inner"
    _run("mke2fs", "-q", "-F", "-t", "ext2", "-b", 1024, "-N", 64, "-d", tree / "one", path, "1M")
    return path.read_bytes()


def _mbr(folder: Path, inner: bytes) -> Seed:
    path = _blank(folder / "mbr", 8 * MIB)
    table = "label: dos\nstart=2048,size=2048,type=83\nstart=4096,size=10240,type=5\n"
    table += "start=6144,size=2048,type=83\nstart=10240,size=2048,type=83\n"
    _run("sfdisk", "--quiet", "--no-reread", path, stdin=table.encode())
    content = bytearray(path.read_bytes())
    for sector in (2048, 6144, 10240):
        content[sector * SECTOR : sector * SECTOR + len(inner)] = inner
    tables = [at for at in (0, 4096 * SECTOR, 8192 * SECTOR) if content[at + 510] == 0x55]
    return Seed("mbr", bytes(content), tuple(Region("table", at + 446, 66) for at in tables))


def _gpt_repair(image: bytearray, at: int) -> None:
    (entries,) = struct.unpack_from("<Q", image, SECTOR + 72)
    count, size = struct.unpack_from("<II", image, SECTOR + 80)
    if entries < 64 and count * size < MIB:
        found = zlib.crc32(image[entries * SECTOR : entries * SECTOR + count * size])
        image[SECTOR + 88 : SECTOR + 92] = found.to_bytes(4, "little")
    length = min(struct.unpack_from("<I", image, SECTOR + 12)[0], SECTOR)
    image[SECTOR + 16 : SECTOR + 20] = bytes(4)
    found = zlib.crc32(image[SECTOR : SECTOR + length])
    image[SECTOR + 16 : SECTOR + 20] = found.to_bytes(4, "little")


def _gpt(folder: Path, inner: bytes) -> Seed:
    path = _blank(folder / "gpt", 8 * MIB)
    table = "label: gpt\nstart=2048,size=2048\nstart=6144,size=2048,name=second\n"
    _run("sfdisk", "--quiet", "--no-reread", path, stdin=table.encode())
    content = bytearray(path.read_bytes())
    for sector in (2048, 6144):
        content[sector * SECTOR : sector * SECTOR + len(inner)] = inner
    last = len(content) - SECTOR
    regions = (
        Region("header", SECTOR, 96, _gpt_repair),
        Region("entries", 2 * SECTOR, 384, _gpt_repair),
        Region("protective MBR", 446, 66),
        Region("second header", last, 96),
    )
    return Seed("gpt", bytes(content), regions)


_LVM_TEXT = """\
group {
id = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg"
seqno = 3
format = "lvm2"
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = 128
max_lv = 0
max_pv = 0
physical_volumes {
pv0 {
id = "hhhhhh-iiii-jjjj-kkkk-llll-mmmm-nnnnnn"
device = "/dev/sda"
status = ["ALLOCATABLE"]
flags = []
dev_size = 8192
pe_start = 2048
pe_count = 40
}
}
logical_volumes {
root {
id = "oooooo-pppp-qqqq-rrrr-ssss-tttt-uuuuuu"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 2
segment1 {
start_extent = 0
extent_count = 10
type = "striped"
stripe_count = 1
stripes = ["pv0", 20]
}
segment2 {
start_extent = 10
extent_count = 6
type = "striped"
stripe_count = 1
stripes = ["pv0", 3]
}
}
}
}
contents = "Text Format Volume Group"
version = 1
"""
_LVM_CRC = 0xF597A6CF


def _lvm_crc(data: bytes | bytearray) -> bytes:
    return (zlib.crc32(data, _LVM_CRC ^ 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4, "little")


def _lvm_repair(image: bytearray, at: int) -> None:
    """The checksums of label, area and text, at the places where a sound image has them."""
    image[528:532] = _lvm_crc(image[532:1024])
    image[4096 + 56 : 4096 + 60] = _lvm_crc(image[4608 : 4608 + len(_LVM_TEXT)])
    image[4096:4100] = _lvm_crc(image[4100:4608])


def _lvm(inner: bytes) -> Seed:
    image = bytearray(4 * MIB)
    area = MIB - 4096
    uuid = b"hhhhhhiiiijjjjkkkkllllmmmmnnnnnn"
    label = struct.pack("<8sQII8s", b"LABELONE", 1, 0, 32, b"LVM2 001") + uuid
    label += struct.pack("<Q", len(image)) + struct.pack("<4Q", MIB, 0, 0, 0)
    label += struct.pack("<4Q", 4096, area, 0, 0)
    image[SECTOR : SECTOR + len(label)] = label
    head = struct.pack("<I16sIQQ", 0, b" LVM2 x[5A%r0N*>", 1, 4096, area)
    head += struct.pack("<QQII", SECTOR, len(_LVM_TEXT), 0, 0)
    image[4096 : 4096 + len(head)] = head
    image[4608 : 4608 + len(_LVM_TEXT)] = _LVM_TEXT.encode()
    _lvm_repair(image, 0)
    unit = 65536
    for start, count, at in ((0, 10, 20), (10, 6, 3)):
        piece = inner[start * unit : (start + count) * unit]
        image[MIB + at * unit : MIB + at * unit + len(piece)] = piece
    regions = (
        Region("label", SECTOR, 120, _lvm_repair),
        Region("area", 4096, 80, _lvm_repair),
        Region("text", 4608, len(_LVM_TEXT), _lvm_repair),
    )
    return Seed("lvm", bytes(image), regions)


def _qcow2(folder: Path, raw: bytes) -> Seed:
    source = folder / "for-qcow2"
    source.write_bytes(raw)
    path = folder / "qcow2"
    options = "cluster_size=4096,compat=1.1"
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
    content = path.read_bytes()
    (first,) = struct.unpack_from(">Q", content, 40)
    (counts,) = struct.unpack_from(">Q", content, 48)
    second = struct.unpack_from(">Q", content, first)[0] & 0x00FFFFFFFFFFFE00
    regions = (
        Region("header", 0, 112),
        Region("extensions", 104, 200),
        Region("L1 table", first, 32),
        Region("L2 table", second, 1024),
        Region("refcount table", counts, 32),
    )
    return Seed("qcow2", content, regions, format="qcow2")


def make_seeds(folder: Path) -> list[Seed]:
    """All of them, in an empty folder."""
    tree = _tree(folder / "tree")
    inner = _inner(folder, tree)
    ext4 = _ext(folder, tree, "ext4", "-t", "ext4", "-b", 1024, "-I", 256)
    return [
        ext4,
        _ext(folder, tree, "ext4-4k", "-t", "ext4", "-b", 4096, "-O", "^has_journal"),
        _ext(folder, tree, "ext3", "-t", "ext3", "-b", 1024, "-I", 128),
        _ext(folder, tree, "ext2", "-t", "ext2", "-b", 1024),
        _xfs(folder, tree, "xfs", "-b", "size=1024"),
        _xfs(folder, tree, "xfs-4", "-m", "crc=0", "-b", "size=4096"),
        _fat(folder, tree, "fat12", 2 * MIB, "-F", 12, "-s", 1),
        _fat(folder, tree, "fat16", 10 * MIB, "-F", 16, "-s", 1),
        _fat(folder, tree, "fat32", 34 * MIB, "-F", 32, "-s", 1),
        _ntfs(folder, tree),
        _mbr(folder, inner),
        _gpt(folder, inner),
        _lvm(inner),
        _qcow2(folder, ext4.content),
        _exfat(folder, tree),
        _iso(folder, tree),
    ]
