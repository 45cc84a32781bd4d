"""Each kind of guest is understood: what is mounted where, and a file read from it."""

from __future__ import annotations

import json
import re

import pytest

from tests.support import guests
from tests.support.guests import disks, guest

pytestmark = pytest.mark.appliance
LUKS_KEY = f"all:key:{guests.PASSPHRASE}"


def options(name: str) -> list[object]:
    """IMAGE, and -A for the guest's further disks."""
    first, *others = disks(name)
    return [first, *(word for disk in others for word in ("-A", disk))]


def layout(imgtool_cli, name: str, *more: object) -> dict[str, str]:
    result = imgtool_cli("filesystems", *options(name), *more, "-o", "json")
    assert result.status == 0, result.err
    return {r["mountpoint"]: r["device"] for r in json.loads(result.text) if r["mountpoint"]}


def test_one_plain_partition(imgtool_cli):
    assert layout(imgtool_cli, "plain") == {"/": "/dev/sda1"}
    result = imgtool_cli("cat", *options("plain"), "/home/alice/letter.txt")
    assert result.out == guests.LETTER


def test_btrfs_subvolumes(imgtool_cli):
    found = layout(imgtool_cli, "btrfs")
    device = found["/"].removeprefix("btrfsvol:").removesuffix("/@")
    assert found == {"/": f"btrfsvol:{device}/@", "/home": f"btrfsvol:{device}/@home"}
    result = imgtool_cli("cat", *options("btrfs"), "/home/alice/letter.txt")
    assert result.out == guests.LETTER


def test_lvm_on_raid1_of_two_disks(imgtool_cli):
    assert layout(imgtool_cli, "md")["/"].startswith(f"/dev/{guests.MD_VG}/")
    result = imgtool_cli("cat", *options("md"), "/etc/hostname")
    assert result.out.decode().strip() == guests.HOSTNAME


@pytest.mark.parametrize("name", ["luks", "luks1-in-lvm"])
def test_luks_with_lvm_inside_and_luks_inside_lvm(imgtool_cli, name):
    result = imgtool_cli("cat", *options(name), "--key", LUKS_KEY, "/home/alice/letter.txt")
    assert result.status == 0, result.err
    assert result.out == guests.LETTER


def test_luks_without_a_key_says_which_one_to_give(imgtool_cli, tmp_path):
    result = imgtool_cli("ls", *options("luks"), "/")
    assert result.status == 5
    assert guests.PASSPHRASE not in result.err
    # As it says, with the file that it asks for.
    step = re.search(r"give the key: --key (/dev/sda\S*:file:)FILE, or", result.err)
    assert step is not None, result.err
    (tmp_path / "key").write_text(guests.PASSPHRASE)
    key = ("--key", f"{step[1]}{tmp_path / 'key'}")
    opened = imgtool_cli("cat", *options("luks"), *key, "/home/alice/letter.txt")
    assert opened.status == 0, opened.err
    assert opened.out == guests.LETTER


def test_windows_paths_in_any_case(imgtool_cli):
    image = guest("windows")
    for path in (
        "C:\\Users\\Alice\\Documents\\letter.txt",
        "c:\\users\\alice\\DOCUMENTS\\LETTER.TXT",
        "/Users/Alice/Documents/letter.txt",
    ):
        result = imgtool_cli("cat", image, path)
        assert result.status == 0, result.err
        assert result.out == guests.WINDOWS_LETTER
    other = imgtool_cli("cat", image, "D:\\x")
    assert other.status == 5
    assert "drive C:" in other.err
    (system,) = json.loads(imgtool_cli("inspect", image, "-o", "json").text)
    assert system["type"] == "windows"
    assert system["product_name"] == guests.WINDOWS_PRODUCT


def test_several_systems_need_a_choice(imgtool_cli):
    image = guest("multiboot")
    result = imgtool_cli("ls", image, "/")
    assert result.status == 5
    for device, *_ in guests.MULTIBOOT:
        assert f"--root {device}" in result.err
    for device, _, _, hostname in guests.MULTIBOOT:
        chosen = imgtool_cli("cat", image, "--root", device, "/etc/hostname")
        assert chosen.out.decode().strip() == hostname
    rows = json.loads(imgtool_cli("df", image, "-o", "json").text)
    assert {row["device"] for row in rows} >= {device for device, *_ in guests.MULTIBOOT}


def test_a_data_disk_is_mounted_at_the_root(imgtool_cli):
    for path, content in guests.DATA_FILES.items():
        assert imgtool_cli("cat", guest("data"), path).out == content


def test_several_data_filesystems_need_a_choice(imgtool_cli):
    result = imgtool_cli("ls", guest("twodata"), "/")
    assert result.status == 5
    assert "-m /dev/sda1" in result.err
    assert "-m /dev/sda2" in result.err


def test_second_disk_is_found_by_uuid_and_missed_if_not_given(imgtool_cli):
    assert layout(imgtool_cli, "twodisk")["/srv"].startswith("/dev/sdb")
    path, content = guests.TWODISK_FILE
    assert imgtool_cli("cat", *options("twodisk"), path).out == content
    alone = imgtool_cli("cat", guest("twodisk"), path)
    assert alone.status == 5
    assert "/srv is not shown" in alone.err


def test_an_fstab_that_lies_does_not_hide_the_rest(imgtool_cli):
    result = imgtool_cli("filesystems", guest("liar"), "-o", "json")
    assert result.status == 0
    found = {row["mountpoint"] for row in json.loads(result.text)}
    assert {"/", guests.LIAR_DATA_MOUNTPOINT} <= found
    assert guests.LIAR_MISSING_UUID in result.err
    assert guests.LIAR_MISSING_LV in result.err


def test_an_overlay_shows_the_whole_chain(imgtool_cli):
    for path, content in (guests.OVERLAY1_FILE, guests.OVERLAY2_FILE):
        assert imgtool_cli("cat", guest("overlay2"), path).out == content


def test_unreadable_filesystem_is_a_row_with_the_reason(imgtool_cli):
    result = imgtool_cli("df", guest("nofs"), "-o", "json")
    assert result.status == 1
    rows = {row["device"]: row for row in json.loads(result.text)}
    assert rows["/dev/sda2"]["error"]
    assert rows["/dev/sda2"]["size"] is None
    assert rows["/dev/sda3"]["error"] is None
    assert rows["/dev/sda3"]["size"] > 0
    path, content = guests.NOFS_GOOD_FILE
    assert imgtool_cli("cat", guest("nofs"), path).out == content
