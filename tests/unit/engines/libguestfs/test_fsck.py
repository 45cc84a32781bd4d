"""What checkers say of filesystems: old faults, new ones, and checks that came to nothing."""

from __future__ import annotations

import pytest

from imgtool.engines.libguestfs.guest.fsck import (
    Filesystem,
    FsckFailure,
    new_faults,
    parse_fsck,
    refuse_unless_writable,
)
from imgtool.errors import RefusedError
from imgtool.guest.model import Mount


class Handle:
    """An appliance with these mounts, as its kernel lists them."""

    def __init__(self, *rows: str) -> None:
        self._rows = rows

    def debug(self, _: str, __: list[str]) -> str:
        return "\n".join(self._rows)


ROOT_ROW = "/dev/sda1 /sysroot ext4 rw,relatime 0 0"
MOUNTS = (Mount("/dev/sda1", "/"), Mount("/dev/sda2", "/rec"))


@pytest.mark.parametrize("type", ["squashfs", "erofs", "iso9660"])
def test_read_only_kind_keeps_nobody_from_writing_elsewhere(type):
    handle = Handle(ROOT_ROW, f"/dev/sda2 /sysroot/rec {type} ro,relatime 0 0")
    refuse_unless_writable(handle, MOUNTS, ())
    with pytest.raises(RefusedError, match=f"of a kind that can only be read .{type}"):
        handle = Handle(f"/dev/sda1 /sysroot {type} ro 0 0")
        refuse_unless_writable(handle, MOUNTS[:1], ())


def test_read_only_mount_of_a_writable_kind_is_refused():
    handle = Handle(ROOT_ROW, "/dev/sda2 /sysroot/rec ext4 ro,relatime 0 0")
    with pytest.raises(RefusedError, match="hibernated, or damaged"):
        refuse_unless_writable(handle, MOUNTS, ())
    asked = (MOUNTS[0], Mount("/dev/sda2", "/rec", "noatime,ro"))
    refuse_unless_writable(handle, asked, ())


ROOT = Filesystem("/dev/sda1", "/dev/sdb1", "ext4")
SAID = """\
e2fsck 1.47.0 (5-Feb-2023)
Pass 1: Checking inodes, blocks, and sizes
Inode 12 has illegal block(s).  Clear? no

Pass 5: Checking group summary information
Free blocks count wrong for group #0 (23, counted=22).
Fix? no

Block bitmap differences:  +(1--2)
Fix? no


/dev/sdb1: ********** WARNING: Filesystem still has errors **********

/dev/sdb1: 12/12288 files (0.0% non-contiguous), 9000/49152 blocks
"""


def unsound(text: str = SAID, status: int = 4, one: Filesystem = ROOT) -> FsckFailure:
    found = parse_fsck(one, [str(status), str(len(text))], text)
    assert found is not None
    return found


def test_faults_are_told_without_what_stands_around_them():
    assert unsound().faults == (
        "Inode 12 has illegal block(s)",
        "Free blocks count wrong for group #0",
        "Block bitmap differences:  +(1--2)",
    )
    assert unsound().said == "Inode 12 has illegal block(s)"


def test_a_sound_filesystem_has_none():
    for status in (0, 1, 2):
        assert parse_fsck(ROOT, [str(status), "4"], "text") is None
    for kind in ("xfs", "vfat"):
        assert parse_fsck(Filesystem("/dev/sda", "/dev/sda", kind), ["0", "4"], "text") is None


def test_check_that_came_to_nothing_proves_no_soundness():
    for status in (8, 16, 32, 137):
        assert str(status) in unsound("e2fsck 1.47.0 (5-Feb-2023)\n", status).said
    for kind in ("xfs", "vfat"):
        assert unsound("", 137, Filesystem("/dev/sda", "/dev/sda", kind)).faults
    for numbers in ([], [""], ["0"], ["", "12"], ["²", "1"], ["1", "7" * 5000]):
        found = parse_fsck(ROOT, numbers, "")
        assert found is not None and "did not end" in found.said


def test_only_faults_that_were_not_there_before_are_new():
    later = SAID.replace("23, counted=22", "20, counted=19").replace("9000/", "9003/")
    assert new_faults(unsound(), unsound(later.replace("sdb1", "sdc1"))) == ()
    more = later.replace("Inode 12", "Inode 13 has illegal block(s).  Clear? no\n\nInode 12")
    assert new_faults(unsound(), unsound(more)) == ("Inode 13 has illegal block(s)",)
    twice = SAID + "Inode 12 has illegal block(s).  Clear? no\n"
    assert new_faults(unsound(), unsound(twice)) == ("Inode 12 has illegal block(s)",)
    assert new_faults(None, unsound())[0] == "Inode 12 has illegal block(s)"


def test_where_not_all_faults_can_be_compared_all_count_as_new():
    long = parse_fsck(ROOT, ["4", str(1 << 30)], SAID)
    assert long is not None
    assert new_faults(long, unsound()) and new_faults(unsound(), long)
