"""--rw: what is written is in the image, and nobody else's data are put at risk."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.host import here, imgtool, mount_at, run, state_of, wait_for
from tests.mount.images import overlay


@contextlib.contextmanager
def storage_daemon(image: Path, *, writes: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU that has the image open, as a running guest does."""
    socket = image.with_name("daemon.socket")
    driver = "raw" if image.suffix == ".raw" else "qcow2"
    node = {
        "driver": driver,
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(image)},
        "read-only": not writes,
    }
    export = "type=nbd,id=export,node-name=disk" + (",writable=on" if writes else "")
    process = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", json.dumps(node)),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}", "--export", export),
        ]
    )
    try:
        wait_for(socket.exists, "the daemon's socket")
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def nbd_server(image: Path) -> Iterator[None]:
    socket = image.with_name("nbd.socket")
    format = "raw" if image.suffix == ".raw" else "qcow2"
    process = subprocess.Popen(["qemu-nbd", "-t", "-f", format, "-k", socket, image])
    try:
        wait_for(socket.exists, "the server's socket")
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("filesystem", "format", "via"),
    [
        ("ext4", "raw", "loop"),
        ("xfs", "raw", "loop"),
        ("btrfs", "raw", "loop"),
        ("ext4", "raw", "export"),
        ("xfs", "qcow2", "export"),
        ("btrfs", "qcow2", "export"),
        ("xfs", "chain", "export"),
    ],
)
def test_what_is_written_is_in_the_image(images, place, tmp_path, filesystem, format, via):
    image = images.copy(images.get(filesystem, "gpt", format), tmp_path)
    below = state_of(image.files[1:])
    content = os.urandom(3_000_000)
    here("mount", image.path, place, "--via", via, "--rw", *image.chosen)
    options = mount_at(place).options
    (place / "written").write_bytes(content)
    (place / "noise").unlink()
    (place / "one" / "moved").symlink_to("two")
    (row,) = here("mounts", "-o", "jsonl").rows
    here("umount", place)
    assert row["mode"] == "rw"
    assert {"rw", "nosuid", "nodev", "noexec"} <= options
    assert state_of(image.files[1:]) == below, "a base was written to"
    if format != "raw":
        run("qemu-img", "check", "-q", image.path)
    if filesystem == "btrfs":
        here("mount", image.path, place, "--via", "export", *image.chosen)
        found, gone = (place / "written").read_bytes(), (place / "noise").exists()
        here("umount", place)
    else:
        copied = tmp_path / "out"
        copied.mkdir()
        here("copy-out", image.path, "-m", image.device, "/written", copied)
        found = (copied / "written").read_bytes()
        gone = imgtool("ls", image.path, "-m", image.device, "/noise").status == 0
    assert found == content
    assert not gone


@pytest.mark.parametrize("via", ["loop", "export"])
def test_an_ext_that_says_that_it_has_errors_is_not_written_to(images, place, tmp_path, via):
    """As `copy-in` has it; the kernel only warns, and writes."""
    image = images.copy(images.get("ext4", "whole"), tmp_path)
    run("debugfs", "-w", "-R", "set_super_value state 2", image.path)
    before = state_of(image.files)
    refused = imgtool("mount", image.path, place, "--via", via, "--rw", *image.chosen)
    assert refused.status == 4
    assert "says that it has errors" in refused.err
    assert state_of(image.files) == before
    assert not place.is_mount()
    here("mount", image.path, place, "--via", via, *image.chosen)
    here("umount", place)


def test_programs_run_with_exec_alone(images, place):
    image = images.get("ext4")
    for options, allowed in (((), False), (("--exec",), True)):
        here("mount", image.path, place, "--via", "loop", *image.chosen, *options)
        try:
            done = subprocess.run([place / "program"], capture_output=True, check=False)
            assert (done.stdout == b"run\n") == allowed
        except PermissionError:
            assert not allowed
        assert {"nosuid", "nodev"} <= mount_at(place).options
        here("umount", place)


@pytest.mark.parametrize("via", ["loop", "export"])
def test_an_image_that_a_daemon_writes_to_is_refused(images, place, tmp_path, via):
    image = images.copy(images.get("ext4"), tmp_path)
    with storage_daemon(image.path, writes=True) as daemon:
        done = imgtool("mount", image.path, place, "--via", via, "--rw", *image.chosen)
        assert (done.status, str(daemon.pid) in done.err) == (4, True), done.err
    here("mount", image.path, place, "--via", via, "--rw", *image.chosen)
    here("umount", place)


