"""Names of devices in fstab: those that can be told lead to the device, the others are said."""

from __future__ import annotations

import time
from typing import Any

import pytest

from imgtool.errors import NotInGuestError
from imgtool.formats.fstab import parse_fstab
from imgtool.guest.blocks import Block
from imgtool.guest.device_names import DeviceNames, parse_crypttab
from imgtool.guest.layout import discover
from imgtool.guest.model import Device
from tests.unit.guest.test_layout import FakeGuest, linux, mounts

GROUP, ROOT, HOME = "G" * 32, "R" * 32, "H" * 32
LUKS = "99999999-2222-3333-4444-555555555555"

BLOCKS = (
    Block("/dev/sda", "device", 1),
    Block("/dev/sda1", "partition", 1, "vfat", "EFI", "ABCD-1234", "aa-01", "EFI system"),
    Block("/dev/sda2", "partition", 1, "LVM2_member", uuid="pv"),
    Block("/dev/sda3", "partition", 1, "ext4", "my disk", "0a-b", "AA-03", "a/b\\c"),
    Block("/dev/sda4", "partition", 1, "crypto_LUKS", uuid=LUKS),
    Block("/dev/md127", "md", 1, "xfs"),
    Block("/dev/u-vg/root", "lv", 1, "ext4", dm_uuid=GROUP + ROOT),
    Block("/dev/u-vg/home", "lv", 1, "ext4", dm_uuid=GROUP + HOME),
    Block("/dev/mapper/imgtool-luks0", "mapped", 1, "ext4", parents=("/dev/sda4",)),
)
FILESYSTEMS = [
    Device("filesystem", block.device, block.type)
    for block in BLOCKS
    if block.type not in (None, "LVM2_member", "crypto_LUKS")
]
CRYPTTAB = parse_crypttab(b"# name device\n\ncr_data UUID=" + LUKS.encode() + b" none luks\n")
NAMES = DeviceNames(FILESYSTEMS, BLOCKS, CRYPTTAB)


def device_of(names: DeviceNames, spec: str) -> str | None:
    found = names.find(spec)
    return None if found is None else found.device


@pytest.mark.parametrize(
    ("spec", "device"),
    [
        (f"/dev/disk/by-id/dm-uuid-LVM-{GROUP}{HOME}", "/dev/u-vg/home"),
        ("/dev/disk/by-id/dm-name-u--vg-home", "/dev/u-vg/home"),
        ("/dev/mapper/u--vg-home", "/dev/u-vg/home"),
        ("/dev/u-vg/home", "/dev/u-vg/home"),
        (r"/dev/disk/by-label/my\x20disk", "/dev/sda3"),
        ("/dev/disk/by-label/my disk", "/dev/sda3"),
        ("LABEL=my disk", "/dev/sda3"),
        ('LABEL="my disk"', "/dev/sda3"),
        (r"/dev/disk/by-partlabel/EFI\x20system", "/dev/sda1"),
        (r"/dev/disk/by-partlabel/a\x2fb\x5cc", "/dev/sda3"),
        ("PARTLABEL=EFI system", "/dev/sda1"),
        ("/dev/disk/by-partuuid/aa-03", "/dev/sda3"),
        ("PARTUUID=AA-01", "/dev/sda1"),
        ("UUID=abcd-1234", "/dev/sda1"),
        ("/dev/disk/by-uuid/0a-b", "/dev/sda3"),
        ("/dev/disk/by-id/ata-QEMU_HARDDISK_QM00001-part3", "/dev/sda3"),
        ("/dev/disk/by-path/pci-0000:00:04.0-part3", "/dev/sda3"),
        ("ID=virtio-serial-part3", "/dev/sda3"),
        ("/dev/vda3", "/dev/sda3"),
        ("/dev/nvme0n1p3", "/dev/sda3"),
        ("/dev/md/root", "/dev/md127"),
        ("/dev/disk/by-id/md-uuid-1:2:3:4", "/dev/md127"),
        ("/dev/mapper/cr_data", "/dev/mapper/imgtool-luks0"),
        ("/dev/disk/by-id/dm-name-cr_data", "/dev/mapper/imgtool-luks0"),
        (f"/dev/disk/by-id/dm-uuid-CRYPT-LUKS2-{LUKS.replace('-', '')}-x", None),
        # What is there, and is no filesystem; what is nowhere
        ("/dev/sda2", None),
        ("UUID=pv", None),
        (f"/dev/disk/by-id/dm-uuid-LVM-{GROUP}{'X' * 32}", None),
        ("/dev/disk/by-id/ata-x-part9", None),
        (r"/dev/disk/by-label/\xff", None),
        ("LABEL=", None),
    ],
)
def test_a_name_leads_to_its_device(spec, device):
    if "CRYPT" in spec:
        device = "/dev/mapper/imgtool-luks0"
    assert device_of(NAMES, spec) == device


