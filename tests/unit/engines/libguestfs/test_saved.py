"""What starts a saved appliance: only the one that was saved, and as QEMU itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgtool.engines.libguestfs.appliance import saved
from imgtool.engines.libguestfs.appliance.starter import appliance_drive, file_of, identity, shape
from imgtool.errors import HostError, RefusedError


def asked(folder: Path, *, name: str = "1", memory: str = "1280", disks: int = 1) -> list[str]:
    """Arguments of the kind that libguestfs gives to QEMU."""
    words = ["-machine", "accel=tcg", "-m", memory, "-kernel", "kernel"]
    for number in range(disks):
        words += ["-drive", f"file=/disk-{name},,x,format=qcow2,id=hd{number},if=none"]
        words += ["-device", f"scsi-hd,drive=hd{number}"]
    words += ["-drive", f"file={folder}/root,snapshot=on,id=appliance,if=none,format=raw"]
    words += ["-chardev", f"socket,path=/tmp/{name}.sock,id=channel0"]
    words += ["-append", f"panic=1 TERM=xterm-{name} guestfs_identifier=imgtool-{name}"]
    return words


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a saved appliance for one disk, whose QEMU prints what it is told."""
    qemu = tmp_path / "qemu"
    qemu.write_text('#!/bin/sh\necho "pid=$$"\nprintf "%s\\n" "$@"\n')
    qemu.chmod(0o755)
    (tmp_path / "root").write_bytes(b"root")
    folder = tmp_path / "saved/1"
    folder.mkdir(parents=True)
    facts = {
        "version": 2,
        "python": sys.executable,
        "disks": 1,
        "time": 10**18,
        "hypervisor": str(qemu),
        "shape": shape(asked(tmp_path)),
        "files": [identity(str(qemu)), identity(str(tmp_path / "root"))],
    }
    (folder / "saved.json").write_text(json.dumps(facts))
    (folder / "state").write_bytes(b"state")
    (folder / "root.qcow2").write_bytes(b"overlay")
    saved._write_starter(folder)
    return folder.parent


def started(home: Path, argv: list[str]) -> list[str]:
    """What QEMU is told; it runs as the process that libguestfs started."""
    program = saved.all_saved(home)[0].starter
    process = subprocess.Popen([program, *argv], stdout=subprocess.PIPE, text=True)
    first, *words = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert first == f"pid={process.pid}"
    return words


def test_the_same_appliance_with_other_disks_continues(home, tmp_path):
    argv = asked(tmp_path, name="2")
    words = started(home, argv)
    drive = words[appliance_drive(words)]
    assert file_of(drive) == str(home / "1/root.qcow2")
    assert "snapshot=on" in drive
    assert words[-2] == "-incoming"
    assert words[-1].startswith("fd:")
    own = appliance_drive(argv)
    assert words[:own] == argv[:own]
    assert words[own + 1 : -2] == argv[own + 1 :]


@pytest.mark.parametrize("other", [{"memory": "2048"}, {"disks": 2}])
def test_another_appliance_starts_from_its_beginning(home, tmp_path, other):
    argv = asked(tmp_path, **other)
    assert started(home, argv) == argv


def test_questions_about_qemu_are_answered_by_qemu(home):
    assert started(home, ["-display", "none", "-help"]) == ["-display", "none", "-help"]


@pytest.mark.parametrize("name", ["qemu", "root"])
def test_what_was_made_with_another_qemu_or_appliance_is_stale(home, tmp_path, name):
    new = tmp_path / "new"
    new.write_bytes((tmp_path / name).read_bytes())
    new.chmod(0o755)
    new.replace(tmp_path / name)
    assert [one.fresh for one in saved.all_saved(home)] == [False]
    argv = asked(tmp_path)
    assert started(home, argv) == argv


def test_a_removed_python_makes_it_stale(home):
    facts = json.loads((home / "1/saved.json").read_text())
    (home / "1/saved.json").write_text(json.dumps({**facts, "python": "/removed/bin/python"}))
    assert [one.fresh for one in saved.all_saved(home)] == [False]


def test_what_others_may_write_to_is_not_used(home):
    assert [(one.disks, one.fresh) for one in saved.all_saved(home)] == [(1, True)]
    (home / "1/state").chmod(0o666)
    assert saved.all_saved(home) == []


def test_what_belongs_to_another_user_is_not_used(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345678)
    assert saved.all_saved(home) == []


class Handle:
    def __init__(self, disks: int, hypervisor: Path) -> None:
        self._disks, self._hypervisor = disks, hypervisor

    def debug_drives(self) -> list[str]:
        return ["disk"] * self._disks

    def get_hv(self) -> str:
        return str(self._hypervisor)


def test_a_handle_gets_the_one_for_its_disks_and_its_qemu(home, tmp_path):
    found = saved.for_handle(home, Handle(1, tmp_path / "qemu"))
    assert found is not None
    assert found.folder == home / "1"
    assert saved.for_handle(home, Handle(2, tmp_path / "qemu")) is None
    assert saved.for_handle(home, Handle(1, tmp_path / "another")) is None


