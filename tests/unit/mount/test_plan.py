"""What is mounted where, and how, before anything is done to the host."""

from __future__ import annotations

import errno
import logging
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from imgtool.errors import EngineError, HostError, NotInGuestError, UsageError
from imgtool.formats.partition_table import Partition
from imgtool.guest.model import Layout, Mount
from imgtool.mount import filesystems, mounter, mounting
from imgtool.mount.mechanisms import appliance
from imgtool.mount.mechanisms.registry import MECHANISMS, mechanisms
from imgtool.mount.plan import Disk, DiskRange, Item, Volume, items_of, partition, source_of, volume

MIB = 1 << 20


def row(number: int | None, start: int, size: int, disk: str = "/dev/sda") -> Partition:
    return Partition(
        device=f"{disk}{number or ''}",
        number=number,
        start=start,
        size=size,
        end=start + size - 1,
        start_sector=start // 512,
        sector_size=512,
        type="0x83" if number else None,
        type_name="Linux" if number else None,
        name=None,
        bootable=False,
        table="msdos" if number else "none",
    )


DISKS = (
    Disk(0, 100 * MIB, (row(1, MIB, 10 * MIB), row(5, 20 * MIB, 30 * MIB), row(6, 90 * MIB, MIB))),
    Disk(1, 64 * MIB, (row(None, 0, 64 * MIB, "/dev/sdb"),)),
)


# Partitions, volumes, devices


def test_partitions_by_number():
    assert partition(DISKS, 5) == DiskRange(0, 5, 20 * MIB, 30 * MIB)
    assert str(partition(DISKS, 5)) == "/dev/sda5"
    assert DISKS[1].places == [DiskRange(1, None, 0, 64 * MIB)]
    assert str(DISKS[1].places[0]) == "/dev/sdb"


def test_a_number_that_is_not_there_lists_those_that_are():
    with pytest.raises(NotInGuestError, match="no partition 2 ") as error:
        partition(DISKS, 2)
    hint = error.value.hint
    assert hint == (
        f"it has: 1 (Linux, {10 * MIB} bytes), 5 (Linux, {30 * MIB} bytes), 6 (Linux, {MIB} bytes)"
    )


def test_no_table_at_all():
    with pytest.raises(NotInGuestError, match="no partition 1") as error:
        partition(DISKS, 1, disk=1)
    assert error.value.hint == "it has no partition table: mount it with -m /dev/sdb"


@pytest.mark.parametrize("start", [95 * MIB, 100 * MIB, 1 << 60])
def test_past_the_end_of_the_disk(start):
    disk = replace(DISKS[0], partitions=(row(1, start, 10 * MIB),))
    with pytest.raises(NotInGuestError, match="past the end of the disk") as error:
        partition([disk], 1)
    assert str(start + 10 * MIB) in str(error.value)


def test_up_to_the_end_of_the_disk():
    disk = replace(DISKS[0], partitions=(row(1, 90 * MIB, 10 * MIB),))
    assert partition([disk], 1).size == 10 * MIB


@pytest.mark.parametrize("text", ["vg0/root", "/dev/vg0/root"])
def test_a_volume(text):
    assert volume(text) == Volume("vg0", "root")


@pytest.mark.parametrize("text", ["", "/", "vg0", "vg0/", "/root", "a/b/c", "/dev/vg0", "//"])
def test_not_a_volume(text):
    with pytest.raises(UsageError):
        volume(text)