def test_a_name_of_hardware_is_told_by_the_roots_own_name():
    blocks = [
        Block(name, "device" if name[-1].isalpha() else "partition", 1, "ext4")
        for name in ("/dev/sda", "/dev/sda1", "/dev/sdb", "/dev/sdb1", "/dev/sdb2")
    ]
    names = DeviceNames([Device("filesystem", b.device, b.type) for b in blocks], blocks)
    stem = "/dev/disk/by-id/scsi-0QEMU_"
    assert device_of(names, f"{stem}b-part2") is None
    names.learn(f"{stem}b-part1", "/dev/sdb1")
    assert device_of(names, f"{stem}b-part2") == "/dev/sdb2"
    assert device_of(names, f"{stem}a-part1") is None


BY_ID = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_drive-scsi"
BY_PATH = "/dev/disk/by-path/pci-0000:00:04.0-scsi-0:0:"


@pytest.mark.parametrize(
    "fstab",
    [
        # The root is told by its UUID, and nothing else tells which disk a name means.
        f"UUID=b007 / ext4\n{BY_ID}1-part1 /data ext4\n",
        f"UUID=b007 / ext4\n{BY_PATH}1:0-part1 /data ext4\n",
        "UUID=b007 / ext4\n/dev/sda1 /data ext4\n",
        f"{BY_ID}1-part1 /data ext4\n",
        # What another line names already
        f"UUID=b007 / ext4\nUUID=da7a /srv ext4\n{BY_ID}1-part2 /data ext4\n",
        f"UUID=b007 / ext4\n{BY_ID}1-part2 /data ext4\nUUID=da7a /srv ext4\n",
        f"UUID=b007 / ext4\n/dev/vda2 /srv ext4\n{BY_ID}1-part2 /data ext4\n",
        # Two disks, of which one is given
        f"{BY_ID}0-part1 / ext4\n{BY_ID}1-part2 /data ext4\n",
        f"{BY_PATH}0:0-part1 / ext4\n{BY_PATH}1:0-part2 /data ext4\n",
        f"UUID=b007 / ext4\n{BY_ID}0-part2 /data ext4\n{BY_ID}1-part3 /data ext4\n",
        "/dev/sdb1 / ext4\n/dev/sda2 /data ext4\n",
        # What is encrypted would look like it.
        "/dev/mapper/cr /data ext4\n",
    ],
)
def test_name_of_an_absent_disk_is_not_that_of_the_one_given(fstab):
    crypttab = f"cr {BY_ID}1-part2 none luks\n".encode()
    guest = FakeGuest(
        {
            "/dev/sda1": ("ext4", {**linux(fstab), "/etc/crypttab": crypttab}),
            "/dev/sda2": ("ext4", {}),
        },
        ids={("uuid", "b007"): "/dev/sda1", ("uuid", "da7a"): "/dev/sda2"},
    )
    layout = discover(guest)
    assert "/data" not in {mount.mountpoint for mount in layout.mounts}
    assert "/data" in layout.missed


