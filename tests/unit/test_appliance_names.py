"""Device names within btrfs subvolumes, when the appliance's kernel numbers the disks otherwise."""

from __future__ import annotations

import pytest

from imgtool.engines.libguestfs.volumes import guest_names
from imgtool.errors import EngineError


class Handle:
    def __init__(self, disks: list[str], kernel: str) -> None:
        self.disks = disks
        self.kernel = kernel

    def list_devices(self) -> list[str]:
        return self.disks

    def debug(self, command: str, arguments: list[str]) -> str:
        assert command == "sh"
        if not self.kernel:
            raise RuntimeError("debug: debug: sh: failed")
        return self.kernel


SWAPPED = Handle(["/dev/sda"], "sda 2:0:1:0\nsdb 2:0:0:0\n")


def test_the_kernels_name_becomes_the_guests() -> None:
    assert guest_names(SWAPPED, ["btrfsvol:/dev/sdb2/@", "/dev/sda2"]) == {
        "btrfsvol:/dev/sdb2/@": "btrfsvol:/dev/sda2/@",
        "/dev/sda2": "/dev/sda2",
    }


def test_a_subvolume_of_a_whole_disk_and_one_with_slashes_in_its_name() -> None:
    found = guest_names(SWAPPED, ["btrfsvol:/dev/sdb/a/dev/sdb2/b\nc"])
    assert list(found.values()) == ["btrfsvol:/dev/sda/a/dev/sdb2/b\nc"]


def test_disks_are_in_the_order_of_their_numbers_not_of_their_digits() -> None:
    disks = [f"/dev/sd{letter}" for letter in "abcdefghijkl"]
    kernel = "".join(f"sd{letter} 2:0:{n}:0\n" for n, letter in enumerate("cbafedihglkjm"))
    found = guest_names(Handle(disks, kernel), ["btrfsvol:/dev/sdc1/x", "btrfsvol:/dev/sdk1/x"])
    assert list(found.values()) == ["btrfsvol:/dev/sda1/x", "btrfsvol:/dev/sdk1/x"]


def test_subvolumes_on_lvm_keep_their_name() -> None:
    name = "btrfsvol:/dev/group/root/@"
    assert guest_names(SWAPPED, [name]) == {name: name}


def test_nothing_is_asked_where_there_is_no_subvolume() -> None:
    assert guest_names(Handle([], ""), ["/dev/sda1"]) == {"/dev/sda1": "/dev/sda1"}


def test_an_appliance_that_does_not_answer_is_an_engine_failure() -> None:
    with pytest.raises(EngineError, match="disks cannot be listed"):
        guest_names(Handle(["/dev/sda"], ""), ["btrfsvol:/dev/sda1/x"])
