"""The journal of a host mount: written before, undone backwards, never taken for another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from imgtool.errors import HostError, ImgtoolError, RefusedError
from imgtool.mount import journal as journal_module
from imgtool.mount import mounting
from imgtool.mount.journal import MAKING, MOUNTED, UNMAKING, Journal, journals, state_folder
from imgtool.mount.mechanisms import appliance
from imgtool.mount.steps import steps
from imgtool.mount.steps.mapper import Mapping, VolumeGroupActivation
from imgtool.mount.steps.qemu import Export, Nbd, Overlay, Snapshot
from imgtool.mount.steps.step import Save, Step
from imgtool.mount.steps.steps import Appliance, Filesystem, Loop, NtfsProgram, UdevRule, from_json

ODD = os.fsdecode(b"/a\n b/\xff\xfe")
REQUEST: appliance.Request = {
    "image": ODD,
    "add": [],
    "format": None,
    "snapshot": None,
    "mounts": [{"source": "/dev/sda1", "mountpoint": "/", "options": "", "fstype": None}],
    "root": None,
    "keys": ["all:key:secret"],
    "backing_dirs": [],
    "target": ODD,
    "writable": True,
    "force": [],
    "executable": False,
}
STEPS = (
    UdevRule("abc"),
    Overlay(ODD, 1 << 40),
    Snapshot(ODD, "json:{}", 1, "7,8"),
    Export(ODD, ['{"driver": "raw"}'], {"disk0": ODD, "disk1": "/x"}, False),
    Nbd(ODD, "json:{}", 1, True, number=7),
    Nbd(ODD, "json:{}", 0, False),
    Loop(ODD, 1 << 20, 0, True, "imgtool abc 0", "abc", number=12),
    Loop(ODD, 0, 512, False, "imgtool abc 1", "abc"),
    Mapping("/dev/loop3", "-imgtool-abc-", True),
    VolumeGroupActivation(
        ["/dev/loop3", "/dev/nbd0p2"], "vg-0", "imgtool_abc_0", True, uuid="ab12"
    ),
    Filesystem("/dev/loop3", ODD, "ext4", 15, "nouuid,subvol=@"),
    NtfsProgram("/dev/loop3", ODD, "ntfs3", 15, ""),
    Appliance("/run/imgtool/abc", ODD, {**REQUEST, "keys": []}),
)


@dataclass
class Noted(Step):
    """A step that only notes what is done to it, in a list that lives as long as the test."""

    kind: ClassVar[str] = "noted"
    name: str
    notes: ClassVar[list[str]] = []
    fails: ClassVar[set[str]] = set()
    look: ClassVar[list[Callable[[], None]]] = []
    known: int | None = field(default=None)

    def do(self, save: Save) -> None:
        for call in self.look:
            call()
        self.known = 1
        save()
        self.notes.append(f"do {self.name}")
        if f"do {self.name}" in self.fails:
            raise HostError("no luck")

    def undo(self) -> None:
        if f"undo {self.name}" in self.fails:
            raise RefusedError("in use")
        self.notes.append(f"undo {self.name}")

    def fault(self) -> str | None:
        return f"{self.name} is broken" if f"broken {self.name}" in self.fails else None


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """A state folder of the test's own."""
    folder = tmp_path / "state"
    monkeypatch.setattr(journal_module, "state_folder", lambda: folder)
    monkeypatch.setitem(steps._KINDS, "noted", Noted)
    monkeypatch.delenv("IMGTOOL_MOUNT_FAILPOINT", raising=False)
    for shared in (Noted.notes, Noted.fails, Noted.look):
        shared.clear()
    return folder


def start(place: str = "/mnt", written: bool = False) -> Journal:
    images = [Path("/images/a.qcow2"), Path("/images/base.raw")]
    return Journal.start(images, Path(place), "loop", images[:1] if written else ())


def finished(*names: str, place: str = "/mnt") -> Journal:
    """A mount of these steps, done, and its imgtool gone."""
    journal = start(place)
    for name in names:
        journal.do(Noted(name))
    journal.finish()
    journal.unlock()
    Noted.notes.clear()
    return journal


# What is written


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.kind)
def test_a_step_comes_back_as_it_was(step):
    assert from_json(json.loads(json.dumps(step.to_json()))) == step


def test_every_kind_is_among_them():
    assert {step.kind for step in STEPS} | {"noted"} == set(steps._KINDS)
    assert all(kind == step.kind for kind, step in steps._KINDS.items())


def test_keys_are_not_in_it():
    step = Appliance("/run/imgtool/abc", "/mnt", REQUEST)
    assert "secret" not in json.dumps(step.to_json())
    assert step.request["keys"]  # the appliance gets them


def test_a_step_of_another_version():
    known = {**STEPS[6].to_json(), "later": "unknown"}
    assert from_json(known) == STEPS[6]
    with pytest.raises(ImgtoolError, match="unknown kind: later"):
        from_json({"kind": "later"})