@pytest.mark.parametrize(
    "name", [f"{BY_ID}1", f"{BY_PATH}1:0", "/dev/sda", "/dev/disk/by-id/dm-name-v-w"]
)
def test_a_disk_without_partitions_is_not_another_disk_either(name):
    fstab = f"UUID=b007 / ext4\n{name} /data ext4\n/dev/disk/by-id/dm-name-v-gone /srv ext4\n"
    guest = FakeGuest({"/dev/sda": ("ext4", linux(fstab))}, ids={("uuid", "b007"): "/dev/sda"})
    assert mounts(guest) == {"/": "/dev/sda"}


def test_name_may_be_mounted_twice_and_a_subvolume_by_any():
    fstab = f"LABEL=r / btrfs subvol=@\n{BY_ID}0-part1 /home btrfs subvol=@home\n" + "".join(
        f"{BY_ID}0-part2 {at} ext4\n" for at in ("/one", "/two")
    )
    root = "btrfsvol:/dev/sda1/@"
    guest = FakeGuest(
        {"/dev/sda1": ("btrfs", {}), root: ("btrfs", linux(fstab)), "/dev/sda2": ("ext4", {})},
        ids={("label", "r"): "/dev/sda1"},
    )
    assert mounts(guest) == {
        "/": root,
        "/home": "btrfsvol:/dev/sda1/@home",
        "/one": "/dev/sda2",
        "/two": "/dev/sda2",
    }


def test_quoted_blanks_are_part_of_a_label():
    entries, problems = parse_fstab(b'LABEL="my disk" /x ext4 defaults 0 0\nLABEL=a\\040b /y xfs\n')
    assert [(one.spec, one.mountpoint) for one in entries] == [
        ('LABEL="my disk"', "/x"),
        ("LABEL=a b", "/y"),
    ]
    assert problems == ()


def test_what_cannot_be_told_is_said_once_with_what_to_type():
    fstab = (
        "UUID=gone /home ext4 defaults 0 2\nUUID=x /media/usb ext4 nofail 0 0\n"
        "UUID=b007 /boot ext4 defaults 0 2\nUUID=y /mnt ext4 noauto 0 0\n"
    )
    guest = FakeGuest(
        {"/dev/sda1": ("ext4", linux(fstab)), "/dev/sda2": ("ext4", {}), "/dev/sda3": ("xfs", {})},
        ids={("uuid", "b007"): "/dev/sda2"},
    )
    layout = discover(guest)
    assert layout.problems == (
        "/home is not shown: UUID=gone is on none of the disks given",
        "to show /home all the same, say what is where: "
        "-m /dev/sda1 -m /dev/sda2:/boot -m /dev/sda3:/home",
    )
    assert [(one.mountpoint, one.needed) for one in layout.unshown] == [
        ("/home", True),
        ("/media/usb", True),
        ("/mnt", False),
    ]
    # Nobody misses a stick, but what lies in its folder is hidden as soon as it is there.
    assert set(layout.missed) == {"/home", "/media/usb"}
    assert layout.optional == {"/media/usb"}


def test_a_thousand_lines_that_say_nothing_are_a_few_words():
    fstab = "".join(f"UUID={n} /m{n} ext4 defaults 0 2\n" for n in range(1000))
    layout = discover(FakeGuest({"/dev/sda1": ("ext4", linux(fstab))}))
    assert len(layout.problems) == 11
    assert "990 more" in layout.problems[-1]


@pytest.mark.parametrize(("length", "missed"), [(4000, 1), (50000, 0)])
def test_long_line_of_fstab_is_said_in_a_few_words(length, missed):
    fstab = f"UUID={'x' * length} /{'y' * length} ext4 defaults 0 2\n"
    layout = discover(FakeGuest({"/dev/sda1": ("ext4", linux(fstab)), "/dev/sda2": ("xfs", {})}))
    assert len(layout.missed) == missed
    assert 20 < sum(map(len, layout.problems)) < 1000


