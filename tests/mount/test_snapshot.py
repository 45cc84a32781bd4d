"""`mount --snapshot`: the guest as it was, and an image that is as it was too."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.host import (
    SIGKILLED,
    STATE,
    held,
    here,
    imgtool,
    mount_at,
    processes,
    run,
    state_of,
    strangers,
    tree,
    wait_for,
)
from tests.mount.images import MIB, Image

NAME = "before, all; it's"
PATIENCE = 300  # seconds; an emulated appliance


def with_snapshot(image: Image) -> Image:
    """A snapshot of the image, after which its filesystem is overwritten with noise."""
    run("qemu-img", "snapshot", "-c", "first", image.path)
    run("qemu-img", "snapshot", "-c", NAME, image.path)
    command = f"write -q -P 0xa5 {image.offset} {image.size}"
    run("qemu-io", "-f", "qcow2", "-c", command, image.path)
    return image


@pytest.fixture(scope="module")
def image(images, tmp_path_factory):
    return with_snapshot(
        images.copy(images.get("ext4", "gpt", "qcow2"), tmp_path_factory.mktemp("snapshot"))
    )


@pytest.fixture
def nothing_more(tmp_path_factory):
    """Asks whether the host holds what it held before and no more."""
    ours = tmp_path_factory.getbasetemp()
    before = held(ours)

    def check() -> None:
        assert held(ours) == before

    return check


def words(image: Image, place: Path, *more: str) -> tuple[object, ...]:
    return ("mount", image.path, place, "--snapshot", NAME, "--via", "export", *image.chosen, *more)


def plain_tree(image: Image, place: Path) -> dict[bytes, object]:
    here("mount", image.path, place, "--via", "loop", *image.chosen)
    found = tree(place)
    here("umount", place)
    return dict(found)


@pytest.mark.parametrize(
    ("filesystem", "format"), [("ext4", "qcow2"), ("xfs", "chain"), ("btrfs", "qcow2")]
)
def test_the_files_are_those_of_then(images, place, tmp_path, filesystem, format):
    was = plain_tree(images.get(filesystem), place)
    image = with_snapshot(images.copy(images.get(filesystem, "gpt", format), tmp_path))
    before = state_of(image.files)
    now = imgtool("mount", image.path, place, "--via", "export", *image.chosen)
    here(*words(image, place))
    mounted = mount_at(place)
    found = tree(place)
    here("umount", place)
    assert now.status == 1  # what is there today is noise
    assert {"ro", "nosuid", "nodev", "noexec"} <= mounted.options
    assert found == was
    assert state_of(image.files) == before


def test_a_layout_that_is_looked_for(images, place, tmp_path):
    """On a disk with one filesystem, found in the snapshot and not in what is there now."""
    image = with_snapshot(images.copy(images.get("ext4", "whole", "qcow2"), tmp_path))
    here("mount", image.path, place, "--via", "export", "--snapshot", NAME)
    found = (place / "one/two/three/deep").read_bytes()
    here("umount", place)
    assert found == b"down here\n"


def test_a_disk_that_was_larger_then_is_shown_as_it_was(images, place, tmp_path):
    was = plain_tree(images.get("ext4"), place)
    image = images.copy(images.get("ext4", "gpt", "qcow2"), tmp_path)
    run("qemu-img", "snapshot", "-c", NAME, image.path)
    run("qemu-img", "resize", "-q", "--shrink", image.path, str(image.offset + MIB))
    run("qemu-io", "-f", "qcow2", "-c", "write -q -z 0 1M", image.path)
    before = state_of(image.files)
    here(*words(image, place))
    found = tree(place)
    here("umount", place)
    assert found == was
    assert state_of(image.files) == before


@pytest.mark.appliance
def test_through_the_appliance(image, place):
    before = state_of(image.files)
    said = ("mount", image.path, place, "--via", "fuse", "--snapshot", NAME, *image.chosen)
    done = imgtool(*said, limit=PATIENCE)
    assert done.status == 0, done.err
    (row,) = here("mounts", "-o", "jsonl").rows
    found = (place / "one/two/three/deep").read_bytes()
    here("umount", place)
    assert (row["snapshot"], row["state"]) == (NAME, "healthy")
    assert found == b"down here\n"
    assert state_of(image.files) == before


def test_mounts_shows_the_snapshot_where_there_is_one(image, images, place, tmp_path):
    other, plain = tmp_path / "other", images.get("ext4")
    other.mkdir()
    here("mount", plain.path, other, "--via", "loop", *plain.chosen)
    assert "SNAPSHOT" not in here("mounts").out
    here(*words(image, place))
    titles, *lines = here("mounts").out.splitlines()
    rows = here("mounts", "-o", "jsonl").rows
    here("umount", place)
    here("umount", other)
    assert "SNAPSHOT" in titles
    assert [NAME in line for line in lines] == [False, True]
    assert [row["snapshot"] for row in rows] == [None, NAME]
    assert rows[1]["state"] == "healthy"


def test_by_its_number_and_two_at_once(image, place, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    here(*words(image, place))
    here("mount", image.path, other, "--snapshot", "1", "--via", "export", *image.chosen)
    assert tree(place) == tree(other)
    here("umount", place)
    assert (other / "one").is_dir()
    here("umount", other)


def test_nobody_writes_to_the_image_meanwhile(image, place, tmp_path):
    (tmp_path / "file").write_text("new\n")
    copy = ("copy-in", image.path, "-m", image.device, tmp_path / "file", "/")
    here(*words(image, place))
    refused = imgtool(*copy)
    here("umount", place)
    assert refused.status == 4
    assert f"in use by imgtool's own mount at {place} (qemu-nbd, process " in refused.err
    assert f"hint: imgtool umount '{place}'\n" in refused.err


def test_a_disk_that_has_grown_since(images, place, tmp_path):
    image = images.copy(images.get("ext4", "gpt", "qcow2"), tmp_path)
    run("qemu-img", "snapshot", "-c", NAME, image.path)
    run("qemu-img", "resize", "-q", image.path, f"+{32 * MIB}")
    here(*words(image, place))
    found = (place / "one/two/three/deep").read_bytes()
    here("umount", place)
    assert found == b"down here\n"


# Refused


@pytest.mark.parametrize("via", ["auto", "fuse", "export"])
def test_an_unknown_snapshot(image, place, via):
    done = imgtool("mount", image.path, place, "--via", via, "--snapshot", "none", *image.chosen)
    assert done.status == 5
    assert "no internal snapshot 'none'" in done.err
    assert f"  hint: it has: first, {NAME}\n" in done.err


@pytest.mark.parametrize("via", ["auto", "loop", "export"])
def test_a_raw_image_has_none(images, place, via):
    image = images.get("ext4")
    done = imgtool("mount", image.path, place, "--via", via, "--snapshot", "x", *image.chosen)
    assert done.status == 5
    assert "it has no internal snapshots" in done.err


def test_a_snapshot_is_not_written_to(image, place):
    before = state_of(image.files)
    done = imgtool(*words(image, place, "--rw"))
    assert done.status == 2
    assert "a snapshot cannot be written to" in done.err
    assert "  hint: leave out --rw" in done.err
    assert state_of(image.files) == before


def test_loop_devices_cannot_show_one(image, place):
    said = ("mount", image.path, place, "--via", "loop", "--snapshot", NAME, *image.chosen)
    done = imgtool(*said)
    assert done.status == 6
    assert "it takes raw images, and this is qcow2" in done.err


# Killed


@contextlib.contextmanager
def decoy(image: Image, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody else's server of the same snapshot."""
    socket = folder / "decoy.socket"
    options = ("--read-only", "--persistent", f"--socket={socket}")
    process = subprocess.Popen(["qemu-nbd", *options, "--load-snapshot=snapshot.id=2", image.path])
    try:
        wait_for(socket.exists, "the decoy's socket")
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("step", ["snapshot", "export", "mount"])
@pytest.mark.parametrize("when", ["before", "after", "before undoing", "after undoing"])
def test_killed_at_any_step(image, place, tmp_path, nothing_more, when, step):
    before = state_of(image.files)
    with decoy(image, tmp_path) as other:
        point = f"{when} {step}"
        if "undoing" in when:
            here(*words(image, place))
            assert imgtool("umount", place, fail_at=point).status == SIGKILLED
        else:
            assert imgtool(*words(image, place), fail_at=point).status == SIGKILLED
        (row,) = here("mounts", "-o", "jsonl").rows
        assert (row["state"], row["snapshot"]) == ("left behind", NAME)
        assert str(place) in here("cleanup").out
        assert other.poll() is None, "cleanup ended somebody else's server"
    nothing_more()
    assert list(place.iterdir()) == []
    assert state_of(image.files) == before


def _server(folder: Path) -> int:
    (found,) = [
        pid
        for pid, command in processes().items()
        if f"--socket={folder}/snapshot0.socket" in command
    ]
    return found


def test_a_server_that_was_killed(image, place, nothing_more):
    here(*words(image, place))
    (folder,) = [path for path in STATE.iterdir() if path.name not in strangers(place.parent)]
    server = _server(folder)
    os.kill(server, 9)
    wait_for(lambda: server not in processes(), "the server's end")
    (row,) = here("mounts", "-o", "jsonl").rows
    assert row["state"] == "broken"
    assert "the server of the snapshot is gone" in row["problems"]
    here("cleanup")
    nothing_more()


def test_a_server_that_fails(image, place, nothing_more, tmp_path):
    """It is told apart from the one that reads the partition table, which is the real one."""
    real = shutil.which("qemu-nbd")
    program = tmp_path / "bin" / "qemu-nbd"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--fork*) echo "qemu-nbd: no luck today" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    program.chmod(0o755)
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = imgtool(*words(image, place), env=env)
    assert done.status == 3
    assert "the snapshot cannot be read" in done.err and "no luck today" not in done.err
    assert "no luck today" in imgtool(*words(image, place), "-v", env=env).err
    nothing_more()
