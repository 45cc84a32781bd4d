"""Sets of disks of which some are missing: what is there is told from what is not."""

from __future__ import annotations

from imgtool.engines.libguestfs.guest.sets import look_at, parse_sets
from imgtool.guest.blocks import Block

MISSING = "eMxn5M-wWDk-mg6L-8BRG-wtoY-xFf6-srwaEU"


def block(device: str, kind: str = "device", type: str | None = None, *parents: str) -> Block:
    return Block(device, kind, 1, type, parents=parents, kernel=device.removeprefix("/dev/"))


def test_a_raid_that_runs_without_a_disk_is_said_and_shown():
    sets = parse_sets("md md127 clean 2 1\nchanged\n", [block("/dev/md127", "md")])
    assert sets.lines == ["the RAID /dev/md127 lacks 1 of 2 disks and is read without"]
    assert sets.changed
    assert not sets.idle


def test_stopped_raid_is_not_shown_and_its_members_are_named():
    blocks = [block("/dev/sda"), block("/dev/md127", "md", None, "/dev/sda")]
    sets = parse_sets("md md127 inactive 0 0\n", blocks)
    assert sets.idle == {"/dev/md127"}
    (line,) = sets.lines
    assert line.startswith("the RAID /dev/md127 lacks disks and is not shown (/dev/sda of it")
    assert "-A IMAGE" in line


def test_a_container_of_firmware_raid_is_no_array():
    disk = block("/dev/sda", "device", "ddf_raid_member")
    container = block("/dev/md127", "md", None, "/dev/sda")
    volume = Block("/dev/md126", "md", 1, "ext4", kernel="md126")
    sets = parse_sets("md md127 container 0 0\nmd md126 clean 2 0\n", [disk, container, volume])
    assert (sets.lines, sets.idle) == ([], {"/dev/md127"})
    (line,) = parse_sets("md md127 container 0 0\n", [disk, container]).lines
    assert line.startswith("none of the volumes of the firmware RAID (/dev/sda of it is there)")


def test_a_whole_raid_is_not_worth_a_word():
    assert parse_sets("md md127 active 2 0\n", [block("/dev/md127", "md")]).lines == []


def test_incomplete_group_says_what_is_missing_and_not_shown():
    said = (
        f"changed\npv vg0//eBw7za\npv vg0/missing/{MISSING}\npv other//x\n"
        "lv vg0/a/active/-wi-a-----\nlv vg0/b//-wi-----p-\nlv vg0/m/active/rwi-a-r-p-\n"
        "lv other/c/active/-wi-a-----\n"
    )
    assert parse_sets(said, []).lines == [
        f"the volume group vg0 lacks {MISSING}; /dev/vg0/m can be read without; "
        "/dev/vg0/b is not shown; add what is missing: -A IMAGE"
    ]


def test_a_btrfs_on_two_devices_is_one():
    said = (
        "btrfs Label: none  uuid: f5ec\nbtrfs Total devices 2 FS bytes used 147456\n"
        "btrfs devid    2 size 1 used 1 path /dev/sdb\n"
        "btrfs devid    1 size 1 used 1 path /dev/sda\n"
        "btrfs \nbtrfs Label: 'x'  uuid: aaaa\nbtrfs Total devices 1 FS bytes used 1\n"
        "btrfs devid    1 size 1 used 1 path /dev/sdc\n"
    )
    sets = parse_sets(said, [block(f"/dev/sd{c}", "device", "btrfs") for c in "abc"])
    assert sets.parts == {"/dev/sdb"}
    assert sets.lines == []


def test_btrfs_without_a_device_says_what_can_be_tried():
    said = (
        "btrfs Label: none  uuid: f5ec\nbtrfs Total devices 2 FS bytes used 147456\n"
        "btrfs devid    1 size 1 used 1 path /dev/sda\nbtrfs *** Some devices missing\n"
    )
    (line,) = parse_sets(said, [block("/dev/sda", "device", "btrfs")]).lines
    assert line == (
        "the btrfs on /dev/sda lacks 1 of 2 devices; add what is missing: -A IMAGE, "
        "or try what can be read without: -m /dev/sda:/:degraded"
    )


class Handle:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def debug(self, command: str, words: list[str]) -> str:
        self.asked += words
        return ""


def test_nothing_is_asked_where_there_is_no_set():
    handle = Handle()
    look_at(handle, [block("/dev/sda", "device", "ext4")], lacking=False, write=False)
    assert handle.asked == []


def test_who_writes_starts_nothing_without_all_its_disks():
    handle = Handle()
    look_at(handle, [block("/dev/md127", "md")], lacking=True, write=True)
    (script,) = handle.asked
    assert "--activationmode complete" in script
    assert "= inactive ] && [ no = yes ]" in script