def test_a_mount_point_with_a_nul_is_none():
    entries, problems = parse_fstab(b"LABEL=a /a\\000b ext4\nLABEL=b /b ext4\n")
    assert [one.mountpoint for one in entries] == ["/b"]
    assert problems == ("fstab line 1 has a mount point that is no path",)


def test_what_a_missing_key_hides_is_said_with_the_key_to_type():
    guest = FakeGuest(
        {
            "/dev/sda1": (
                "ext4",
                {
                    **linux("/dev/mapper/cr_home /home ext4 defaults 0 2\n"),
                    "/etc/crypttab": f"cr_home UUID={LUKS} none luks\n".encode(),
                },
            ),
            "/dev/sda2": ("crypto_LUKS", None),
        },
        ids={("uuid", LUKS): "/dev/sda2"},
    )
    (line,) = discover(guest).problems
    assert line == (
        "/home is not shown: /dev/sda2 is encrypted, and no key opens it "
        "(--key /dev/sda2:file:FILE)"
    )


@pytest.mark.parametrize("spec", ["/dev/mapper/vg-home", "UUID=gone", "/dev/vg/home"])
def test_locked_device_may_hold_what_is_not_found(spec):
    fstab = f"{spec} /home ext4 defaults 0 2\n"
    filesystems = {"/dev/sda1": ("ext4", linux(fstab)), "/dev/sda2": ("crypto_LUKS", None)}
    (line,) = discover(FakeGuest(filesystems)).problems
    assert line == (
        f"/home is not shown: {spec} is on none of the disks given, or in /dev/sda2, which is "
        "encrypted (--key /dev/sda2:file:FILE)"
    )
    many = {f"/dev/sda{n}": ("crypto_LUKS", None) for n in range(2, 40)}
    (line,) = discover(FakeGuest({**filesystems, **many})).problems
    assert "or in /dev/sda2, /dev/sda3, " in line and " more, which are encrypted" in line
    opened = {**filesystems, "/dev/mapper/x": ("ext4", {})}
    guest = FakeGuest(opened, parents={"/dev/mapper/x": ["/dev/sda2"]})
    assert not any("encrypted" in line for line in discover(guest).problems)


@pytest.mark.parametrize("kind", ["crypto_LUKS", "BitLocker"])
def test_open_boot_is_not_the_guest_whose_root_is_locked(kind):
    filesystems = {"/dev/sda1": ("ext4", {"/vmlinuz": b"k"}), "/dev/sda2": (kind, None)}
    with pytest.raises(NotInGuestError) as caught:
        discover(FakeGuest(filesystems))
    assert "encrypted" in caught.value.message
    assert "--key /dev/sda2:file:FILE" in str(caught.value.hint)
    assert "-m /dev/sda1" in str(caught.value.hint)
    opened = FakeGuest(
        {**filesystems, "/dev/mapper/x": ("ext4", linux())},
        parents={"/dev/mapper/x": ["/dev/sda2"]},
    )
    assert mounts(opened) == {"/": "/dev/mapper/x"}


# What is ambiguous, and what only looks like a name


def guest_with(fstab: str, *names: str, **more) -> FakeGuest:
    disks = more.pop("disks", ("/dev/sda", "/dev/sdb"))
    filesystems: dict[str, Any] = {"/dev/sda1": ("ext4", linux(f"UUID=b007 / ext4\n{fstab}"))}
    filesystems |= {name: ("ext4", {}) for name in names}
    ids = {("uuid", "b007"): "/dev/sda1", **more.pop("ids", {})}
    return FakeGuest(filesystems, disks=disks, ids=ids, **more)


def named_blocks(*blocks: Block, **options) -> DeviceNames:
    filesystems = [Device("filesystem", block.device, block.type) for block in blocks]
    return DeviceNames(filesystems, blocks, **options)