@pytest.mark.parametrize("written", [False, True])
def test_a_journal_comes_back_as_it_was(written):
    files = [Path(ODD)] if written else ()
    journal = Journal.start([Path(ODD)], Path(ODD), "export", files, snapshot=ODD)
    journal.steps.extend(STEPS)
    journal.save()
    (found,) = journals()
    assert found.folder == journal.folder
    assert found.steps == list(STEPS)
    assert found.snapshot == ODD
    assert (found.images, found.mountpoint, found.writable) == ([ODD], ODD, written)
    assert (found.state, found.user, found.boot) == (MAKING, os.getuid(), journal.boot)
    assert found.id == journal.folder.name
    assert journal.folder.stat().st_mode & 0o777 == 0o700


def test_a_step_is_written_before_it_is_done():
    seen: list[list[dict[str, Any]]] = []
    journal = start()
    file = journal.folder / "journal.json"
    Noted.look.append(lambda: seen.append(json.loads(file.read_text())["steps"]))
    journal.do(Noted("one"))
    journal.do(Noted("two"))
    assert [[step["name"] for step in steps] for steps in seen] == [["one"], ["one", "two"]]
    assert json.loads(file.read_text())["steps"][1]["known"] == 1


def test_half_a_journal_is_none(state):
    """Killed while it writes the first line: nothing was done."""
    journal = start()
    (journal.folder / "journal.json").rename(journal.folder / "journal.draft")
    journal.unlock()
    assert journals() == []
    assert Journal.read(journal.folder) is None
    assert Journal.read(state / "none") is None
    assert mounting.clean_up() == []
    assert list(state.iterdir()) == []


def test_the_oldest_comes_first():
    made = [start(place) for place in ("/a", "/b", "/c")]
    assert [journal.mountpoint for journal in journals()] == ["/a", "/b", "/c"]
    assert len({journal.id for journal in made}) == 3


# Undoing


def test_the_last_step_is_undone_first(state):
    journal = finished("one", "two", "three")
    journal.undo()
    assert Noted.notes == ["undo three", "undo two", "undo one"]
    assert list(state.iterdir()) == []


def test_a_step_that_failed_is_undone_too():
    journal = start()
    Noted.fails.add("do two")
    journal.do(Noted("one"))
    with pytest.raises(HostError):
        journal.do(Noted("two"))
    journal.undo()
    assert Noted.notes[-2:] == ["undo two", "undo one"]


def test_what_cannot_be_undone_is_tried_again():
    journal = finished("one", "two", "three")
    Noted.fails.add("undo two")
    with pytest.raises(RefusedError):
        journal.undo()
    (left,) = journals()
    names = [step.name for step in left.steps if isinstance(step, Noted)]
    assert (left.state, names) == (UNMAKING, ["one", "two"])
    assert left.left_behind()
    Noted.fails.clear()
    left.undo()
    assert Noted.notes == ["undo three", "undo two", "undo one"]
    assert journals() == []


def test_a_mount_of_which_nothing_was_undone_is_as_before():
    journal = finished("one", "two")
    Noted.fails.add("undo two")
    with pytest.raises(RefusedError):
        journal.undo()
    (left,) = journals()
    assert left.state == MOUNTED
    assert not left.left_behind()


def test_after_a_reboot_only_files_are_left(state):
    journal = finished("one", "two")
    journal.boot = "another"
    journal.save()
    (cleaned,) = mounting.clean_up()
    assert (cleaned.journal.mountpoint, cleaned.error) == ("/mnt", None)
    assert Noted.notes == []
    assert list(state.iterdir()) == []


# Whose it is


def test_what_is_left_behind():
    journal = start()
    journal.do(Noted("one"))
    (seen,) = journals()
    assert seen.busy
    assert not seen.left_behind()  # somebody works on it
    journal.unlock()
    assert not seen.busy
    assert seen.left_behind()  # nobody does, and it is not finished
    journal.finish()
    (seen,) = journals()
    assert not seen.left_behind()
    Noted.fails.add("broken one")
    assert seen.left_behind()
    assert seen.faults() == ["one is broken"]


def test_one_at_a_time():
    journal = start()
    (other,) = journals()
    with pytest.raises(RefusedError, match="another imgtool works on this mount"), other.lock():
        pass
    journal.unlock()
    with other.lock() as there:
        assert there
        assert journals()[0].busy
    assert not journals()[0].busy


def test_cleanup_looks_again_before_it_undoes(monkeypatch):
    """What it read was not finished; then it was, while cleanup was busy with another one."""
    journal = start()
    journal.do(Noted("one"))
    read_before = journals()
    journal.finish()
    journal.unlock()
    monkeypatch.setattr(mounting, "journals", lambda: read_before)
    assert mounting.clean_up() == []
    assert Noted.notes == ["do one"]
    (still,) = journals()
    assert still.state == MOUNTED


def test_umount_undoes_what_was_done_since_it_looked(monkeypatch, tmp_path):
    journal = start(str(tmp_path))
    journal.do(Noted("one"))
    read_before = journals()
    journal.do(Noted("two"))
    journal.finish()
    journal.unlock()
    monkeypatch.setattr(mounting, "journals", lambda: read_before)
    mounting.unmount(tmp_path)
    assert Noted.notes[-2:] == ["undo two", "undo one"]


