"""What is refused, and how it is said: the status, one line with the cause, and what to do."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

from imgtool.errors import HostError, RefusedError
from imgtool.mount.mounter import MountRequest
from imgtool.mount.mounting import mount, unmount
from imgtool.mount.steps import steps
from tests.mount.host import Done, here, imgtool, loops, mount_at, mounts, run
from tests.mount.images import attached, blank, divide

MIB = 1 << 20


def fails(status: int, *words: object, says: str, hint: str | None = None) -> Done:
    """The command ends with this status, and one line that says this."""
    done = imgtool(*words)
    lines = done.err.splitlines()
    assert done.status == status, done.err
    assert lines[0].startswith("imgtool: error: "), done.err
    assert says in lines[0], done.err
    assert len(lines) == (1 if hint is None else 2), done.err
    if hint is not None:
        assert lines[1].startswith("  hint: "), done.err
        assert hint in lines[1], done.err
    assert done.out == ""
    return done


@pytest.fixture(scope="module")
def image(images):
    return images.get("ext4")


# The mount point


def test_it_is_missing(image, tmp_path):
    missing = tmp_path / "missing"
    fails(2, "mount", image.path, missing, says="no such directory", hint=f"mkdir -p {missing}")


def test_it_is_a_file(image, tmp_path):
    (tmp_path / "file").touch()
    fails(2, "mount", image.path, tmp_path / "file", says="not a directory")


def test_it_is_not_empty(image, place):
    (place / "file").touch()
    fails(4, "mount", image.path, place, says="not empty", hint="an empty directory")
    assert (place / "file").exists()


def test_something_is_mounted_there(image, place):
    here("mount", image.path, place, "--via", "loop", *image.chosen)
    again = ("mount", image.path, place, "--via", "loop", *image.chosen)
    fails(4, *again, says="mounted there already", hint="imgtool umount")
    here("umount", place)
    run("mount", "-t", "tmpfs", "none", place)
    try:
        fails(4, *again, says="mounted there already", hint="imgtool mounts")
    finally:
        run("umount", place)


@pytest.mark.parametrize(
    "name", ["with space", "new\nline", "back\\slash", "tab\t#", "żółw", os.fsdecode(b"\xff\xfe"),
             "n" * 255, "\u2028\u0085\x0b\x1c", "-rf", "%s"]
)  # fmt: skip
def test_it_is_called_anything(image, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    here("mount", image.path, folder, "--via", "loop", *image.chosen)
    (row,) = here("mounts", "-o", "jsonl").rows
    assert row["state"] == "healthy"
    assert "\n" not in here("mounts").out.splitlines()[1]
    here("cleanup")
    assert (folder / "noise").exists()
    here("umount", folder)
    assert list(folder.iterdir()) == []


def test_a_link_and_a_relative_path_to_it(image, place, tmp_path):
    (tmp_path / "link").symlink_to(place)
    with contextlib.chdir(tmp_path):
        here("mount", image.path, "link", "--via", "loop", *image.chosen)
        assert mount_at(place).type == "ext4"
        here("umount", "./link/../link")


# What is named


@pytest.mark.parametrize("via", ["loop", "export", "fuse"])
def test_no_such_partition(image, place, via):
    words = ("mount", image.path, place, "--via", via, "-p", "7")
    fails(5, *words, says="no partition 7 (/dev/sda)", hint="it has: 1 (")


def test_no_partition_table(images, place):
    whole = images.get("ext4", "whole")
    words = ("mount", whole.path, place, "--via", "loop", "-p", "1")
    fails(5, *words, says="no partition 1", hint="mount it with -m /dev/sda")


def test_no_such_disk(image, place):
    words = ("mount", image.path, place, "--via", "loop", "-m", "/dev/sdc1")
    fails(5, *words, says="no such disk (/dev/sdc1)", hint="/dev/sda")


def test_no_such_directory_in_the_guest(image, place):
    words = ("mount", image.path, place, "--via", "loop", "-m", "/dev/sda2")
    fails(5, *words, "-m", "/dev/sda2:/none", says="no such directory to mount it at (/none)")
    fails(5, *words, "-m", "/dev/sda2:/one/../../etc", says="no such directory to mount it at")
    fails(5, *words, "-m", "/dev/sda2:/out", says="no such directory to mount it at (/out)")
    assert list(place.iterdir()) == []


@pytest.fixture(scope="module")
def odd_disk(tmp_path_factory):
    """A disk whose partitions hold no filesystem: noise, swap, an LVM physical volume, LUKS."""
    disk = blank(tmp_path_factory.mktemp("odd") / "odd.raw", 48 * MIB)
    divide(disk, ["label: gpt", *(f"start={2048 + n * 16384},size=16384" for n in range(5))])
    for number, command in (
        (1, ["mkswap", "-q"]),
        (2, ["pvcreate", "-q", "-y", "--driverloaded", "n", "--devicesfile", ""]),
        (3, ["cryptsetup", "luksFormat", "-q", "--type", "luks1", "--iter-time", "1"]),
        (4, ["mkfs.minix"]),
    ):
        offset = (2048 + number * 16384) * 512
        with attached(disk, "--offset", offset, "--sizelimit", 8 * MIB) as device:
            subprocess.run([*command, device], input=b"passphrase", check=True, capture_output=True)
    return disk


@pytest.mark.parametrize("via", ["loop", "export"])
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (1, "no known filesystem"),
        (2, "it is swap space"),
        (3, "it is a physical volume of LVM: name the volume, --lv VG/LV"),
        (4, "it is encrypted: --via fuse with --key"),
        (5, "a minix cannot be mounted"),
    ],
)
def test_what_is_no_filesystem(odd_disk, place, via, number, says):
    words = ("mount", odd_disk, place, "--via", via, "-p", number)
    hint = f"-m /dev/sda{number}:/:OPTIONS:TYPE" if number == 1 else None
    fails(1, *words, says=f"{says} (/dev/sda{number})", hint=hint)


def test_a_damaged_filesystem(images, place, tmp_path):
    damaged = images.copy(images.get("xfs"), tmp_path)
    with damaged.path.open("r+b") as file:
        file.seek(damaged.offset + 8192)
        file.write(b"\xa5" * (16 * MIB))
    words = ("mount", damaged.path, place, *damaged.chosen)
    for via in ("loop", "export"):
        done = imgtool(*words, "--via", via)
        if done.status == 0:  # some damage shows later
            here("umount", place)
        else:
            assert done.status == 1
            assert "/dev/sda2" in done.err


def test_a_logical_volume(odd_disk, place):
    words = ("mount", odd_disk, place, "--via", "loop", "--lv")
    fails(2, *words, "root", says="not a logical volume (root)", hint="--lv vg0/root")
    fails(2, *words, "a/b", "-p", "1", says="exclude each other")


# The image


def test_it_is_empty(place, tmp_path):
    (tmp_path / "empty.raw").touch()
    words = ("mount", tmp_path / "empty.raw", place, "--via", "loop")
    fails(3, *words, says="empty file")


def test_it_is_not_there(place, tmp_path):
    fails(3, "mount", tmp_path / "none.raw", place, says="no such file")


def test_it_has_no_filesystem_at_all(place, tmp_path):
    noise = tmp_path / "noise.raw"
    noise.write_bytes(os.urandom(MIB))
    fails(3, "mount", noise, place, "--via", "loop", says="not a disk image", hint="--format raw")


# The mechanism


def test_it_does_not_take_this_format(images, place):
    image = images.get("ext4", "gpt", "qcow2")
    words = ("mount", image.path, place, "--via", "loop")
    fails(6, *words, says="it takes raw images, and this is qcow2", hint="--via auto")


def test_there_is_none_of_this_name(image, place):
    fails(2, "mount", image.path, place, "--via", "ftp", says="'ftp' is not one of", hint="--help")


def test_keys_are_for_the_appliance(image, place):
    words = ("mount", image.path, place, "--via", "loop", "--key", "all:key:secret")
    done = fails(2, *words, says="--via fuse only")
    assert "secret" not in done.err


@pytest.mark.parametrize("via", ["loop", "export", "nbd", "kpartx"])
def test_block_devices_are_for_root(image, place, tmp_path, monkeypatch, via):
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(HostError, match="only root can mount block devices"):
        mount(MountRequest(image.path, place, via=via))
    assert list(tmp_path.iterdir()) == [place]


# Unmounting


def test_nothing_was_mounted_there(place):
    fails(1, "umount", place, says="mounted nothing there", hint="imgtool mounts")
    run("mount", "-t", "tmpfs", "none", place)
    try:
        fails(1, "umount", place, says="mounted nothing there", hint="imgtool mounts")
    finally:
        run("umount", place)


@pytest.mark.parametrize("via", ["loop", "export"])
def test_it_is_busy(image, place, via):
    here("mount", image.path, place, "--via", via, *image.chosen)
    with subprocess.Popen(["sleep", "600"], cwd=place / "one") as sleeper:
        try:
            says = f"in use by sleep (process {sleeper.pid})"
            fails(4, "umount", place, says=says, hint="then try again")
            (row,) = here("mounts", "-o", "jsonl").rows
            assert row["state"] == "healthy"  # as it was before
            assert (place / "noise").exists()
            # What other commands have left on this machine may go, and this may not.
            assert str(place) not in here("cleanup").out
            assert (place / "noise").exists()
        finally:
            sleeper.kill()
    here("umount", place)
    fails(1, "umount", place, says="mounted nothing there", hint="imgtool mounts")


@pytest.mark.parametrize("how", ["open", "mapped", "program"])
def test_whoever_uses_it_is_named(image, place, how):
    scripts = {
        "open": "import sys; f = open(sys.argv[1]); print(1, flush=True); input()",
        "mapped": "import sys, mmap; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, "
        "prot=mmap.PROT_READ); f.close(); print(1, flush=True); input()",
        "program": "import sys, os; os.chroot(os.path.dirname(sys.argv[1])); "
        "print(1, flush=True); input()",
    }
    here("mount", image.path, place, "--via", "loop", *image.chosen)
    words = ["/usr/bin/python3", "-c", scripts[how], place / "noise"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        user.stdout.readline()
        fails(4, "umount", place, says=f"python3 (process {user.pid})", hint="try again")
        user.communicate(b"\n")
    here("umount", place)


def test_something_is_mounted_over_it(image, place):
    here("mount", image.path, place, "--via", "loop", *image.chosen)
    run("mount", "-t", "tmpfs", "none", place)
    fails(4, "umount", place, says="something else is mounted over it")
    run("umount", place)
    here("umount", place)


def test_it_is_mounted_a_second_time(image, place, tmp_path, monkeypatch):
    """A bind mount of it holds the device."""
    monkeypatch.setattr(steps, "_SANDBOX_ENDS", 0.3)
    other = tmp_path / "other"
    other.mkdir()
    here("mount", image.path, place, "--via", "export", *image.chosen)
    run("mount", "--bind", place, other)
    with pytest.raises(RefusedError, match="still mounted") as refused:
        unmount(place)
    assert str(other) in str(refused.value)
    run("umount", other)
    unmount(place)


def test_a_container_has_a_copy_of_it(image, place, monkeypatch):
    """It started during the mount, and what the host unmounts does not get there."""
    monkeypatch.setattr(steps, "_SANDBOX_ENDS", 0.3)
    here("mount", image.path, place, "--via", "loop", *image.chosen)
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 600"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as container:
        assert container.stdout is not None
        container.stdout.readline()
        with pytest.raises(RefusedError, match="still mounted") as refused:
            unmount(place)
        assert f"process {container.pid}" in str(refused.value)
        container.kill()
    here("umount", place)
    assert not [row for row in loops() if row.file == str(image.path)]
    assert not [row for row in mounts() if row.target == str(place)]