def disk(name: str, *parts: int) -> list[Block]:
    """A disk with partitions of these numbers."""
    return [
        Block(name, "device", 1),
        *(Block(f"{name}{n}", "partition", 1, "ext4", parents=(name,)) for n in parts),
    ]


@pytest.mark.parametrize("tag", ["UUID=A-B", "LABEL=data", "PARTUUID=a-b", "PARTLABEL=data"])
def test_name_that_two_filesystems_have_leads_to_neither(tag):
    kind, value = tag.lower().split("=")
    blocks = [Block(f"/dev/sd{n}1", "partition", 1, "ext4", **{kind: value}) for n in "ab"]
    names = named_blocks(*blocks)
    for spec in (tag, f"/dev/disk/by-{kind}/{value}"):
        assert names.find(spec) is None
        assert names.several(spec) == ["/dev/sda1", "/dev/sdb1"]
    assert named_blocks(blocks[0]).find(tag) is not None
    assert named_blocks(blocks[0]).several(tag) == []


def test_the_line_about_a_name_that_two_have_names_both():
    guest = guest_with("LABEL=data /data ext4\n", "/dev/sda2", "/dev/sdb1")
    guest.blocks = lambda: [  # type: ignore[method-assign]
        Block("/dev/sda1", "partition", 1, "ext4", uuid="b007"),
        Block("/dev/sda2", "partition", 1, "ext4", label="data"),
        Block("/dev/sdb1", "partition", 1, "ext4", label="data"),
    ]
    layout = discover(guest)
    assert {mount.mountpoint for mount in layout.mounts} == {"/"}
    assert layout.problems[0] == (
        "/data is not shown: LABEL=data may be each of these: /dev/sda2, /dev/sdb1"
    )


def test_what_is_one_filesystem_under_two_names_is_no_two():
    cd = Block("/dev/sda", "device", 1, "iso9660", "CD", "u")
    part = Block("/dev/sda1", "partition", 1, "iso9660", "CD", "u", parents=("/dev/sda",))
    assert device_of(named_blocks(cd, part), "LABEL=CD") == "/dev/sda"
    btrfs = [Block(f"/dev/sd{n}", "device", 1, "btrfs", "b", "u") for n in "ab"]
    assert device_of(named_blocks(*btrfs), "UUID=u") == "/dev/sda"
    luks = Block("/dev/sda2", "partition", 1, "crypto_LUKS", "x", "l")
    inside = Block("/dev/mapper/imgtool-luks0", "mapped", 1, "ext4", "x", parents=("/dev/sda2",))
    assert device_of(named_blocks(luks, inside), "LABEL=x") == "/dev/mapper/imgtool-luks0"


def test_names_with_lost_bytes_are_not_the_same():
    blocks = [Block("/dev/sda1", "partition", 1, "ext4", label="a\ufffd")]
    assert named_blocks(*blocks).find("LABEL=a\ufffd") is None
    assert named_blocks(*blocks).find(r"/dev/disk/by-label/a\xff") is None


@pytest.mark.parametrize(
    "spec",
    [
        # One dash in a name of LVM's is doubled: this is the name of something else.
        "/dev/mapper/vg-home-old",
        "/dev/disk/by-id/dm-name-vg-home-old",
        # A group whose name begins like an array's
        "/dev/mdgone/home",
        # A partition of what has none of this number, or of no array
        "/dev/md0p7",
        # What the kernel takes for another file
        "/dev/sda1\n",
        "/dev/vg/home-old\n",
        # A name of imgtool's
        "/dev/mapper/imgtool-luks0",
    ],
)
def test_what_only_looks_like_a_name_is_none(spec):
    names = named_blocks(
        *disk("/dev/sda", 1),
        Block("/dev/sda4", "partition", 1, "crypto_LUKS"),
        Block("/dev/mapper/imgtool-luks0", "mapped", 1, "ext4", parents=("/dev/sda4",)),
        Block("/dev/vg/home-old", "lv", 1, "ext4"),
        Block("/dev/md127", "md", 1, "ext4"),
        Block("/dev/md127p1", "partition", 1, "ext4", parents=("/dev/md127",)),
    )
    assert names.find(spec) is None
    assert device_of(names, "/dev/mapper/vg-home--old") == "/dev/vg/home-old"
    assert device_of(names, "/dev/md0p1") == "/dev/md127p1"