def test_an_image_that_a_server_writes_to_is_refused(images, place, tmp_path):
    image = images.copy(images.get("ext4", "gpt", "qcow2"), tmp_path)
    with nbd_server(image.path):
        done = imgtool("mount", image.path, place, "--via", "export", "--rw", *image.chosen)
        assert done.status == 4
        assert "qemu-nbd" in done.err
        assert "hint:" in done.err


def test_a_reader_of_an_image_that_is_written_is_warned(images, place, tmp_path):
    image = images.copy(images.get("ext4", "gpt", "qcow2"), tmp_path)
    with storage_daemon(image.path, writes=True):
        done = here("mount", image.path, place, "--via", "export", *image.chosen)
        assert "may be inconsistent" in done.err
        assert (place / "one").is_dir()
        here("umount", place)


@pytest.mark.parametrize("via", ["loop", "export"])
def test_the_base_of_an_overlay_is_refused(images, place, tmp_path, via):
    image = images.copy(images.get("ext4"), tmp_path)
    above = overlay(tmp_path / "above.qcow2", image.path, "raw")
    before = state_of([image.path, above])
    done = imgtool("mount", image.path, place, "--via", via, "--rw", *image.chosen)
    assert done.status == 4
    assert "above.qcow2" in done.err
    assert state_of([image.path, above]) == before
    here("mount", image.path, place, "--via", via, *image.chosen)
    here("umount", place)


@pytest.mark.parametrize(("first", "second"), [("--rw", "--rw"), ("--rw", ""), ("", "--rw")])
@pytest.mark.parametrize("via", ["loop", "export"])
def test_one_writer_and_nobody_else(images, place, tmp_path, via, first, second):
    image = images.copy(images.get("ext4"), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    here("mount", image.path, place, "--via", via, *image.chosen, *first.split())
    done = imgtool("mount", image.path, other, "--via", via, *image.chosen, *second.split())
    here("umount", place)
    assert done.status == 4, done.err
    assert str(place) in done.err or "in use" in done.err
    assert "hint:" in done.err
    assert list(other.iterdir()) == []


def test_readers_share_an_image(images, place, tmp_path):
    image = images.get("ext4")
    other = tmp_path / "other"
    other.mkdir()
    here("mount", image.path, place, "--via", "loop", *image.chosen)
    here("mount", image.path, other, "--via", "export", *image.chosen)
    here("umount", place)
    assert (other / "one").is_dir()
    here("umount", other)


@pytest.mark.parametrize("name", ["symlink", "hard link"])
def test_another_name_does_not_let_a_second_writer_in(images, place, tmp_path, name):
    image = images.copy(images.get("ext4"), tmp_path)
    again = tmp_path / "again.raw"
    if name == "symlink":
        again.symlink_to(image.path)
    else:
        again.hardlink_to(image.path)
    other = tmp_path / "other"
    other.mkdir()
    here("mount", image.path, place, "--via", "loop", "--rw", *image.chosen)
    done = imgtool("mount", again, other, "--via", "loop", "--rw", *image.chosen)
    here("umount", place)
    assert done.status == 4, done.err


@pytest.mark.parametrize("words", [(), ("--via", "loop")])
def test_force_means_nothing_without_rw(images, place, words):
    image = images.get("ext4")
    assert imgtool("mount", image.path, place, "--force", "hibernated", *words).status == 2


def test_two_overlays_of_one_base_are_written_at_once(images, place, tmp_path):
    base = images.copy(images.get("ext4", "gpt", "qcow2"), tmp_path)
    before = state_of([base.path])
    clones = [overlay(tmp_path / f"{name}.qcow2", base.path) for name in ("one", "two")]
    places = [place, tmp_path / "second", tmp_path / "base"]
    for number, clone in enumerate(clones):
        places[number].mkdir(exist_ok=True)
        here("mount", clone, places[number], "--via", "export", "--rw", *base.chosen)
        (places[number] / "whose").write_text(clone.name)
    places[2].mkdir()
    here("mount", base.path, places[2], "--via", "export", *base.chosen)
    refused = imgtool("mount", base.path, places[2], "--via", "export", "--rw", *base.chosen)
    assert refused.status == 4
    for folder in places:
        here("umount", folder)
    for clone in clones:
        here("mount", clone, place, "--via", "export", *base.chosen)
        assert (place / "whose").read_text() == clone.name
        here("umount", place)
    assert state_of([base.path]) == before
