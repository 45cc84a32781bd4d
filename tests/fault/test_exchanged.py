"""What root does in an image goes to the file that was looked at, whatever the owner of the folder
puts in its place meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import ImgtoolError, RefusedError
from imgtool.image.chain.chain import open_chain
from imgtool.image.change import plan, transaction
from tests.support.writes import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do what others may not")

MIB = 1 << 20
NOBODY = 65534


def qemu(*words: object, ok: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run([str(word) for word in words], check=False, capture_output=True)
    assert done.returncode in ok, done.stderr


@dataclass
class Moment:
    """Does something at the `number`th moment at which a program is started or, `fine`, a file of
    the folder is touched; `passed` counts the moments."""

    folder: Path
    fine: bool = False
    number: int | None = None
    do: Callable[[], None] = lambda: None
    passed: int = 0
    active: bool = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "subprocess.Popen":
            here = True
        else:
            here = self.fine and any(
                isinstance(one, (str, Path)) and str(self.folder) in str(one) for one in arguments
            )
        if not here:
            return
        self.passed += 1
        if self.passed - 1 == self.number:
            self.active = False
            self.do()
            self.active = True


_moments: list[Moment] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for moment in _moments:
        moment.hook(event, arguments)


@pytest.fixture(scope="session")
def audit() -> None:
    sys.addaudithook(_hook)


@dataclass
class Folder:
    """The images of another user, and files of root's that have the same names and content."""

    theirs: Path
    ours: Path
    before: dict[str, tuple[object, ...]] = field(default_factory=dict)

    def state(self) -> dict[str, tuple[object, ...]]:
        return {
            path.name: (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
            for path in self.ours.iterdir()
        }


def new_folder(place: Path) -> Folder:
    theirs, ours = place / "home" / "theirs", place / "ours"
    theirs.mkdir(parents=True)
    base, disk = theirs / "base.qcow2", theirs / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    qemu("qemu-io", "-c", "write -P 0x31 0 1M", base)
    qemu("qemu-img", "snapshot", "-c", "one", base)
    os.utime(base, (10**9, 10**9))
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", disk)
    qemu("qemu-io", "-c", "write -P 0x32 64k 64k", disk)
    shutil.copytree(theirs, ours)
    for path in (theirs.parent, theirs, *theirs.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    return Folder(theirs, ours)


def exchange(folder: Folder, what: str) -> None:
    """What the owner of the folder does: a file, or the folder itself, leads to root's now."""
    theirs = folder.theirs
    if what == "folder":
        theirs.rename(theirs.with_name("aside"))
        theirs.symlink_to(folder.ours)
        os.lchown(theirs, NOBODY, NOBODY)
        return
    if what == "circle":
        (theirs / "disk.qcow2").rename(theirs / "aside")
        (theirs / "disk.qcow2").symlink_to("disk.qcow2")
        return
    image = theirs / f"{what}.qcow2"
    if image.exists() and not image.is_symlink():
        image.rename(theirs / "aside")
        image.symlink_to(folder.ours / image.name)
        os.lchown(image, NOBODY, NOBODY)


def images_of(folder: Folder) -> Iterator[Path]:
    """The files that were the images, by now under whatever name."""
    for path in folder.theirs.parent.rglob("*"):
        if path.is_file() and not path.is_symlink() and not path.is_relative_to(folder.ours):
            yield path


COMMANDS = {
    "commit": ["overlay", "commit", "disk"],
    "commit --remove": ["overlay", "commit", "disk", "--remove"],
    "rebase --unsafe": ["overlay", "rebase", "--unsafe", "disk", "base", "--force", "other-base"],
    "resize": ["resize", "disk", "2M"],
    "snapshot create": ["snapshot", "create", "disk", "new"],
    "snapshot delete": ["snapshot", "delete", "base", "one", "--force", "is-base"],
    "snapshot revert": ["snapshot", "revert", "disk", "kept", "--discard"],
    "repair": ["check", "disk", "--repair", "all"],
}


def prepare(folder: Folder, command: str) -> list[str]:
    for path in (folder.theirs / "disk.qcow2", folder.ours / "disk.qcow2"):
        if command == "snapshot revert":
            qemu("qemu-img", "snapshot", "-c", "kept", path)
            qemu("qemu-io", "-c", "write -P 0x33 64k 64k", path)
        if command == "repair":
            leak(path)
    folder.before = folder.state()
    there = {name: str(folder.theirs / f"{name}.qcow2") for name in ("disk", "base")}
    return [there.get(word, word) for word in COMMANDS.get(command, ())]


def leak(image: Path) -> None:
    """Have one cluster more counted than is used."""
    end = image.stat().st_size
    with image.open("r+b") as file:
        file.truncate(end + (64 << 10))
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
        file.seek(block + end // (64 << 10) * 2)
        file.write((1).to_bytes(2, "big"))


def at_every_moment(
    place: Path,
    command: str,
    what: str,
    act: Callable[[Folder, list[str], Moment], int],
    *,
    fine: bool = False,
) -> None:
    """Do it anew for each moment of it, with the exchange at that one, until there are no more."""
    for number in range(1000):
        folder = new_folder(place / str(number))
        words = prepare(folder, command)
        moment = Moment(folder.theirs, fine, number, partial(exchange, folder, what))
        _moments[:] = [moment]
        try:
            status = act(folder, words, moment)
        finally:
            _moments.clear()
        assert folder.state() == folder.before, number
        if moment.passed <= number:
            assert status == 0
            break
        # A circle of links is no image at all to who opens it first.
        assert status in ((0, 3, 4) if what == "circle" else (0, 4)), number
        for image in images_of(folder):
            if image.name.startswith(("disk", "base", "aside")):
                sound = (0, 3) if command == "repair" else (0,)  # as it was before the repair
                qemu("qemu-img", "check", "-U", image, ok=sound)
        shutil.rmtree(folder.ours.parent)
    assert number > 0


@pytest.mark.parametrize(
    ("command", "what", "fine"),
    [
        ("commit", "base", False),
        ("commit", "disk", False),
        ("commit --remove", "folder", True),
        ("rebase --unsafe", "disk", True),
        ("resize", "disk", True),
        ("resize", "folder", True),
        ("resize", "circle", True),
        ("snapshot create", "disk", False),
        ("snapshot delete", "base", False),
        ("snapshot delete", "disk", True),
        ("snapshot revert", "disk", False),
        ("repair", "disk", False),
        ("repair", "folder", False),
    ],
)
def test_nothing_of_root_changes_when_a_name_is_exchanged(
    tmp_path: Path,
    audit: None,
    imgtool_cli: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    what: str,
    fine: bool,
) -> None:
    real = plan.Plan.run

    def act(folder: Folder, words: list[str], moment: Moment) -> int:
        def run(self: Any, *arguments: Any) -> Any:
            moment.active = True  # what the plan was made of has been looked at
            try:
                return real(self, *arguments)
            finally:
                moment.active = False

        monkeypatch.setattr(plan.Plan, "run", run)
        done = imgtool_cli(*words)
        assert done.status != 4 or "exchanged" in done.err
        return int(done.status)

    at_every_moment(tmp_path, command, what, act, fine=fine)


@pytest.mark.parametrize("what", ["base", "disk", "folder"])
def test_recover_of_an_exchanged_name_changes_nothing_of_root(
    tmp_path: Path, audit: None, imgtool_cli: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def cut_off(self: Any, *arguments: Any, **options: Any) -> None:
        os._exit(0)

    def act(folder: Folder, words: list[str], moment: Moment) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(plan.Work, "prove_same", cut_off)
            assert in_child(lambda: imgtool_cli(*words)) == 0
        moment.active = True
        done = imgtool_cli("recover", folder.theirs / "base.qcow2")
        moment.active = False
        return int(done.status)

    at_every_moment(tmp_path, "commit --remove", what, act)


@pytest.mark.parametrize("what", ["base", "disk", "folder"])
def test_write_to_an_exchanged_name_changes_nothing_of_root(
    tmp_path: Path, audit: None, what: str
) -> None:
    def act(folder: Folder, words: list[str], moment: Moment) -> int:
        chain = open_chain(folder.theirs / "disk.qcow2")
        moment.active = True
        try:
            with transaction.transaction([chain], notice=lambda line: None) as writing:
                (above,) = writing.chains
                qemu("qemu-io", "-c", "write -P 0x34 0 64k", above.active.path, ok=(0, 1))
                writing.commit()
        except ImgtoolError:  # it is not there, or not the one
            return 4
        finally:
            moment.active = False
        return 0

    at_every_moment(tmp_path, "transaction", what, act)


def test_a_rebase_by_name_is_refused_with_what_to_do(tmp_path: Path, imgtool_cli: Any) -> None:
    """QEMU writes down the name of the new base, and opens it by that."""
    folder = new_folder(tmp_path)
    qemu("qemu-img", "create", "-f", "raw", folder.theirs / "new.raw", "1M")
    before = (folder.theirs / "disk.qcow2").read_bytes()
    done = imgtool_cli("overlay", "rebase", folder.theirs / "disk.qcow2", folder.theirs / "new.raw")
    assert done.status == 4
    assert "runuser -u nobody -- imgtool" in done.err
    assert (folder.theirs / "disk.qcow2").read_bytes() == before


def test_an_image_of_several_files_is_not_written_to_by_name(tmp_path: Path) -> None:
    """QEMU looks for the others beside the name that it is given."""
    folder = new_folder(tmp_path)
    image = folder.theirs / "flat.vmdk"
    qemu("qemu-img", "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", image, "1M")
    for path in folder.theirs.iterdir():
        os.chown(path, NOBODY, NOBODY)
    before = sorted(folder.theirs.iterdir())
    chain = open_chain(image)
    with (
        pytest.raises(RefusedError) as caught,
        transaction.transaction([chain], notice=lambda line: None),
    ):
        pass
    assert "runuser -u nobody -- imgtool" in str(caught.value.hint)
    assert sorted(folder.theirs.iterdir()) == before


def test_no_name_of_a_descriptor_is_written_down(tmp_path: Path, imgtool_cli: Any) -> None:
    folder = new_folder(tmp_path)
    qemu("qemu-io", "-c", "write -P 0x35 0 64k", folder.theirs / "disk.qcow2")
    for command in COMMANDS:
        if command in ("repair", "snapshot revert", "commit --remove"):
            continue
        there = {name: str(folder.theirs / f"{name}.qcow2") for name in ("disk", "base")}
        done = imgtool_cli(*(there.get(word, word) for word in COMMANDS[command]))
        assert done.status == 0, done.err
        for path in folder.theirs.iterdir():
            assert b"/proc/" not in path.read_bytes(), (command, path)


def test_user_without_rights_works_in_a_folder_of_others(
    tmp_path: Path, imgtool_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_folder(tmp_path)
    os.chown(folder.theirs, NOBODY - 1, NOBODY - 1)
    disk, new = folder.theirs / "disk.qcow2", folder.theirs / "new.raw"
    qemu("qemu-img", "create", "-f", "raw", new, "1M")
    there = {"disk": str(disk), "base": str(folder.theirs / "base.qcow2"), "new.raw": str(new)}
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    for words in (
        COMMANDS["snapshot create"],
        ["snapshot", "revert", "disk", "new", "--discard"],
        ["snapshot", "delete", "disk", "new"],
        ["overlay", "rebase", "disk", "new.raw", "--base-format", "raw"],
        COMMANDS["rebase --unsafe"],
        COMMANDS["repair"],
        COMMANDS["commit --remove"],
        ["resize", "base", "2M"],
    ):
        done = imgtool_cli(*(there.get(word, word) for word in words))
        assert done.status == 0, (words, done.err)
    qemu("qemu-io", "-r", "-c", "read -P 0x32 64k 64k", folder.theirs / "base.qcow2")
    assert sorted(path.name for path in folder.theirs.iterdir()) == ["base.qcow2", "new.raw"]