def test_a_crypt_device_is_that_of_something_encrypted():
    uuid = "99999999222233334444555555555555"
    plain = Block("/dev/sda1", "partition", 1, "ext4", uuid=LUKS)
    assert named_blocks(plain).find(f"/dev/disk/by-id/dm-uuid-CRYPT-LUKS2-{uuid}-x") is None


def test_of_several_arrays_the_number_tells_nothing():
    arrays = [Block(f"/dev/md{n}", "md", 1, "ext4") for n in (126, 127)]
    names = named_blocks(*arrays)
    for spec in ("/dev/md127", "/dev/md/data", "/dev/disk/by-id/md-uuid-1:2:3:4"):
        assert names.find(spec) is None
        assert names.several(spec) == ["/dev/md126", "/dev/md127"]
    assert names.find("/dev/mdvg/root") is None and names.several("/dev/mdvg/root") == []


def test_the_27th_disk_has_its_place_too():
    letters = [chr(97 + n) for n in range(26)]
    disks = [f"/dev/sd{one}" for one in [*letters, "aa", "ab"]]
    names = named_blocks(*(block for name in disks for block in disk(name, 1)))
    found = names.find("/dev/vdab1")
    assert found is not None and found.guessed and found.device == "/dev/sdab1"
    found = names.find("/dev/sdaa1")
    assert found is not None and found.guessed


ATA, VIRTIO = "/dev/disk/by-id/ata-Disk_1", "/dev/disk/by-id/virtio-2"


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (f"{ATA}-part1", f"{VIRTIO}-part2"),
        (f"{ATA}-part1", "/dev/vda2"),
        ("/dev/vda1", "/dev/sda2"),
        ("/dev/hda1", "/dev/sda2"),
        ("/dev/nvme0n1p1", "/dev/sda2"),
        (f"{VIRTIO}-part1", "/dev/disk/by-id/nvme-Disk_3-part2"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_names_of_two_kinds_of_disks_are_not_one_disk(first, other, known):
    fstab = f"{first if known else 'UUID=b007'} / ext4\n{first[:-1]}3 /x ext4\n{other} /data ext4\n"
    guest = FakeGuest(
        {"/dev/sda1": ("ext4", linux(fstab)), "/dev/sda2": ("ext4", {}), "/dev/sda3": ("ext4", {})},
        ids={("uuid", "b007"): "/dev/sda1"},
    )
    found = mounts(guest)
    assert "/data" not in found
    assert ("/x" in found) is known


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (f"{ATA}-part1", "/dev/disk/by-id/wwn-0x5000-part2"),
        (f"{ATA}-part1", "/dev/sda2"),
        (f"{VIRTIO}-part1", "/dev/vda2"),
        ("/dev/disk/by-id/google-boot-part1", "/dev/disk/by-id/scsi-0Google_boot-part2"),
        ("/dev/disk/by-path/pci-0000:00:04.0-part1", f"{VIRTIO}-part2"),
        ("/dev/nvme0n1p1", "/dev/disk/by-id/nvme-eui.0025-part2"),
    ],
)
def test_names_of_one_kind_of_disk_are_that_disk(first, other):
    fstab = f"{first} / ext4\n{other} /data ext4\n"
    guest = FakeGuest({"/dev/sda1": ("ext4", linux(fstab)), "/dev/sda2": ("ext4", {})})
    assert mounts(guest) == {"/": "/dev/sda1", "/data": "/dev/sda2"}


