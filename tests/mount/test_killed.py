"""imgtool killed at any moment of a mount or umount: cleanup finds and undoes it, and only that."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import host
from tests.mount.host import (
    SIGKILLED,
    STATE,
    Loop,
    held,
    here,
    imgtool,
    loops,
    mount_at,
    mounts,
    run,
    started,
    state_of,
    wait_for,
)
from tests.mount.images import Image, attached, make_filesystem, mounted

LOOP_STEPS = ("guard", "loop", "mount")
EXPORT_STEPS = ("guard", "export", "loop", "mount")
STEPS = [("loop", step) for step in LOOP_STEPS] + [("export", step) for step in EXPORT_STEPS]


@contextlib.contextmanager
def decoys(image: Image, folder: Path) -> Iterator[tuple[Loop, subprocess.Popen[bytes]]]:
    """A loop device on the very same stretch of the image, and a daemon that serves it too."""
    point = folder / "decoy"
    point.touch()
    driver = "raw" if image.format == "raw" else "qcow2"
    node = {
        "driver": driver,
        "node-name": "decoy",
        "file": {"driver": "file", "filename": str(image.path)},
        "read-only": True,
    }
    daemon = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", json.dumps(node)),
            *("--export", f"type=fuse,id=decoy,node-name=decoy,mountpoint={point}"),
        ]
    )
    stretch = ("--read-only", "--offset", image.offset, "--sizelimit", image.size)
    try:
        wait_for(lambda: any(row.target == str(point) for row in mounts()), "the decoy's export")
        with attached(image.path, *stretch) as device:
            (ours,) = [row for row in loops() if f"/dev/{row.name}" == device]
            yield ours, daemon
    finally:
        daemon.terminate()
        daemon.wait()


@pytest.fixture(scope="module")
def image(images, tmp_path_factory):
    """The image that is mounted, and killed over, again and again; the decoys stand on it too."""
    found = images.copy(images.get("ext4"), tmp_path_factory.mktemp("killed"))
    before = state_of(found.files)
    with decoys(found, found.path.parent) as (loop, daemon):
        yield found
        assert loop in loops(), "the decoy was detached"
        assert daemon.poll() is None, "the decoy was ended"
        content = found.path.with_name("decoy").read_bytes()
    assert content == found.path.read_bytes()
    assert state_of(found.files) == before


@pytest.fixture
def nothing_more(tmp_path_factory):
    """Asks whether the host holds what it held before, the decoys among it, and no more."""
    ours = tmp_path_factory.getbasetemp()
    before = held(ours)

    def check() -> None:
        assert held(ours) == before

    return check


def mount_words(image: Image, place: Path, via: str) -> tuple[object, ...]:
    return ("mount", image.path, place, "--via", via, *image.chosen)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("via", "step"), STEPS)
def test_killed_while_it_mounts(image, place, nothing_more, via, step, when):
    done = imgtool(*mount_words(image, place, via), fail_at=f"{when} {step}")
    assert done.status == SIGKILLED, "the failpoint was not met"
    (row,) = here("mounts", "-o", "jsonl").rows
    assert (row["state"], row["mountpoint"]) == ("left behind", str(place))
    assert str(place) in here("cleanup").out
    nothing_more()
    assert list(place.iterdir()) == []
    assert here("mounts", "-o", "jsonl").rows == []


@pytest.mark.parametrize("via", ["loop", "export"])
def test_killed_when_it_was_finished(image, place, nothing_more, via):
    done = imgtool(*mount_words(image, place, via), fail_at="finished")
    assert done.status == SIGKILLED
    # Nobody held the loop device's descriptor any more but the mount itself.
    assert here("cleanup").out == ""
    assert (place / "one" / "two").is_dir()
    (row,) = here("mounts", "-o", "jsonl").rows
    assert row["state"] == "healthy"
    here("umount", place)
    nothing_more()


@pytest.mark.parametrize("when", ["before undoing", "after undoing"])
@pytest.mark.parametrize(("via", "step"), STEPS)
def test_killed_while_it_unmounts(image, place, nothing_more, via, step, when):
    here(*mount_words(image, place, via))
    done = imgtool("umount", place, fail_at=f"{when} {step}")
    assert done.status == SIGKILLED, "the failpoint was not met"
    (row,) = here("mounts", "-o", "jsonl").rows
    assert row["state"] == "left behind"
    here("cleanup")
    nothing_more()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("last", ["cleanup", "umount"])
def test_killed_before_the_journal_goes(image, place, nothing_more, last):
    here(*mount_words(image, place, "export"))
    assert imgtool("umount", place, fail_at="before removing").status == SIGKILLED
    assert list(place.iterdir()) == []
    here("cleanup") if last == "cleanup" else here("umount", place)
    nothing_more()


def test_cleanup_itself_is_killed(image, place, nothing_more):
    """What it had not undone is still in the journal."""
    assert imgtool(*mount_words(image, place, "export"), fail_at="after mount").status == SIGKILLED
    for point in ("before undoing mount", "after undoing loop", "before undoing export"):
        assert imgtool("cleanup", fail_at=point).status == SIGKILLED
    here("cleanup")
    nothing_more()


def test_what_was_written_is_kept(images, place, tmp_path, nothing_more):
    """Killed while it unmounts what was written to: the rest of it gets into the image too."""
    image = images.copy(images.get("xfs", "gpt", "qcow2"), tmp_path)
    content = os.urandom(4 << 20)
    here(*mount_words(image, place, "export"), "--rw")
    (place / "written").write_bytes(content)
    assert imgtool("umount", place, fail_at="after undoing mount").status == SIGKILLED
    here("cleanup")
    here(*mount_words(image, place, "export"))
    assert (place / "written").read_bytes() == content
    here("umount", place)
    nothing_more()


@pytest.mark.parametrize("via", ["loop", "export"])
def test_killed_while_a_journal_is_replayed(images, place, tmp_path, nothing_more, via):
    """The second attempt, on an overlay."""
    live, image = tmp_path / "live.fs", tmp_path / "crashed.raw"
    with mounted(make_filesystem(live, "ext4", None)) as root:
        (root / "file").write_bytes(b"in the journal\n")
        run("sync", "--file-system", root)
        (root / "later").write_bytes(b"in the journal\n")
        run("sync", root / "later")
        shutil.copyfile(live, image)
    before = state_of([image])
    words = ("mount", image, place, "--via", via, "-m", "/dev/sda")
    for point in ("before overlay", "after overlay", "after export"):
        assert imgtool(*words, fail_at=point).status == SIGKILLED
        here("cleanup")
        nothing_more()
    for point in ("before undoing overlay", "after undoing overlay"):
        here(*words)
        assert (place / "later").read_bytes() == b"in the journal\n"
        assert imgtool("umount", place, fail_at=point).status == SIGKILLED
        here("cleanup")
        nothing_more()
    assert state_of([image]) == before


def test_several_at_once_and_a_healthy_one_among_them(image, place, nothing_more, tmp_path):
    places = [tmp_path / str(number) for number in range(3)]
    here(*mount_words(image, place, "export"))
    for folder, point in zip(places, ("after export", "after mount", "before loop"), strict=True):
        folder.mkdir()
        assert imgtool(*mount_words(image, folder, "export"), fail_at=point).status == SIGKILLED
    assert len(here("cleanup").out.splitlines()) == 3
    (row,) = here("mounts", "-o", "jsonl").rows
    assert (row["mountpoint"], row["state"]) == (str(place), "healthy")
    assert (place / "one").is_dir()
    here("umount", place)
    nothing_more()


@pytest.mark.parametrize("via", ["loop", "export"])
@pytest.mark.parametrize("point", ["before mount", "after mount"])
def test_next_mount_at_the_same_place_is_not_mixed_up(image, place, nothing_more, via, point):
    """The second one may get the loop device of the same number."""
    assert imgtool(*mount_words(image, place, via), fail_at=point).status == SIGKILLED
    again = imgtool(*mount_words(image, place, via))
    if point == "after mount":
        assert again.status == 4
        assert "mounted there already" in again.err
        here("cleanup")
        here(*mount_words(image, place, via))
    else:
        assert again.status == 0, again.err
    here("cleanup")
    assert mount_at(place).type == "ext4"
    (row,) = here("mounts", "-o", "jsonl").rows
    assert row["state"] == "healthy"
    here("umount", place)
    nothing_more()


def test_a_device_that_is_somebody_elses_by_now_is_not_touched(image, place, nothing_more):
    """Its number and its image are as the journal says: the mark is not."""
    here(*mount_words(image, place, "loop"))
    source = mount_at(place).source
    run("umount", place)  # and with it goes the loop device
    stretch = ("--offset", image.offset, "--sizelimit", image.size, "--read-only")
    run("losetup", *stretch, source, image.path)
    try:
        (row,) = here("mounts", "-o", "jsonl").rows
        assert row["state"] == "broken"
        here("cleanup")
        assert f"{source}" in run("losetup", "--list", "--noheadings", source)
    finally:
        run("losetup", "--detach", source)
    nothing_more()


def test_a_daemon_that_was_killed(image, place, nothing_more):
    here(*mount_words(image, place, "export"))
    (folder,) = [path for path in STATE.iterdir() if path.name not in host.strangers(place.parent)]
    (daemon,) = [
        pid for pid, command in host.processes().items()
        if "qemu-storage-daemon" in command and str(folder) in command
    ]  # fmt: skip
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: daemon not in host.processes(), "the daemon's end")
    table = here("mounts")
    assert "broken" in table.out
    assert "qemu-storage-daemon is gone" in table.err
    assert "imgtool cleanup" in table.err
    here("cleanup")
    nothing_more()


def test_a_mount_that_somebody_unmounted_by_hand(image, place, nothing_more):
    here(*mount_words(image, place, "export"))
    run("umount", place)
    (row,) = here("mounts", "-o", "jsonl").rows
    assert row["state"] == "broken"
    assert any(str(place) in problem for problem in row["problems"])
    here("umount", place)
    nothing_more()


def test_journal_of_an_earlier_boot_alone_is_removed(image, place, nothing_more):
    """What has the same number and place today is not what the journal speaks of."""
    here(*mount_words(image, place, "loop"))
    (folder,) = [path for path in STATE.iterdir() if path.name not in host.strangers(place.parent)]
    old = folder.with_name("0123456789ab")
    shutil.copytree(folder, old)
    journal = json.loads((old / "journal.json").read_text())
    journal["boot"] = "00000000-0000-4000-8000-000000000000"
    (old / "journal.json").write_text(json.dumps(journal))
    assert here("cleanup").out.count(str(place)) == 1
    assert not old.exists()
    (row,) = here("mounts", "-o", "jsonl").rows
    assert row["state"] == "healthy"
    assert (place / "one").is_dir()
    here("umount", place)
    nothing_more()


@pytest.mark.parametrize("content", [(), ("journal.draft",), ("appliance.log", "ready")])
def test_a_folder_without_a_journal_goes(content, nothing_more):
    """As it is when imgtool is killed before it wrote the first line, or removing the last file."""
    STATE.mkdir(mode=0o700, exist_ok=True)
    folder = STATE / "0123456789ab"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("{")
    here("cleanup")
    assert not folder.exists()
    nothing_more()


# Interrupted


def _fake_daemon(folder: Path, script: str) -> dict[str, str]:
    """An environment in which this is QEMU's storage daemon."""
    folder.mkdir()
    program = folder / "qemu-storage-daemon"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_ctrl_c_while_it_mounts(image, place, nothing_more, tmp_path):
    reached = tmp_path / "reached"
    env = _fake_daemon(tmp_path / "bin", f"touch '{reached}'; exec sleep 600")
    with started(*mount_words(image, place, "export"), env=env) as process:
        wait_for(reached.exists, "the daemon's start")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode() == "imgtool: error: interrupted\n"
    nothing_more()


