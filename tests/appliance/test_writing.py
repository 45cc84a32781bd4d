"""Writing that counts only when it is whole and sound: edit, dry runs, clones, damaged guests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgtool import open_guest
from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest
from imgtool.engines.libguestfs.write.guest import LibguestfsWritableGuest
from imgtool.errors import ImgtoolError
from imgtool.image.intent.intent_log import record_path
from imgtool.opening import open_guest_to_write
from tests.support import guests
from tests.support.commands import Result

pytestmark = pytest.mark.appliance


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small disk with what an edit must not change around it."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/real.conf").write_bytes(b"Port 22\n\xff\n")
    (tree / "etc/real.conf").chmod(0o4640)
    (tree / "etc/real.conf").with_name("hard.conf").hardlink_to(tree / "etc/real.conf")
    os.setxattr(tree / "etc/real.conf", "user.note", b"kept")
    (tree / "etc/link.conf").symlink_to("/etc/real.conf")
    path = tmp_path / "disk.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, path, "48M"], check=True)
    subprocess.run(
        ["debugfs", "-w", "-R", "sif /etc/real.conf uid 10", path], check=True, capture_output=True
    )
    subprocess.run(
        ["debugfs", "-w", "-R", "sif /etc/real.conf gid 11", path], check=True, capture_output=True
    )
    return path


def imgtool(*words: str | Path) -> Result:
    """Run a command in a process of its own: what was read before a write is not to be reused."""
    done = subprocess.run(
        [sys.executable, "-m", "imgtool", *words], capture_output=True, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr.decode())


def content(image: Path) -> bytes:
    """What the image file holds, and when it was changed."""
    return image.read_bytes() + str(image.stat().st_mtime_ns).encode()


def test_edit_through_a_link_changes_the_file_alone(image):
    with open_guest(image, engine="direct") as guest:
        folder = guest.lstat("/etc")
    done = imgtool("edit", image, "/etc/link.conf", "--set", "Port=2222")
    assert (done.status, done.err) == (0, "")
    with open_guest(image, engine="direct") as guest:
        for name in ("real.conf", "hard.conf", "link.conf"):
            assert guest.read_bytes(f"/etc/{name}") == b"Port 2222\n\xff\n"
        entry = guest.lstat("/etc/real.conf")
        assert (entry.mode & 0o7777, entry.uid, entry.gid) == (0o4640, 10, 11)
        assert guest.lstat("/etc/link.conf").target == b"/etc/real.conf"
        assert guest.lstat("/etc") == folder
    shown = subprocess.run(
        ["debugfs", "-R", "ea_get -V /etc/real.conf user.note", image],
        check=True,
        capture_output=True,
    )
    assert b"kept" in shown.stdout
    before = content(image)
    done = imgtool("edit", image, "/etc/link.conf", "--set", "Port=2222")
    assert done.status == 0 and "unchanged" in done.err
    assert content(image) == before


def test_a_dry_run_shows_what_would_change_and_a_clone_has_it(image, tmp_path):
    before = content(image)
    words = ["edit", image, "/etc/real.conf", "-e", "s/22/23/", "-b", ".old"]
    done = imgtool(*words, "--dry-run")
    assert done.status == 0
    assert "/etc/real.conf" in done.text and "/etc/real.conf.old" in done.text
    assert content(image) == before
    done = imgtool(*words, "--clone", tmp_path / "clone.qcow2")
    assert done.status == 0
    assert content(image) == before
    done = imgtool("diff", image, tmp_path / "clone.qcow2", "--checksum", "md5", "-o", "jsonl")
    rows = [json.loads(line) for line in done.text.splitlines()]
    assert [(row["change"], row["path"]) for row in rows] == [
        ("changed", "/etc/hard.conf"),
        ("changed", "/etc/real.conf"),
        ("added", "/etc/real.conf.old"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clone.qcow2", "disk.raw", "tree"]


def test_filesystem_that_notes_errors_is_not_written_to(image):
    subprocess.run(["debugfs", "-w", "-R", "ssv state 2", image], check=True, capture_output=True)
    before = content(image)
    done = imgtool("edit", image, "/etc/real.conf", "-e", "s/22/23/")
    assert done.status == 4
    assert "says that it has errors" in done.err and "e2fsck" in done.err
    assert content(image) == before


def test_faults_from_before_are_said_and_new_ones_undo_all(image):
    command = "sif /etc/real.conf links_count 7"
    subprocess.run(["debugfs", "-w", "-R", command, image], check=True, capture_output=True)
    said: list[str] = []
    with open_guest_to_write(image, notice=said.append) as guest:
        assert isinstance(guest, LibguestfsWritableGuest)
        guest.calls.chmod(guest.resolve("/etc/link.conf"), 0o600)
    assert len(said) == 1 and "had faults before" in said[0]
    before = content(image)
    with (
        pytest.raises(ImgtoolError, match=r"unsound,? .*nothing was changed") as refused,
        open_guest_to_write(image, notice=said.append) as guest,
    ):
        assert isinstance(guest, LibguestfsWritableGuest)
        guest.calls.chmod(guest.resolve("/etc/link.conf"), 0o644)
        guest.handle.umount_all()
        guest.handle.pwrite_device("/dev/sda", b"\xff" * 1024, _inode_bitmap(image))
    assert "had faults before" in str(refused.value.hint)
    assert content(image) == before
    command = "sif /etc/real.conf links_count 2"
    subprocess.run(["debugfs", "-w", "-R", command, image], check=True, capture_output=True)
    before = content(image)
    with (
        pytest.raises(ImgtoolError, match=r"unsound,? .*nothing was changed"),
        open_guest_to_write(image, notice=said.append) as guest,
    ):
        assert isinstance(guest, LibguestfsWritableGuest)
        guest.calls.chmod(guest.resolve("/etc/link.conf"), 0o644)
        guest.handle.umount_all()
        guest.handle.pwrite_device("/dev/sda", b"\xff" * 1024, _inode_bitmap(image))
    assert content(image) == before


def test_a_guest_that_is_hibernated_is_not_written_to(tmp_path, image):
    disk, swap = tmp_path / "guest.raw", tmp_path / "swap"
    swap.touch(0o600)
    os.truncate(swap, 8 << 20)
    subprocess.run(["mkswap", swap], check=True, capture_output=True)
    partitions = "label: gpt\nsize=48MiB\nsize=8MiB\n"
    disk.touch()
    os.truncate(disk, 60 << 20)
    subprocess.run(["sfdisk", "-q", disk], input=partitions.encode(), check=True)
    with disk.open("r+b") as file:
        file.seek(1 << 20)
        file.write(image.read_bytes())
    with disk.open("r+b") as file:
        file.seek(49 << 20)
        file.write(swap.read_bytes())
        file.seek((49 << 20) + 4086)
        file.write(b"S1SUSPEND\0")
    before = content(disk)
    done = imgtool("edit", disk, "/etc/real.conf", "-e", "s/22/23/")
    assert (done.status, "hibernated" in done.err) == (4, True), done.err
    assert "/dev/sda2" in done.err and "shut it down properly" in done.err
    assert content(disk) == before
    done = imgtool("df", "--engine", "libguestfs", disk)
    assert (done.status, done.err) == (0, "")


def test_filesystem_damaged_beyond_its_journal_is_refused(image, tmp_path):
    command = ["debugfs", "-w", "-R", "sif <8> mode 0", image]
    subprocess.run(command, check=True, capture_output=True)
    before = content(image)
    (tmp_path / "new").write_text("content\n")
    for more in ((), ("-m", "/dev/sda")):
        done = imgtool("copy-in", image, tmp_path / "new", "/etc", *more)
        assert (done.status, "cannot be mounted" in done.err) == (3, True), done.err
        assert "hint: " in done.err and "e2fsck" in done.err
    assert content(image) == before


def _inode_bitmap(image: Path) -> int:
    """Where the first inode bitmap is, in bytes."""
    shown = subprocess.run(["dumpe2fs", image], check=True, capture_output=True, text=True).stdout
    block = int(shown.split("Inode bitmap at ")[1].split()[0].rstrip(","))
    size = int(shown.split("Block size:")[1].split()[0])
    return block * size


def test_unwritable_place_fails_soon_and_changes_nothing(image, tmp_path):
    before = content(image)
    (tmp_path / "etc").write_text("a file with the name of a directory\n")
    for words, status, said in (
        (("copy-in", image, tmp_path / "etc", "/nowhere/at/all"), 5, "no such file or directory"),
        (("copy-in", image, tmp_path / "etc", "/"), 4, "directory"),
        (("edit", image, "/etc", "-e", "s/a/b/"), 1, "directory"),
        (("edit", image, "/etc/nothing", "-e", "s/a/b/"), 5, "no such file"),
    ):
        done = imgtool(*words)
        assert (done.status, said in done.err) == (status, True), done.err
        assert "internal error" not in done.err
    assert content(image) == before


def test_an_edit_keeps_the_selinux_label(tmp_path):
    image = tmp_path / "disk.qcow2"
    backing = ("-f", "qcow2", "-F", "qcow2", "-b", guests.guest("selinux"))
    subprocess.run(["qemu-img", "create", "-q", *backing, image], check=True)
    dirs = ("--backing-dir", guests.guest("selinux").parent)
    done = imgtool("edit", image, "/etc/hostname", "-e", "s/^/new-/", "-b", ".bak", *dirs)
    assert (done.status, done.err) == (0, "")
    with open_guest(image, engine="libguestfs", backing_dirs=dirs[1:]) as guest:
        assert isinstance(guest, LibguestfsGuest)
        assert guest.read_bytes("/etc/hostname").startswith(b"new-")
        for path in ("/etc/hostname", "/etc/hostname.bak"):
            raw = guest.calls.getxattr(path.encode(), b"security.selinux")
            label = raw.rstrip(b"\0").decode()
            assert label == guests.SELINUX_LABELS["/etc/hostname"]


def test_a_block_device_is_written_to_whole_or_not_at_all(image, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, for a loop device")
    made = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    )
    device = Path(made.stdout.strip())
    try:
        (tmp_path / "new").write_text("content\n")
        done = imgtool("copy-in", device, tmp_path / "new", "/etc", "--tmp-dir", tmp_path)
        assert (done.status, done.err) == (0, "")
        assert imgtool("cat", device, "/etc/new").out == b"content\n"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.raw", "new", "tree"]
        beside = record_path(device)
        assert not list(beside.parent.glob(f"{beside.stem}*"))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
