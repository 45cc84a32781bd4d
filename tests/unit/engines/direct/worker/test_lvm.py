"""LVM's metadata: what is linear and complete is mapped, all else is left to the appliance."""

from __future__ import annotations

import struct
import zlib

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker import lvm
from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.lvm import Extent, volume_groups

UUIDS = [f"{n}" * 32 for n in "abc"]
AREA, AREA_SIZE = 4096, 1 << 20
EXTENT = 4 << 20

LINEAR = """
debian-vg {
id = "VGIDVG-VGID-VGID-VGID-VGID-VGID-VGIDVG"
seqno = 3
format = "lvm2" # informational
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = 8192
physical_volumes {
pv0 {
id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
device = "/dev/vda \\"quoted\\" {"
status = ["ALLOCATABLE"]
flags = []
dev_size = 90112
pe_start = 2048
pe_count = 10
}
pv1 {
id = "bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb"
status = ["ALLOCATABLE"]
flags = []
pe_start = 4096
pe_count = 20
}
}
logical_volumes {
root {
id = "LVIDLV-LVID-LVID-LVID-LVID-LVID-LVIDLV"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 2
segment1 {
start_extent = 0
extent_count = 4
type = "striped"
stripe_count = 1
stripes = [
"pv0", 2
]
}
segment2 {
start_extent = 4
extent_count = 3
type = "striped"
stripe_count = 1
stripes = [
"pv1", 0
]
}
}
}
}
contents = "Text Format Volume Group"
version = 1
"""


def crc(data: bytes) -> int:
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


class Memory:
    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > len(self.data):
            raise ReadFailed("past the end")
        return self.data[offset : offset + length]


def physical(uuid: str, text: str, *, at: int = 512) -> Memory:
    """A physical volume with this metadata, which begins at `at` in the area and may wrap."""
    disk = bytearray(AREA + AREA_SIZE)
    header = uuid.encode() + struct.pack("<Q", len(disk))
    header += struct.pack("<QQQQ", AREA + AREA_SIZE, 0, 0, 0)
    header += struct.pack("<QQQQ", AREA, AREA_SIZE, 0, 0)
    tail = (struct.pack("<I8s", 32, b"LVM2 001") + header).ljust(492, b"\0")
    disk[512:1024] = struct.pack("<8sQI", b"LABELONE", 1, crc(tail)) + tail
    raw = text.encode() + b"\0"
    area = struct.pack("<16sIQQ", b" LVM2 x[5A%r0N*>", 1, AREA, AREA_SIZE)
    area += struct.pack("<QQII", at, len(raw), crc(raw), 0)
    area = area.ljust(508, b"\0")
    disk[AREA : AREA + 512] = struct.pack("<I", crc(area)) + area
    first = min(len(raw), AREA_SIZE - at)
    disk[AREA + at : AREA + at + first] = raw[:first]
    disk[AREA + 512 : AREA + 512 + len(raw) - first] = raw[first:]
    return Memory(bytes(disk))


def both(text: str, second: str | None = None) -> list[tuple[str, Memory]]:
    return [
        ("/dev/sda1", physical(UUIDS[0], text)),
        ("/dev/sdb", physical(UUIDS[1], text if second is None else second)),
    ]


def test_a_volume_on_two_disks_is_mapped_piece_by_piece() -> None:
    (group,) = volume_groups(both(LINEAR))
    assert group.name == "debian-vg"
    assert group.size == 30 * EXTENT
    assert [(p.device, p.size) for p in group.physical] == [
        ("/dev/sda1", 10 * EXTENT),
        ("/dev/sdb", 20 * EXTENT),
    ]
    (volume,) = group.logical
    assert volume.size == 7 * EXTENT
    assert volume.extents == (
        Extent(0, 4 * EXTENT, "/dev/sda1", (1 << 20) + 2 * EXTENT),
        Extent(4 * EXTENT, 3 * EXTENT, "/dev/sdb", 2 << 20),
    )


def test_the_newest_metadata_counts() -> None:
    older = LINEAR.replace("seqno = 3", "seqno = 2").replace("root {", "old {")
    (group,) = volume_groups(both(LINEAR, older))
    assert [volume.name for volume in group.logical] == ["root"]


def test_metadata_that_wraps_round_its_area_is_read_whole() -> None:
    wrapped = physical(UUIDS[0], LINEAR, at=AREA_SIZE - 100)
    (group,) = volume_groups([("/dev/sda1", wrapped), both(LINEAR)[1]])
    assert group.logical[0].name == "root"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('type = "striped"', 'type = "raid1"', "not linear"),
        ("stripe_count = 1", "stripe_count = 2", "not linear"),
        ('"WRITE", "VISIBLE"', '"WRITE"', "more than linear"),
        ("flags = []\nsegment_count", 'flags = ["ACTIVATION_SKIP"]\nsegment_count', "more than"),
        ('"RESIZEABLE"', '"EXPORTED"', "exported"),
        ("bbbbbb-bbbb", "cccccc-bbbb", "missing"),
    ],
)
def test_what_is_not_linear_and_complete_is_refused(old: str, new: str, reason: str) -> None:
    assert old in LINEAR
    with pytest.raises(Unsupported, match=reason):
        volume_groups(both(LINEAR.replace(old, new)))


def test_a_disk_of_the_group_that_is_not_given_is_missed() -> None:
    with pytest.raises(Unsupported, match="missing"):
        volume_groups(both(LINEAR)[:1])


def test_groups_of_one_name_and_disks_of_one_uuid_are_refused() -> None:
    other = LINEAR.replace("VGIDVG-VGID", "OTHERS-VGID")
    with pytest.raises(Unsupported, match="have the name"):
        volume_groups(both(LINEAR, other))
    first = both(LINEAR)[0]
    with pytest.raises(Unsupported, match="have the UUID"):
        volume_groups([first, ("/dev/sdc", first[1])])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("extent_count = 4", "extent_count = 40"),
        # A word where a section belongs
        ("physical_volumes {", 'physical_volumes {\npv2 = "x"'),
        ("logical_volumes {", "logical_volumes {\nhome = 5"),
        ("logical_volumes {", 'logical_volumes {\nhome = ["x"]'),
        ("start_extent = 4", "start_extent = 3"),
        ("extent_size = 8192", "extent_size = 0"),
        ('"pv1", 0', '"pv9", 0'),
        ('"pv1", 0', '"pv1", -5'),
        ("segment_count = 2", "segment_count = 900000000"),
        ("logical_volumes {", "logical_volumes = 5"),
        ("logical_volumes {", "logical_volumes {" * 30),
        ("}\n}\n}", ""),
        ("seqno = 3", "seqno = "),
        ("seqno = 3", "\xff"),
    ],
)
def test_damaged_metadata_is_damage(old: str, new: str) -> None:
    assert old in LINEAR
    with pytest.raises((ReadFailed, Unsupported)):
        volume_groups(both(LINEAR.replace(old, new)))


@pytest.mark.parametrize("at", [520, 530, AREA + 10, AREA + 600])
def test_a_flipped_byte_is_noticed(at: int) -> None:
    image = bytearray(both(LINEAR)[0][1].data)
    image[at] ^= 1
    with pytest.raises(ReadFailed):
        volume_groups([("/dev/sda1", Memory(bytes(image)))])


def test_a_text_is_parsed_into_sections_values_and_arrays() -> None:
    assert lvm.parse_text('a { b = 1 c = "x\\"y" } # note\nd = [1, "two"]') == {
        "a": {"b": 1, "c": 'x"y'},
        "d": [1, "two"],
    }