@pytest.mark.parametrize(
    ("device", "source"),
    [
        ("/dev/sda1", DiskRange(0, 1, MIB, 10 * MIB)),
        ("/dev/sda", DiskRange(0, None, 0, 100 * MIB)),
        ("/dev/sdb", DiskRange(1, None, 0, 64 * MIB)),
        ("/dev/vg-0/root", Volume("vg-0", "root")),
    ],
)
def test_where_a_device_is(device, source):
    assert source_of(device, DISKS) == source


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ("/dev/sda2", NotInGuestError),
        ("/dev/sdb1", NotInGuestError),
        ("/dev/sdc", NotInGuestError),
        ("/dev/sdaa1", NotInGuestError),
        ("/dev/md0", HostError),
        ("/dev/mapper/luks", HostError),
        ("/dev/a/b/c", HostError),
    ],
)
def test_where_a_device_is_not(device, error):
    with pytest.raises(error) as raised:
        source_of(device, DISKS)
    assert raised.value.hint


def test_a_layout_becomes_items():
    layout = Layout(
        (
            Mount("btrfsvol:/dev/sda5/@", "/"),
            Mount("/dev/sda1", "/boot", "", "ext4"),
            Mount("btrfsvol:/dev/sda5/@home/deep", "/home"),
            Mount("/dev/vg0/var", "/var", "noatime"),
            Mount("btrfsvol:/dev/vg0/var/sub", "/x"),
        )
    )
    fifth, group = DiskRange(0, 5, 20 * MIB, 30 * MIB), Volume("vg0", "var")
    assert items_of(layout, DISKS, ["/dev/sda1", "/dev/sda5", "/dev/vg0/var"]) == [
        Item(fifth, "/", None, "@", ""),
        Item(DiskRange(0, 1, MIB, 10 * MIB), "/boot", "ext4", None, ""),
        Item(fifth, "/home", None, "@home/deep", ""),
        Item(group, "/var", None, None, "noatime"),
        Item(group, "/x", None, "sub", ""),
    ]


# What the kernel is told


def options_of(item: Item) -> list[str]:
    return list(mounter.MountAttempt._data(item))


def test_mount_options():
    place = DISKS[1].places[0]
    assert options_of(Item(place)) == []
    assert options_of(Item(place, subvolume="@home")) == ["subvol=@home"]
    # Whether it is read-only, and what may be run from it, is for the command's own options to say.
    assert options_of(Item(place, options="ro,rw,exec,suid,dev,defaults,,noatime")) == ["noatime"]


def test_a_subvolume_does_not_smuggle_in_an_option():
    """Its name is the guest's choice: `device=` would have the host open a disk of its own."""
    with pytest.raises(EngineError, match="comma"):
        options_of(Item(DISKS[1].places[0], subvolume="@,device=/dev/sda"))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "no known filesystem"),
        ("swap", "swap space"),
        ("LVM2_member", "--lv VG/LV"),
        ("crypto_LUKS", "--via fuse with --key"),
        ("linux_raid_member", "RAID"),
        ("reiserfs", "a reiserfs cannot be mounted"),
    ],
)
def test_what_is_not_mounted(found, says):
    with pytest.raises(EngineError, match=says):
        filesystems.kind_of(found, "/dev/sda1")


def test_what_is_mounted():
    # Damaged, an ext4 may ask for a panic of whoever mounts it; the option wins.
    assert filesystems.kind_of("ext2", "x") == filesystems.Kind("ext4", "errors=remount-ro")
    assert filesystems.kind_of("xfs", "x") == filesystems.Kind("xfs", "nouuid")


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (errno.ENODEV, HostError, "the kernel does not know the filesystem xfs"),
        (errno.EUCLEAN, EngineError, "the kernel finds this xfs damaged"),
        (errno.EINVAL, EngineError, "the kernel finds this xfs damaged"),
        (errno.EIO, EngineError, "it cannot be mounted"),
    ],
)
def test_why_the_kernel_did_not_mount_it(number, error, says):
    kind = filesystems.Kind("xfs", "nouuid")
    refusal = filesystems.refusal(OSError(number, "reason"), kind, "/dev/sda1")
    assert isinstance(refusal, error)
    assert says in str(refusal)
    assert "/dev/sda1" in str(refusal)


# The mechanism

NAMES = list(MECHANISMS)