def test_disk_in_swap_or_crypttab_alone_is_another_disk_too():
    swap = f"{ATA}-part1 none swap sw\n/dev/disk/by-id/ata-Disk_2-part2 /data ext4\n"
    assert "/data" not in mounts(guest_with(swap, "/dev/sda2", disks=("/dev/sda",)))
    blocks = disk("/dev/sda", 1, 2)
    crypttab = {"cr": f"{ATA}-part1"}
    data = "/dev/disk/by-id/ata-Disk_2-part2"
    assert named_blocks(*blocks, crypttab=crypttab).find(data) is None
    assert named_blocks(*blocks).find(data) is not None


def test_roots_in_fstab_do_not_tell_which_disk_is_which():
    fstab = "/dev/sdb1 / ext4\n/dev/sda1 / ext4\n/dev/sda2 /data ext4\n"
    guest = FakeGuest(
        {"/dev/sdb1": ("ext4", linux(fstab)), "/dev/sda2": ("xfs", {}), "/dev/sdb2": ("ext4", {})},
        disks=("/dev/sda", "/dev/sdb"),
    )
    assert mounts(guest) == {"/": "/dev/sdb1", "/data": "/dev/sda2"}


def test_only_blanks_and_line_feeds_part_what_a_guest_writes():
    entries, problems = parse_fstab(
        "LABEL=a /a\u00a0b\u2028c ext4 x\x0cy\nLABEL=b /b ext4\r\n".encode()
    )
    assert [one.mountpoint for one in entries] == ["/a\u00a0b\u2028c", "/b"]
    assert [one.fstype for one in entries] == ["ext4", "ext4"] and problems == ()
    assert parse_crypttab("a\u2028b UUID=1\x0c2\tnone\r\n".encode()) == {"a\u2028b": "UUID=1\x0c2"}


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("/a;id", "'/dev/sda2:/a;id'"),
        ("/a$(id)", "'/dev/sda2:/a$(id)'"),
        ("/a\\040b", "'/dev/sda2:/a b'"),
    ],
)
def test_folder_of_any_name_is_one_word_to_be_typed(point, words):
    (_, line) = discover(guest_with(f"UUID=gone {point} ext4\n", "/dev/sda2")).problems
    assert f"-m {words}" in line


@pytest.mark.parametrize("point", ["/a:b", "/a\\033b"])
def test_nothing_is_to_be_typed_that_would_mean_something_else(point):
    layout = discover(guest_with(f"UUID=gone {point} ext4\n", "/dev/sda2"))
    assert len(layout.problems) == 1


def test_subvolume_of_a_hostile_name_is_one_word_to_be_typed():
    hostile = "btrfsvol:/dev/sda1/$(id)"
    guest = FakeGuest(
        {"/dev/sda1": ("btrfs", {}), hostile: ("btrfs", linux()), "/dev/sda2": ("ext4", linux())}
    )
    with pytest.raises(NotInGuestError) as caught:
        discover(guest)
    assert f"--root '{hostile}'" in str(caught.value.hint)


HARDWARE = {
    "one kind": "/dev/disk/by-id/ata-{n}-part1",
    "many kinds": "/dev/disk/by-id/a{n}-x-part1",
    "one label": "LABEL=x",
}


@pytest.mark.parametrize("kind", HARDWARE)
def test_thousands_of_names_take_no_time(kind):
    many = 20_000
    blocks = [
        *disk("/dev/sda", 1),
        *(Block(f"/dev/sdb{n}", "partition", 1, "ext4", label="x") for n in range(4000)),
    ]
    specs = [HARDWARE[kind].format(n=n) for n in range(many)]
    started = time.process_time()
    names = named_blocks(*blocks, specs=specs)
    for spec in specs[: many // 2]:
        names.learn(spec, "/dev/sda1")
    found = [names.find(spec) for spec in specs[many // 2 :]]
    found += [names.find(f"/dev/sdb{n}") for n in range(many)]
    assert len(found) == many // 2 + many
    assert time.process_time() - started < 3
