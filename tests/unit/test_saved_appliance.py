"""What starts a saved appliance: only the one that was saved, and as QEMU itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from imgtool.engines.libguestfs import saved
from imgtool.engines.libguestfs.starter import appliance_drive, file_of, identity, shape
from imgtool.errors import HostError


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
        "version": 1,
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
    monkeypatch.setattr(saved, "_asked", lambda *arguments: asked(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot be saved: Not a directory"):
        saved.save(tmp_path / "file/appliance", Handle(1, tmp_path), "qemu")