def chains(*formats: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(links=[SimpleNamespace(format=name) for name in formats])]


@pytest.fixture
def machine(monkeypatch, caplog):
    """Makes this a machine where only the mechanisms named work."""
    caplog.set_level(logging.INFO, logger="imgtool")

    def only(*names: str) -> None:
        def missing(name: str) -> str | None:
            return None if name in names else f"no {name} here"

        for name, mechanism in mechanisms():
            monkeypatch.setattr(mechanism, "missing", lambda *, load=True, name=name: missing(name))

    return only


def chosen(via: str, *formats: str) -> str:
    name, mechanism = mounting.choose(via, chains(*formats))  # type: ignore[arg-type]
    assert mechanism.__name__ == MECHANISMS[name]
    return name


@pytest.mark.parametrize(
    ("works", "formats", "expected"),
    [
        (NAMES, ("raw",), "fuse"),
        (NAMES[1:], ("raw",), "loop"),
        (NAMES[1:], ("qcow2",), "export"),
        (NAMES[1:], ("qcow2", "raw"), "export"),
        (("nbd", "kpartx"), ("raw",), "nbd"),
        (("nbd", "kpartx"), ("qcow2",), "nbd"),
        (("kpartx",), ("raw",), "kpartx"),
    ],
)
def test_the_least_risky_that_works(machine, caplog, works, formats, expected):
    machine(*works)
    assert chosen("auto", *formats) == expected
    before = NAMES[: NAMES.index(expected)]
    assert caplog.messages[-1] == f"mechanism: {expected}"
    said = caplog.messages[:-1]
    assert len(said) == len(before)
    for line, name in zip(said, before, strict=True):
        raw_only = name in ("loop", "kpartx") and name in works
        reason = "it takes raw images, and this is qcow2" if raw_only else f"no {name} here"
        if name == "loop" and formats != ("raw",):
            reason = "it takes raw images, and this is qcow2"
        assert line == f"mechanism: not {name}: {reason}"


@pytest.mark.parametrize("via", NAMES)
def test_the_one_that_is_asked_for(machine, caplog, via):
    machine(*NAMES)
    assert chosen(via, "raw") == via
    assert caplog.messages == [f"mechanism: {via}"]


@pytest.mark.parametrize("via", NAMES)
def test_the_one_that_is_asked_for_does_not_work(machine, via):
    machine(*(name for name in NAMES if name != via))
    with pytest.raises(HostError, match=f"{via}: no {via} here$") as error:
        chosen(via, "raw")
    assert error.value.hint == "--via auto takes what works here"


def test_none_works(machine):
    machine()
    with pytest.raises(HostError) as error:
        chosen("auto", "qcow2")
    for name in NAMES:
        assert f"{name}: " in str(error.value)
    assert error.value.hint == "'imgtool doctor' explains"


def test_no_mechanism_of_this_name(tmp_path):
    with pytest.raises(UsageError, match="no such mechanism"):
        mounting.mount(mounter.MountRequest(Path("image"), tmp_path, via="ftp"))


@pytest.mark.parametrize("number", [1, 2])
def test_a_btrfs_tells_on_how_many_devices_it_lies(tmp_path, number):
    disks = [tmp_path / f"disk{n}" for n in range(number)]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(160 << 20)
    subprocess.run(["/usr/sbin/mkfs.btrfs", "-q", *disks], check=True, capture_output=True)
    assert [filesystems.btrfs_devices(str(disk)) for disk in disks] == [number] * number
    disks[0].write_bytes(bytes(1 << 20))
    assert filesystems.btrfs_devices(str(disks[0])) == 1


def test_what_the_serving_process_has_to_say_reaches_the_user(tmp_path):
    assert appliance.notices(tmp_path) == []
    (tmp_path / "appliance.log").write_text("noise\nnotice: /home is not shown\nnotice: b\n")
    assert appliance.notices(tmp_path) == ["/home is not shown", "b"]
