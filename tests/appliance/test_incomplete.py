"""Half of a RAID, a volume group and a btrfs without one of their disks: read as far as they go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.appliance

# In one launch, with libguestfs itself: eight disks, each pair a set.
_MAKE = """
import sys, guestfs
handle = guestfs.GuestFS(python_return_dict=True)
handle.set_backend("direct")
handle.set_backend_settings(["force_tcg"])
for path in sys.argv[1:]:
    handle.add_drive_opts(path, format="raw")
handle.launch()
def fill(device, text):
    handle.mount(device, "/")
    handle.write("/what.txt", text)
    handle.umount_all()
def shell(line):
    handle.debug("sh", [line])
handle.md_create("one", ["/dev/sda", "/dev/sdb"], level="raid1")
(array,) = handle.list_md_devices()
handle.pvcreate(array)
handle.vgcreate("vgmd", [array])
handle.lvcreate("root", "vgmd", 100)
handle.mke2fs("/dev/vgmd/root")
fill("/dev/vgmd/root", "on a raid")
for device in ("/dev/sdc", "/dev/sdd"):
    handle.pvcreate(device)
handle.vgcreate("vg0", ["/dev/sdc", "/dev/sdd"])
shell("lvm lvcreate -L 60M -n a vg0 /dev/sdc")
shell("lvm lvcreate -L 60M -n b vg0 /dev/sdd")
shell("lvm lvcreate --type raid1 -m1 -L 40M -n m vg0")
for name in "abm":
    handle.mke2fs("/dev/vg0/" + name)
    fill("/dev/vg0/" + name, "on " + name)
handle.mkfs_btrfs(["/dev/sde", "/dev/sdf"], metadata="raid1", datatype="raid1")
fill("/dev/sde", "on btrfs")
shell("lvm vgchange -an; mdadm --stop --scan; true")
handle.shutdown()
"""


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    found = {}
    for name in ("raid1", "raid2", "lvm1", "lvm2", "btrfs1", "btrfs2"):
        found[name] = folder / name
        with found[name].open("wb") as file:
            file.truncate(200 << 20)
    subprocess.run([sys.executable, "-c", _MAKE, *found.values()], check=True)
    return found


def test_halves_are_read_and_what_is_missing_is_named(disks, imgtool_cli):
    words = [disks["raid1"], "-A", disks["lvm1"], "-A", disks["btrfs1"]]
    result = imgtool_cli("filesystems", *words, "-o", "json")
    assert result.status == 0, result.err
    found = {row["device"] for row in json.loads(result.text)}
    assert found == {"/dev/sdc", "/dev/vg0/a", "/dev/vg0/m", "/dev/vgmd/root"}
    assert "lacks 1 of 2 disks and is read without" in result.err
    assert "/dev/vg0/b is not shown; add what is missing: -A IMAGE" in result.err
    assert "the btrfs on /dev/sdc lacks 1 of 2 devices" in result.err
    layout = ["-m", "/dev/vgmd/root", "-m", "/dev/vg0/m:/lost+found"]
    result = imgtool_cli("cat", *words, *layout, "/what.txt", "/lost+found/what.txt")
    assert (result.status, result.out) == (0, b"on a raidon m")


def test_a_btrfs_without_a_device_is_read_as_its_warning_says(disks, imgtool_cli):
    result = imgtool_cli("cat", disks["btrfs1"], "/what.txt", "-m", "/dev/sda:/:degraded")
    assert (result.status, result.out) == (0, b"on btrfs")


def test_a_btrfs_on_two_disks_is_one(disks, imgtool_cli):
    result = imgtool_cli("filesystems", disks["btrfs1"], "-A", disks["btrfs2"], "-o", "json")
    assert [row["device"] for row in json.loads(result.text)] == ["/dev/sda"]
    result = imgtool_cli("cat", disks["btrfs2"], "-A", disks["btrfs1"], "/what.txt")
    assert (result.status, result.out) == (0, b"on btrfs")


def test_nothing_is_written_to_half_of_a_raid(disks, imgtool_cli, tmp_path):
    (tmp_path / "new").write_text("new")
    before = disks["raid1"].read_bytes()
    words = ["-m", "/dev/vgmd/root"]
    result = imgtool_cli("copy-in", disks["raid1"], tmp_path / "new", "/new", *words)
    assert result.status == 5
    assert "lacks disks and is not shown" in result.err
    assert disks["raid1"].read_bytes() == before
