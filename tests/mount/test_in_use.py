"""An image that the kernel writes to, through a loop device or as a device that is mounted, is in
use: writers are refused, readers are warned."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgtool.image.locking.attached import attached_to
from imgtool.image.locking.locks import holders
from tests.mount.host import here, imgtool, run
from tests.mount.images import attached


@pytest.fixture
def image(images, tmp_path):
    """A raw image that is the test's own."""
    return images.copy(images.get("ext4"), tmp_path)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("new\n")
    return path


def copied_in(image, file):
    return imgtool("copy-in", image.path, "-m", image.device, file, "/")


def stretch(image):
    return ("--offset", image.offset, "--sizelimit", image.size)


def test_what_imgtool_has_mounted_to_be_written(image, place, file):
    here("mount", image.path, place, "--via", "loop", "--rw", *image.chosen)
    refused = copied_in(image, file)
    warned = here("cat", image.path, "-m", image.device, "/one/two/three/deep")
    here("umount", place)
    assert refused.status == 4, refused.err
    assert "in use by the loop device /dev/loop" in refused.err
    assert f"mounted at {place}" in refused.err
    assert "imgtool mounts" in refused.err
    assert warned.out == "down here\n"
    assert f"mounted at {place}: what is read may be inconsistent" in warned.err


def test_what_imgtool_has_mounted_to_be_read(image, place, file):
    here("mount", image.path, place, "--via", "loop", *image.chosen)
    refused = copied_in(image, file)
    read = here("cat", image.path, "-m", image.device, "/one/two/three/deep")
    here("umount", place)
    assert refused.status == 4, refused.err
    assert (read.out, read.err) == ("down here\n", "")


@pytest.mark.parametrize("via", ["loop", "export"])
def test_somebodys_loop_device(image, place, via):
    words = ("mount", image.path, place, "--via", via, *image.chosen)
    with attached(image.path, *stretch(image)) as device:
        refused = imgtool(*words, "--rw")
        here(*words)
        here("umount", place)
    assert refused.status == 4, refused.err
    assert f"in use by the loop device {device}" in refused.err
    here(*words, "--rw")
    here("umount", place)


def test_a_loop_device_that_only_reads(image, place, file):
    words = ("mount", image.path, place, "--via", "loop", *image.chosen)
    with attached(image.path, "--read-only", *stretch(image)) as device:
        (holder,) = holders(image.path)
        refused = imgtool(*words, "--rw")
        read = here(*words)
        here("umount", place)
    assert (holder.writes, holder.exclusive) == (False, True)
    assert (refused.status, read.err) == (4, "")
    assert device in refused.err


def test_it_is_the_file_whatever_it_is_called_now(image, tmp_path):
    """The kernel tells the name by which it was attached."""
    with attached(image.path) as device:
        again = tmp_path / "again.raw"
        image.path.rename(again)
        assert [found.program for found in attached_to(again)] == [f"the loop device {device}"]
        image.path.write_bytes(bytes(512))
        assert attached_to(image.path) == []
        again.unlink()


def test_a_partition_of_it_is_mounted(image, place):
    with attached(image.path, *stretch(image)) as device:
        run("mount", "-o", "ro", device, place)
        try:
            (found,) = attached_to(image.path)
        finally:
            run("umount", place)
    assert found.program == f"the loop device {device}, mounted at {place}"


@pytest.mark.parametrize("option", ["rw", "ro"])
def test_a_device_that_is_mounted(images, place, tmp_path, option):
    """As /dev/vg/guest would be: here a loop device stands for it."""
    image = images.copy(images.get("btrfs", "whole"), tmp_path)
    with attached(image.path) as device:
        assert holders(device) == ()
        run("mount", "-o", option, device, place)
        try:
            (holder,) = holders(device)
            other = tmp_path / "other"
            other.mkdir()
            refused = imgtool("mount", device, other, "--via", "export", "--format", "raw", "--rw")
        finally:
            run("umount", place)
    assert str(holder) == f"the host, mounted at {place}"
    assert (holder.writes, holder.exclusive) == (option == "rw", True)
    assert refused.status == 4, refused.err
    assert f"in use by the host, mounted at {place}" in refused.err


def test_a_loop_device_over_a_device(image):
    with attached(image.path) as below, attached(Path(below), "--read-only") as above:
        (found,) = attached_to(Path(below))
    assert (found.program, found.writes) == (f"the loop device {above}", False)