@pytest.mark.parametrize("command", ["umount", "cleanup"])
def test_what_somebody_else_undid_is_done(monkeypatch, tmp_path, command):
    journal = start(str(tmp_path))
    journal.do(Noted("one"))
    journal.unlock()
    read_before = journals()
    journal.undo()
    monkeypatch.setattr(mounting, "journals", lambda: read_before)
    if command == "umount":
        mounting.unmount(tmp_path)
    else:
        assert mounting.clean_up() == []
    assert Noted.notes == ["do one", "undo one"]


def test_cleanup_goes_on_after_one_that_cannot_be_undone():
    for name in ("one", "two", "three"):
        finished(name, place=f"/{name}")
    Noted.fails.update({"broken one", "broken two", "broken three", "undo two"})
    cleaned = mounting.clean_up()
    assert {row.journal.mountpoint: row.error is None for row in cleaned} == {
        "/one": True,
        "/two": False,
        "/three": True,
    }
    assert [journal.mountpoint for journal in journals()] == ["/two"]


def test_cleanup_does_not_take_the_folder_of_one_that_begins(state):
    """Between its folder and its first line it holds the lock."""
    journal = start()
    (journal.folder / "journal.json").unlink()
    assert mounting.clean_up() == []
    assert journal.folder.exists()
    journal.unlock()
    mounting.clean_up()
    assert list(state.iterdir()) == []


# Where it is


def test_root_and_users_have_folders_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert state_folder() == Path("/run/imgtool")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert state_folder() == Path("/run/user/1000/imgtool")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    # Nobody else can rename what is right below /tmp, nor what is in it.
    assert state_folder() == Path("/tmp/imgtool-1000")


@pytest.mark.parametrize("how", ["writable", "link", "file", "someone's"])
def test_a_folder_that_others_could_write_to_is_refused(state, tmp_path, monkeypatch, how):
    if how == "writable":
        state.mkdir()
        state.chmod(0o770)
    elif how == "link":
        (tmp_path / "theirs").mkdir()
        state.symlink_to(tmp_path / "theirs")
    elif how == "file":
        state.touch()
    else:
        state.mkdir(mode=0o700)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(HostError) as refused:
        start()
    assert refused.value.hint is not None


def test_no_folder_is_no_mounts(state):
    assert journals() == []
    assert mounting.clean_up() == []
    assert not state.exists()


# Folders of others, and keys


def test_journal_that_another_user_could_write_is_not_believed(monkeypatch, tmp_path):
    """What it says would be undone with this user's rights: files of his be removed."""
    root, victim = tmp_path / "state", tmp_path / "victim"
    victim.write_text("mine")
    folder = root / "0123456789ab"
    folder.mkdir(parents=True)
    monkeypatch.setattr(journal_module, "state_folder", lambda: root)
    planted = Journal(
        folder, [str(victim)], "/mnt", "export", [], os.getuid(), 0, journal_module.boot_id()
    )
    planted.steps = [Overlay(str(victim), 1)]
    planted.save()
    root.chmod(0o777)
    for look in (journals, mounting.clean_up, journal_module.remove_empty_folders):
        with pytest.raises(HostError, match="belongs to somebody else, or others can write"):
            list(look() or ())
    assert victim.exists()
    root.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(root, 65534, 65534)
        with pytest.raises(HostError, match="belongs to somebody else"):
            journals()
        os.chown(root, 0, 0)
    assert [journal.id for journal in journals()] == [folder.name]
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="belongs to somebody else"):
        journals()


def test_a_journal_of_any_length_takes_no_memory(monkeypatch, tmp_path):
    folder = tmp_path / "state" / "0123456789ab"
    folder.mkdir(parents=True)
    with (folder / "journal.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(HostError, match="no journal of imgtool is so long"):
        Journal.read(folder)


def test_keys_of_a_mount_through_the_appliance_are_in_no_file(monkeypatch, tmp_path):
    seen: dict[str, str] = {}

    def started(argv, log_file, *, env, stdin):
        seen["asked"] = os.pread(stdin, 1 << 16, 0).decode()
        seen["position"] = str(os.lseek(stdin, 0, os.SEEK_CUR))
        seen["folder"] = "".join(path.read_text() for path in tmp_path.iterdir())
        (tmp_path / "ready").touch()

    monkeypatch.setattr(appliance, "leave_running", started)
    appliance.start(tmp_path, REQUEST)
    assert json.loads(seen["asked"]) == REQUEST
    assert (seen["position"], seen["folder"]) == ("0", "")


def test_mount_process_takes_its_request_from_standard_input(tmp_path):
    request = {**REQUEST, "image": str(tmp_path / "none.img"), "format": None, "mounts": []}
    request |= {"root": None, "backing_dirs": [], "writable": False, "snapshot": None}
    request |= {"target": str(tmp_path), "executable": False, "force": []}
    done = subprocess.run(
        [sys.executable, "-m", "imgtool.mount.mechanisms.appliance", tmp_path],
        input=json.dumps(request).encode(),
        capture_output=True,
    )
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert (done.returncode, failed["status"]) == (1, 3)
    assert "none.img" in failed["message"]
