"""The reader of exFAT on small volumes that are written by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import PathNotFound, ReadFailed
from imgtool.engines.direct.worker.fs.exfat import directory as exfat_directory
from imgtool.engines.direct.worker.fs.exfat.boot import rotated_sum
from imgtool.engines.direct.worker.fs.exfat.directory import Upcase
from imgtool.engines.direct.worker.fs.exfat.reader import ExfatFilesystem
from imgtool.engines.direct.worker.tree import Tree
from tests.support.exfat_images import ENTRY, Exfat, boot_sum, entry_sum

_LONG = b"0123456789" * 400


class Memory:
    """A volume in memory."""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self.size = len(image)

    def read(self, offset: int, length: int) -> bytes:
        if min(offset, length) < 0 or offset + length > self.size:
            raise ReadFailed("past the end")
        return self._image[offset : offset + length]


@pytest.fixture
def volume(tmp_path: Path) -> Exfat:
    made = Exfat(tmp_path / "exfat", 4 << 20, 512)
    made.fill(
        {
            # First, so that their entries are in one cluster, whatever mkfs.exfat puts before them.
            "plain": _LONG,
            "chained file": _LONG,
            "many": {f"a file with a name of some length {n}": b"%d" % n for n in range(40)},
            "chained folder": {f"x{n}": b"" for n in range(40)},
            "Name.txt": b"name",
        }
    )
    return made


def _opened(image: bytes | bytearray) -> ExfatFilesystem:
    return ExfatFilesystem.open(Memory(bytes(image)))


def _find(volume: Exfat, name: str) -> int:
    """Where the entry set of a name is."""
    entry = b"\xc1\0" + name.encode("utf-16-le")[:30].ljust(30, b"\0")
    return volume.image.index(entry) - 2 * ENTRY


def _changed(volume: Exfat, name: str, offset: int, data: bytes) -> bytearray:
    """The image with bytes of an entry set changed, its checksum right."""
    image = bytearray(volume.image)
    at = _find(volume, name)
    end = at + (image[at + 1] + 1) * ENTRY
    image[at + offset : at + offset + len(data)] = data
    image[at + 2 : at + 4] = entry_sum(bytes(image[at:end])).to_bytes(2, "little")
    return image


def test_directories_and_files_of_several_clusters_are_read(volume: Exfat) -> None:
    found = _opened(volume.image)
    for name, count in ((b"many", 40), (b"chained folder", 40)):
        directory = found.lookup(found.root, name)
        names = dict(found.names(directory))
        assert len(names) == count
        for child in names.values():
            assert found.stat(child).mtime_ns == 1709210096 * 10**9 + 500_000_000
    for name in (b"chained file", b"plain"):
        inode = found.lookup(found.root, name)
        assert found.read(inode, 0, 10_000) == _LONG
        assert found.read(inode, 1500, 700) == _LONG[1500:2200]
        assert found.read(inode, 4000, 1) == b""


def test_space_is_counted_in_the_bitmap(volume: Exfat) -> None:
    usage = _opened(volume.image).usage()
    bits = volume.image[volume.bitmap : volume.bitmap + 512]
    assert usage.used == sum(byte.bit_count() for byte in bits) * 512
    assert usage.size == usage.used + usage.available


def test_names_are_found_in_any_case_and_with_dots_at_the_end(volume: Exfat) -> None:
    tree = Tree(_opened(volume.image))
    for path in (b"/Name.txt", b"/NAME.TXT", b"/name.txt..."):
        assert tree.lstat(path).node.size == 4
    found = _opened(volume.image)
    for name in (b"Name.tx", b"Name.txt \xff"):
        with pytest.raises(PathNotFound):
            found.lookup(found.root, name)


def test_times_have_hundredths_and_an_offset(volume: Exfat) -> None:
    for hundredths, offset, expected in (
        (0, 0x80, 1709210096_00),
        (199, 0x80, 1709210097_99),
        (50, 0x84, 1709206496_50),
        (50, 0x80 | 0x7C, 1709213696_50),
        (50, 0x04, 1709210096_50),
    ):
        image = _changed(volume, "plain", 20, bytes([0, hundredths, 0x80, offset]))
        found = _opened(image)
        node = found.stat(found.lookup(found.root, b"plain"))
        assert node.mtime_ns == expected * 10**7


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (4, b"\x60", "attributes 0x60"),
        (14, b"\0\0", "impossible time"),
        (12, b"\xff\xff", "impossible time"),
        (21, b"\xc8", "impossible time"),
        (ENTRY + 1, b"\x00", "flags 0x0"),
        (ENTRY + 8, b"\x01", "not written to its end"),
        (ENTRY + 20, b"\0\0\0\0", "outside of the volume"),
        (ENTRY + 20, b"\1\0\0\0", "outside of the volume"),
        (ENTRY + 20, b"\xff\xff\xff\xff", "outside of the volume"),
    ],
)
def test_an_odd_file_is_left_to_the_appliance(
    volume: Exfat, offset: int, data: bytes, reason: str
) -> None:
    found = _opened(_changed(volume, "plain", offset, data))
    inode = found.lookup(found.root, b"plain")
    with pytest.raises(Unsupported, match=reason):
        found.stat(inode)
    assert found.stat(found.lookup(found.root, b"Name.txt")).size == 4


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (0, b"\x87", "type 0x87"),
        (1, b"\x01", "cut off"),
        (1, b"\xff", "cut off"),
        (1, b"\x03", "odd parts"),
        (ENTRY, b"\xc1", "odd parts"),
        (ENTRY + 3, b"\x00", "odd parts"),
        (ENTRY + 3, b"\x04", "impossible"),
        (ENTRY + 4, b"\0\0", "wrong hash"),
        (2 * ENTRY + 2, b"/\0", "impossible"),
        (2 * ENTRY + 2, b"\0\xd8", "not UTF-16"),
        (2 * ENTRY + 10, b".\0", "impossible"),
    ],
)
def test_an_odd_entry_is_left_to_the_appliance(
    volume: Exfat, offset: int, data: bytes, reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        _opened(_changed(volume, "plain", offset, data))


def _boot(volume: Exfat, offset: int, data: bytes) -> bytearray:
    image = bytearray(volume.image)
    image[offset : offset + len(data)] = data
    image[11 * 512 : 12 * 512] = boot_sum(bytes(image[: 11 * 512])) * 128
    return image


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (3, b"NTFS    ", "not one of exFAT"),
        (20, b"\1", "not one of exFAT"),
        (108, b"\x08", "sectors of 2\\^8"),
        (108, b"\x0d", "sectors of 2\\^13"),
        (109, b"\x20", "clusters of 2\\^41"),
        (110, b"\0", "0 tables"),
        (104, b"\1\1", "revision 1.01"),
        (106, b"\1", "volume flags 0x1"),
        (72, b"\xff\xff\xff\xff", "outside of the volume"),
        (80, b"\1\0", "outside of the volume"),
        (84, b"\1\0", "outside of the volume"),
        (88, b"\1\0", "outside of the volume"),
        (92, b"\xff\xff\xff\xff", "outside of the volume"),
        (92, b"\0\0\0\0", "outside of the volume"),
        (96, b"\1\0\0\0", "root directory outside"),
    ],
)
def test_an_odd_boot_region_is_left_to_the_appliance(
    volume: Exfat, offset: int, data: bytes, reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        _opened(_boot(volume, offset, data))


def test_a_dirty_volume_is_read_and_a_wrong_checksum_is_not(volume: Exfat) -> None:
    image = bytearray(volume.image)
    image[106] |= 2
    assert len(list(_opened(image).names(ExfatFilesystem.root))) == 5
    image[200] ^= 1
    with pytest.raises(Unsupported, match="checksum of the boot region"):
        _opened(image)


def test_chains_in_circles_or_out_of_the_volume_end(volume: Exfat) -> None:
    at = _find(volume, "chained file") + ENTRY + 20
    (first,) = struct.unpack_from("<I", volume.image, at)
    for following in (0, 1, 0xFFFFFFF7, 0x7FFFFFFF, 0xFFFFFFFF):
        image = bytearray(volume.image)
        struct.pack_into("<I", image, volume.table + first * 4, following)
        found = _opened(image)
        inode = found.lookup(found.root, b"chained file")
        cluster = len(found.read(inode, 0, 10_000))  # what precedes the damage
        assert 0 < cluster < found.stat(inode).size
        with pytest.raises(ReadFailed):
            found.read(inode, cluster, 10_000)
    at = _find(volume, "chained folder") + ENTRY + 20
    (first,) = struct.unpack_from("<I", volume.image, at)
    image = bytearray(volume.image)
    struct.pack_into("<I", image, volume.table + first * 4, first)
    found = _opened(image)
    with pytest.raises(Unsupported, match="another size than its clusters"):
        list(found.names(found.lookup(found.root, b"chained folder")))
    struct.pack_into("<I", image, volume.table + first * 4, 0)
    found = _opened(image)
    with pytest.raises(Unsupported, match="leaves the volume"):
        list(found.names(found.lookup(found.root, b"chained folder")))


def test_file_past_the_last_cluster_is_unsupported(volume: Exfat) -> None:
    (clusters,) = struct.unpack_from("<I", volume.image, 92)
    for first, fits in ((clusters + 2 - 8, True), (clusters + 2 - 7, False)):
        image = _changed(volume, "plain", ENTRY + 20, first.to_bytes(4, "little"))
        found = _opened(image)
        inode = found.lookup(found.root, b"plain")
        if fits:
            assert len(found.read(inode, 0, 10_000)) == len(_LONG)
        else:
            with pytest.raises(Unsupported, match="outside of the volume"):
                found.stat(inode)
    for size in (len(volume.image) * 2, 1 << 62):
        both = size.to_bytes(8, "little")
        image = _changed(volume, "chained file", ENTRY + 8, both + bytes(4))
        at = _find(volume, "chained file")
        cluster = volume.image[at + ENTRY + 20 : at + ENTRY + 24]
        image[at + ENTRY + 20 : at + ENTRY + 32] = cluster + both
        end = at + (image[at + 1] + 1) * ENTRY
        image[at + 2 : at + 4] = entry_sum(bytes(image[at:end])).to_bytes(2, "little")
        found = _opened(image)
        with pytest.raises(Unsupported, match="larger than the volume"):
            found.stat(found.lookup(found.root, b"chained file"))


def test_directories_that_share_clusters_are_unsupported(volume: Exfat) -> None:
    at = _find(volume, "many")
    stream = volume.image[at + ENTRY + 20 : at + 2 * ENTRY]
    image = bytearray(_changed(volume, "chained folder", ENTRY + 20, bytes(stream)))
    at = _find(volume, "chained folder")
    image[at + ENTRY + 1] = 3
    image[at + ENTRY + 8 : at + ENTRY + 16] = stream[4:]
    end = at + (image[at + 1] + 1) * ENTRY
    image[at + 2 : at + 4] = entry_sum(bytes(image[at:end])).to_bytes(2, "little")
    found = _opened(image)
    list(found.names(found.lookup(found.root, b"many")))
    with pytest.raises(Unsupported, match="share their clusters"):
        list(found.names(found.lookup(found.root, b"chained folder")))


def test_an_upcase_table_skips_what_is_its_own_upper_case() -> None:
    packed = struct.pack("<5H", 0xFFFF, 0x61, 0x41, 0xFFFF, 0xFF9E)
    table = Upcase(packed, rotated_sum(packed, 32))
    assert table.fold("ab\u0107".encode("utf-16-le")) == "Ab\u0107".encode("utf-16-le")
    for bad in (packed[:-2], packed + b"\0\0" * 2):
        with pytest.raises(Unsupported, match="up-case"):
            Upcase(bad, rotated_sum(bad, 32))
    with pytest.raises(Unsupported, match="damaged"):
        Upcase(packed, 0)


def test_nothing_after_the_end_of_a_directory_counts() -> None:
    raw = bytearray(4 * ENTRY)
    raw[0] = raw[3 * ENTRY] = 0x85
    raw[4] = raw[3 * ENTRY + 4] = exfat_directory.DIRECTORY
    raw[ENTRY] = 0xC0
    assert exfat_directory.subdirectories(bytes(raw)) == 1