def test_a_daemon_that_fails(image, place, nothing_more, tmp_path):
    env = _fake_daemon(tmp_path / "bin", "echo 'qemu-storage-daemon: no luck today' >&2; exit 1")
    done = imgtool(*mount_words(image, place, "export"), "-v", env=env)
    assert done.status == 3
    assert "imgtool: error: QEMU cannot serve it" in done.err
    assert "no luck today" in done.err  # its own words are for -v
    nothing_more()


# Several imgtools at the same time


def _waiting_daemon(folder: Path) -> tuple[dict[str, str], Path, Path]:
    """A daemon that waits to be told to start: the environment, what says that it waits, and what
    lets it go on."""
    waits, go = folder.with_name("waits"), folder.with_name("go")
    real = shutil.which("qemu-storage-daemon")
    loop = f"touch '{waits}'; while [ ! -e '{go}' ]; do sleep 0.02; done"
    return _fake_daemon(folder, f'{loop}; exec {real} "$@"'), waits, go


def test_cleanup_leaves_a_mount_in_the_making_alone(image, place, nothing_more, tmp_path):
    env, waits, go = _waiting_daemon(tmp_path / "bin")
    with started(*mount_words(image, place, "export"), env=env) as process:
        wait_for(waits.exists, "the daemon's start")
        (row,) = here("mounts", "-o", "jsonl").rows
        assert row["state"] == "mounting"
        assert here("cleanup").out == ""
        refused = imgtool("umount", place)
        assert refused.status == 4
        assert "another imgtool" in refused.err
        second = imgtool(*mount_words(image, place, "loop"))
        assert second.status == 4
        go.touch()
        assert process.wait(60) == 0
    assert (place / "one").is_dir()
    here("umount", place)
    nothing_more()


def test_two_umounts_at_once(image, place, nothing_more):
    for _ in range(4):
        here(*mount_words(image, place, "export"))
        with started("umount", place) as one, started("umount", place) as two:
            answers = [process.communicate(timeout=60)[1].decode() for process in (one, two)]
        assert 0 in (one.returncode, two.returncode), answers
        # The other came too late (1), came in between (4), or saw that it was done (0).
        assert {one.returncode, two.returncode} <= {0, 1, 4}, answers
        assert not any("internal error" in answer for answer in answers), answers
        nothing_more()


def test_two_writers_that_start_at_once(images, place, tmp_path, nothing_more):
    image = images.copy(images.get("ext4"), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for _ in range(4):
        words = ("--via", "loop", "--rw", *image.chosen)
        with (
            started("mount", image.path, place, *words) as one,
            started("mount", image.path, other, *words) as two,
        ):
            said = [process.communicate(timeout=60)[1].decode() for process in (one, two)]
        statuses = sorted((one.returncode, two.returncode))
        assert statuses in ([0, 4], [4, 4]), said
        for folder in (place, other):
            if any(row.target == str(folder) for row in mounts()):
                here("umount", folder)
    nothing_more()