@pytest.mark.parametrize("name", ["saved", "saved/1"])
def test_what_others_may_replace_is_not_used(home, tmp_path, name):
    (tmp_path / name).chmod(0o777)
    assert saved.all_saved(home) == []


def test_a_folder_above_that_others_may_write_to_is_not_used(home, tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    assert saved.all_saved(home) == []
    tmp_path.chmod(0o1777)
    assert len(saved.all_saved(home)) == 1
    tmp_path.chmod(0o770)
    assert len(saved.all_saved(home)) == 1  # the group is the user's own
    monkeypatch.setattr(saved, "_is_own_group", lambda number: False)
    assert saved.all_saved(home) == []


def test_saved_one_is_stale_by_qemus_time_not_the_appliances(home, tmp_path):
    os.utime(tmp_path / "root", (1, 1))
    facts = json.loads((home / "1/saved.json").read_text())
    facts["files"] = [
        identity(str(tmp_path / "qemu")),
        identity(str(tmp_path / "root"), time=False),
    ]
    (home / "1/saved.json").write_text(json.dumps(facts))
    os.utime(tmp_path / "root", (2, 2))
    assert [one.fresh for one in saved.all_saved(home)] == [True]
    os.utime(tmp_path / "qemu", (2, 2))
    assert [one.fresh for one in saved.all_saved(home)] == [False]


@pytest.fixture
def quick(home, tmp_path, monkeypatch):
    """Saving without an appliance: what it writes it writes at once."""

    def write(argv, hypervisor, scratch, new) -> None:
        (new / "state").write_bytes(b"new state")
        (new / "root.qcow2").write_bytes(b"overlay")

    monkeypatch.setattr(saved, "_ask_arguments", lambda *arguments: asked(tmp_path))
    monkeypatch.setattr(saved, "_start_and_save", write)
    return tmp_path / "cache/imgtool/appliance"


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_what_is_saved_can_be_used_whatever_the_umask(quick, tmp_path, mask):
    (tmp_path / "cache").mkdir()
    before = os.umask(mask)
    try:
        (quick.parent).mkdir()  # as another command may have made it
        found = saved.save(quick, Handle(1, tmp_path / "qemu"), str(tmp_path / "qemu"))
    finally:
        os.umask(before)
    assert found.fresh
    modes = {path.name: path.stat().st_mode & 0o777 for path in found.folder.iterdir()}
    assert modes.pop("qemu") == 0o700
    assert set(modes.values()) == {0o600}


def test_next_save_removes_what_killed_saves_left(quick, tmp_path):
    for name in (".new-1", ".old-2"):
        (quick / name).mkdir(parents=True)
        (quick / name / "state").write_bytes(b"memory")
    saved.save(quick, Handle(1, tmp_path / "qemu"), str(tmp_path / "qemu"))
    assert [path.name for path in quick.iterdir()] == ["1"]


def test_two_saves_do_not_take_each_others_files(quick, tmp_path):
    with saved._place_for_new(quick) as new:
        (new / "state").write_bytes(b"memory")
        with pytest.raises(RefusedError, match="another appliance is being saved"):
            saved.save(quick, Handle(1, tmp_path / "qemu"), str(tmp_path / "qemu"))
        assert (new / "state").exists()
    assert list(quick.iterdir()) == []


def test_nothing_is_saved_where_others_could_replace_it(quick, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(HostError, match="others could put another"):
        saved.save(quick, Handle(1, tmp_path / "qemu"), str(tmp_path / "qemu"))


def test_disks_that_cannot_be_looked_at_again_are_an_error(tmp_path):
    """The appliance's commands, played by programs of this host."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("date", "mountpoint", "udevadm", "grep", "head"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
    disk = tmp_path / "sys/sda"
    (disk / "device").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    script = saved._SETTLE.replace("/sys/block", str(tmp_path / "sys"))
    for status, ends in ((0, True), (1, False)):
        (programs / "blockdev").write_text(f"#!/bin/sh\nexit {status}\n")
        for program in programs.iterdir():
            program.chmod(0o755)
        done = subprocess.run(
            ["/bin/sh", "-c", script],
            env={"PATH": f"{programs}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0, "settled" in done.stdout) == (ends, ends)


def test_a_broken_note_is_no_saved_appliance(home):
    (home / "1/saved.json").write_text("{")
    assert saved.all_saved(home) == []


def test_removing_leaves_nothing_also_of_what_was_cut_off(home):
    (home / ".new-1234").mkdir()
    (home / "1/saved.json").write_text("{")
    saved.remove_all(home)
    assert not home.exists()
    saved.remove_all(home)


def test_a_cache_that_cannot_be_made_is_an_error_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "_ask_arguments", lambda *arguments: asked(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot be saved: Not a directory"):
        saved.save(tmp_path / "file/appliance", Handle(1, tmp_path), "qemu")
