"""Hints about mounts, devices and what else is of this host, each followed to the letter."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hints import images as small
from tests.hints.following import Done, commands_in, hint, imgtool, pattern_of, type_in
from tests.mount import host
from tests.mount.images import attached
from tests.support import holding
from tests.support.room import small_disk

LOOP = ("--via", "loop", "-m", "/dev/sda")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder whose name a shell takes apart, with a filesystem in it."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    small.ext("disk.raw")


def brought_up(template: str, done: Done) -> str:
    """The hint, which has this template."""
    text = hint(done.err)
    assert pattern_of(template).fullmatch(text), text
    return text


def mounted(*options: str, at: str = "place") -> Done:
    Path(at).mkdir(exist_ok=True)
    done = imgtool("mount", "disk.raw", at, *LOOP, *options)
    assert done.status == 0, done.err
    return done


def unmounted(at: str = "place") -> None:
    done = imgtool("umount", at)
    assert done.status == 0, done.err


def test_a_directory_that_is_not_there():
    words = ("mount", "disk.raw", "no such/place", *LOOP)
    (command,) = commands_in(brought_up("mkdir -p {}", imgtool(*words)))
    assert type_in(command).status == 0
    assert imgtool(*words).status == 0 and Path("no such/place/name").read_text() == "text"
    unmounted("no such/place")


def test_an_image_that_is_mounted_already():
    mounted("--rw")
    Path("other").mkdir()
    words = ("mount", "disk.raw", "other", *LOOP)
    (command,) = commands_in(brought_up("imgtool umount {}", imgtool(*words)))
    assert type_in(command).status == 0
    assert imgtool(*words).status == 0
    unmounted("other")


def test_a_directory_at_which_something_is_mounted():
    mounted()
    small.ext("other.raw")
    words = ("mount", "other.raw", "place", *LOOP)
    template = "'imgtool mounts' lists imgtool's own; imgtool umount, or another directory"
    brought_up(template, imgtool(*words))
    assert "place" in imgtool("mounts").text
    Path("another").mkdir()
    assert imgtool("mount", "other.raw", "another", *LOOP).status == 0
    unmounted("another")
    unmounted()
    assert imgtool(*words).status == 0
    unmounted()


def test_a_directory_at_which_nothing_is_mounted():
    Path("empty").mkdir()
    mounted()
    brought_up("'imgtool mounts' lists them", imgtool("umount", "empty"))
    assert "place" in imgtool("mounts").text
    unmounted()


def test_a_directory_that_somebody_is_in():
    mounted()
    with subprocess.Popen(["sleep", "600"], cwd="place") as sleeper:
        template = "leave the directory or end the process, then try again"
        brought_up(template, imgtool("umount", "place"))
        assert Path("place/name").exists()
        sleeper.kill()
    unmounted()


def test_a_mechanism_that_does_not_take_the_image():
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"], check=True
    )
    Path("place").mkdir()
    words = ("mount", "disk.qcow2", "place", "-m", "/dev/sda")
    text = brought_up("--via auto takes what works here", imgtool(*words, "--via", "loop"))
    option, way = text.split()[:2]
    assert imgtool(*words, option, way).status == 0 and Path("place/name").read_text() == "text"
    unmounted()


def test_a_snapshot_that_is_to_be_written_to():
    small.qemu_img("convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    small.qemu_img("snapshot", "-c", "it's one", "disk.qcow2")
    before = Path("disk.qcow2").read_bytes()
    Path("place").mkdir()
    words = ("mount", "disk.qcow2", "place", "--via", "export", "-m", "/dev/sda")
    done = imgtool(*words, "--snapshot", "it's one", "--rw")
    text = brought_up(
        "leave out --rw, or make an image of its own of it: imgtool convert --snapshot {} {} NEW",
        done,
    )
    assert imgtool(*words, "--snapshot", "it's one").status == 0
    unmounted()
    (command,) = commands_in(text, NEW="new image.qcow2")
    assert type_in(command).status == 0
    assert imgtool("cat", "new image.qcow2", "/name", "--engine", "direct").text == "text"
    assert Path("disk.qcow2").read_bytes() == before


def test_a_mount_whose_imgtool_was_killed():
    Path("place").mkdir()
    killed = host.imgtool("mount", "disk.raw", "place", *LOOP, fail_at="after mount")
    if killed.status != host.SIGKILLED:
        pytest.fail(killed.err)
    found = imgtool("mounts")
    brought_up("imgtool cleanup undoes what is left of it", found)
    assert type_in("imgtool cleanup").status == 0
    assert "place" not in imgtool("mounts").text
    mounted()
    unmounted()


def test_a_device_that_is_to_be_protected():
    with attached(Path("disk.raw")) as device:
        words = ("overlay", "create", device, "top.qcow2")
        template = "a device is read-only until the next start by: blockdev --setro {}"
        (command,) = commands_in(brought_up(template, imgtool(*words, "--protect-base")))
        try:
            assert type_in(command).status == 0
            assert host.run("blockdev", "--getro", device).strip() == "1"
            done = imgtool(*words, "--backing-dir", "/dev")
            assert done.status == 0, done.err
        finally:
            host.run("blockdev", "--setrw", device)


@pytest.mark.parametrize("room", [8, 200])  # in KiB: for not even an empty file, or for too little
def test_no_room_for_a_repair_to_be_tried_out(tmp_path, monkeypatch, room):
    holding.with_both(Path("disk.qcow2"))
    holding.miscount(Path("disk.qcow2"))
    held = holding.held(Path("disk.qcow2")).snapshots
    words = ("check", "--repair", "all", "disk.qcow2")
    before = Path("disk.qcow2").read_bytes()
    with small_disk(tmp_path / "small", 1) as folder, monkeypatch.context() as patch:
        (folder / "ballast").write_bytes(bytes((1 << 20) - (room << 10)))
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", None)
        brought_up("make room there, or name another folder: TMPDIR=FOLDER", imgtool(*words))
    assert Path("disk.qcow2").read_bytes() == before
    Path("a folder").mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", os.path.abspath("a folder"))
        patch.setattr("tempfile.tempdir", None)
        done = imgtool(*words)
    assert done.status == 0, done.err
    assert holding.held(Path("disk.qcow2")).snapshots == held and not os.listdir("a folder")


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder of another user, below one that everybody can enter."""
    folder = Path("/tmp") / f"hints-of-nobody-{os.getpid()}"
    folder.mkdir(mode=0o755)
    shutil.chown(folder, "nobody")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_name_that_another_user_can_exchange(folder_of_nobody):
    with contextlib.chdir(folder_of_nobody):
        small.plain("base.qcow2")
        small.overlay("top.qcow2", "base.qcow2")
        small.plain("other.qcow2")
        for path in folder_of_nobody.iterdir():
            shutil.chown(path, "nobody")
        words = ("overlay", "rebase", "top.qcow2", "other.qcow2")
        text = brought_up(
            "do it with the rights of its folder's owner: runuser -u {} -- imgtool ...",
            imgtool(*words),
        )
        start = shlex.split(text.partition(": ")[2])
        assert start[-2:] == ["imgtool", "..."] and pwd.getpwnam(start[2]).pw_name == "nobody"
        state = {**os.environ, "IMGTOOL_STATE_DIR": str(folder_of_nobody / "state")}
        source = str(Path(__file__).parents[2])
        done = subprocess.run(
            [*start[:-2], "env", f"PYTHONPATH={source}", sys.executable, "-m", "imgtool", *words],
            capture_output=True,
            text=True,
            check=False,
            env=state,
        )
        assert done.returncode == 0, done.stderr
        assert small.reads("top.qcow2", 1)
        assert "other.qcow2" in imgtool("info", "top.qcow2").text


def test_an_editor_that_is_not_installed(monkeypatch):
    import pty

    small.system("os.raw", {"etc/motd": "old\n"})
    before = Path("os.raw").read_bytes()
    words = [sys.executable, "-m", "imgtool", "edit", "os.raw", "/etc/motd"]

    def edit(editor: str, *more: str) -> Done:
        main, terminal = pty.openpty()
        try:
            done = subprocess.run(
                [*words, *more],
                stdin=terminal,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "EDITOR": editor, "VISUAL": ""},
            )
        finally:
            os.close(main)
            os.close(terminal)
        return Done(done.returncode, done.stdout, done.stderr)

    brought_up("set EDITOR, or change the file with -e or --set", edit("no-such-editor"))
    for done in (edit("true"), edit("no-such-editor", "-e", "s/none/new/")):
        assert done.status == 0 and "unchanged" in done.err, done.err
    assert Path("os.raw").read_bytes() == before
