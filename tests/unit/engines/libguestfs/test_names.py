"""The appliance's block devices under the names that the guest's users know."""

from __future__ import annotations

import pytest

from imgtool.engines.libguestfs.guest.blocks import list_blocks, parse_blocks
from imgtool.engines.libguestfs.guest.volumes import guest_names
from imgtool.errors import EngineError
from imgtool.guest.blocks import Block, filesystems_on

COLUMNS = [
    "KNAME",
    "PKNAME",
    "NAME",
    "TYPE",
    "HCTL",
    "SIZE",
    "FSTYPE",
    "LABEL",
    "UUID",
    "PARTUUID",
    "PARTLABEL",
    "PARTTYPE",
]


def line(**given: object) -> str:
    row = {column: given.get(column.lower(), "") for column in COLUMNS}
    row["NAME"] = row["NAME"] or row["KNAME"]
    row["SIZE"] = row["SIZE"] or 1024
    return " ".join(f'{name}="{value}"' for name, value in row.items()) + "\n"


def disk(kernel: str, target: int, **more: object) -> str:
    return line(kname=kernel, type="disk", hctl=f"2:0:{target}:0", **more)


def part(kernel: str, parent: str, **more: object) -> str:
    return line(kname=kernel, pkname=parent, type="part", **more)


def blocks(*lines: str, volumes: str = "") -> dict[str, Block]:
    return {b.device: b for b in parse_blocks("".join(lines) + "--logical-volumes--\n" + volumes)}


def test_what_blkid_says_of_the_ambiguous_is_taken() -> None:
    listed = disk("sda", 0) + disk("sdb", 1, fstype="ext2")
    probed = "--logical-volumes--\n--probed--\nKNAME=sda\nTYPE=erofs\nLABEL=a\\ b\n"
    (found,) = parse_blocks(listed + probed)
    assert (found.type, found.label) == ("erofs", "a b")


# The guest's only disk is what the kernel calls sdb; sda is the appliance's own.
SWAPPED = (disk("sda", 1, fstype="ext2"), disk("sdb", 0), part("sdb2", "sdb", fstype="btrfs"))


def test_disks_are_named_by_address_not_by_the_kernel() -> None:
    found = blocks(*SWAPPED)
    assert set(found) == {"/dev/sda", "/dev/sda2"}
    assert found["/dev/sda2"].parents == ("/dev/sda",)
    assert found["/dev/sda2"].type == "btrfs"


def test_subvolumes_get_the_guests_name_of_their_disk() -> None:
    names = ["btrfsvol:/dev/sdb2/@", "/dev/sda2", "btrfsvol:/dev/sdb/a/dev/sdb2/b\nc"]
    assert list(guest_names(list(blocks(*SWAPPED).values()), names).values()) == [
        "btrfsvol:/dev/sda2/@",
        "/dev/sda2",
        "btrfsvol:/dev/sda/a/dev/sdb2/b\nc",
    ]


def test_subvolumes_on_lvm_keep_their_name() -> None:
    name = "btrfsvol:/dev/group/root/@"
    assert guest_names(list(blocks(*SWAPPED).values()), [name]) == {name: name}


def test_disks_are_in_the_order_of_numbers_not_of_digits() -> None:
    order = "cbafedihglkjm"
    found = blocks(*(disk(f"sd{letter}", n) for n, letter in enumerate(order)))
    assert {b.kernel: b.device for b in found.values()} == {
        f"sd{letter}": f"/dev/sd{chr(ord('a') + n)}" for n, letter in enumerate(order[:-1])
    }


def test_partitions_are_in_the_order_of_their_numbers() -> None:
    parts = [part(f"sda{n}", "sda") for n in (10, 9, 1)]
    found = blocks(disk("sda", 0), *parts, disk("sdb", 1))
    assert list(found) == ["/dev/sda", "/dev/sda1", "/dev/sda9", "/dev/sda10"]


def test_logical_volumes_have_names_and_hidden_ones_none() -> None:
    found = blocks(
        disk("sda", 0, fstype="LVM2_member"),
        line(kname="dm-0", pkname="sda", name="my--vg-a--b", type="lvm", fstype="ext4"),
        line(kname="dm-1", pkname="sda", name="my--vg-pool_tdata", type="lvm"),
        line(kname="dm-2", pkname="sda", name="imgtool-luks0", type="crypt", fstype="xfs"),
        disk("sdb", 1),
        volumes="  my-vg/a-b\n",
    )
    assert list(found) == ["/dev/sda", "/dev/my-vg/a-b", "/dev/mapper/imgtool-luks0"]


def test_array_has_its_members_as_parents_and_stands_once() -> None:
    member = {"fstype": "linux_raid_member"}
    array = {"kname": "md127", "type": "raid1", "fstype": "ext4"}
    found = blocks(
        disk("sda", 0, **member),
        line(pkname="sda", **array),
        disk("sdb", 1, **member),
        line(pkname="sdb", **array),
        disk("sdc", 2),
    )
    assert found["/dev/md127"].parents == ("/dev/sda", "/dev/sdb")


def test_a_label_arrives_as_it_is() -> None:
    found = blocks(disk("sda", 0, label="a \\x22b\\x22\\x0a\\xc3\\xa9\\xff"), disk("sdb", 1))
    assert found["/dev/sda"].label == 'a "b"\n\xe9\ufffd'


@pytest.mark.parametrize("kind", ["0x5", "0xf", "E3C9E316-0B5C-4DB8-817D-F92DF00215AE"])
def test_extended_and_reserved_partitions_hold_no_filesystem(kind: str) -> None:
    found = blocks(disk("sda", 0), part("sda1", "sda", parttype=kind), disk("sdb", 1))
    assert found["/dev/sda1"].holds_none


def test_an_appliance_that_does_not_answer_is_an_engine_failure() -> None:
    class Handle:
        def debug(self, command: str, words: list[str]) -> str:
            raise RuntimeError("debug: sh: failed")

    with pytest.raises(EngineError, match="cannot be listed"):
        list_blocks(Handle())


def test_an_opened_device_is_replaced_by_what_is_in_it() -> None:
    found = blocks(
        disk("sda", 0),
        part("sda1", "sda", fstype="crypto_LUKS"),
        line(kname="dm-0", pkname="sda1", name="imgtool-luks0", type="crypt", fstype="ext4"),
        disk("sdb", 1),
    )

    def listed(*opened: str) -> list[str]:
        return [d.device for d in filesystems_on(list(found.values()), lambda name: (), opened)]

    assert listed() == ["/dev/sda1", "/dev/mapper/imgtool-luks0"]
    assert listed("/dev/sda1") == ["/dev/mapper/imgtool-luks0"]
