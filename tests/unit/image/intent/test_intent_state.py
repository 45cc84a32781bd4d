"""A write that was cut off in the middle of becoming the image's own, and what may happen to the
image, its overlay and its record before somebody finishes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgtool.errors import HostError, ImageError, Reason, RefusedError
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.change import overlays, recovery, transaction
from imgtool.image.change.recovery import recover
from imgtool.image.intent.intent_log import read_facts, record_path
from imgtool.image.intent.marks import is_as_noted, mark_of
from imgtool.image.locking.locks import refuse_if_in_use
from imgtool.image.qemu.qemu_img import Locked
from imgtool.image.qemu.qemu_img import qemu_img as run_qemu_img
from tests.support.records import left, planted
from tests.support.writes import (
    KILLED,
    NEW,
    OLD,
    fill,
    in_child,
    left_over,
    made,
    pattern,
    qemu_img,
    reads_as,
)

ALICE, BOB = 12345, 12346
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


def torn(*images: Path, tmp_dir: Path | None = None) -> None:
    """Write to raw images, and be killed when a part of it is in the last one."""

    def killed(record, *others, **options):
        with record.image.open("r+b") as file:
            file.write(bytes([NEW]) * 4096)
        os._exit(KILLED)

    def work() -> None:
        pytest.MonkeyPatch().setattr(transaction, "finish_write", killed)
        write(*images, tmp_dir=tmp_dir)

    assert in_child(work) == KILLED


def write(*images: Path, tmp_dir: Path | None = None) -> None:
    chains = [open_chain(image, format="raw") for image in images]
    with transaction.transaction(chains, tmp_dir=tmp_dir, notice=lambda line: None) as writing:
        for chain in writing.chains:
            fill(chain.active.path, "qcow2", NEW)
        writing.commit()


def sees(image: Path, value: int) -> bool:
    """Whether a reader of the image sees this content."""
    return reads_as(open_chain(image, format="raw").filename(), value)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "guests"
    folder.mkdir()
    return made(folder, "raw")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="intent-of-test-", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def user(uid: int) -> Iterator[None]:
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


# What is moved, lost or replaced before it is finished


def test_a_folder_that_was_moved_is_read_whole_and_finished(disk, tmp_path):
    torn(disk)
    moved = disk.parent.rename(tmp_path / "elsewhere") / disk.name
    assert sees(moved, NEW)
    assert "finished" in str(recover(moved))
    assert pattern(moved, "raw", NEW)
    assert left_over(moved.parent) == []


def test_two_disks_that_were_moved_are_finished_together(disk, tmp_path):
    second = disk.with_name("second.img")
    shutil.copyfile(disk, second)
    torn(disk, second)
    folder = disk.parent.rename(tmp_path / "elsewhere")
    assert sees(folder / "second.img", NEW)
    assert sees(folder / disk.name, NEW)
    recover(folder / disk.name)
    assert pattern(folder / "second.img", "raw", NEW)
    assert pattern(folder / disk.name, "raw", NEW)
    assert left_over(folder) == []


def test_one_of_two_disks_without_the_other_is_refused(disk, tmp_path):
    second = disk.with_name("second.img")
    shutil.copyfile(disk, second)
    torn(disk, second)
    disk.rename(tmp_path / disk.name)
    record_path(disk).rename(tmp_path / record_path(disk).name)
    for look in (lambda: sees(second, NEW), lambda: recover(second)):
        with pytest.raises(RefusedError, match="whether it was to be kept"):
            look()
    assert record_path(second).exists()


def test_lost_overlay_leaves_no_part_taken_for_the_whole(disk, tmp_path):
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    torn(disk, tmp_dir=elsewhere)
    assert sees(disk, NEW)
    shutil.rmtree(elsewhere)
    for look in (lambda: sees(disk, NEW), lambda: recover(disk)):
        with pytest.raises(ImageError, match="holds a part of an overlay") as caught:
            look()
        assert f"imgtool recover {disk} --keep" in str(caught.value.hint)
    assert record_path(disk).exists()
    before = disk.read_bytes()
    assert "nothing else" in str(recover(disk, end=True))
    assert disk.read_bytes() == before and left_over(disk.parent) == []


def test_other_image_of_the_same_name_is_left_alone(disk):
    torn(disk)
    os.replace(made(disk.parent.parent, "raw"), disk)
    before = disk.read_bytes()
    for look in (lambda: sees(disk, NEW), lambda: recover(disk)):
        with pytest.raises(RefusedError, match="another file that had this name") as caught:
            look()
        assert "--force" in str(caught.value.hint)
    assert disk.read_bytes() == before


def test_copy_of_all_is_finished_where_it_is_said_to_be_one(disk, tmp_path):
    torn(disk)
    copy = Path(shutil.copytree(disk.parent, tmp_path / "copy")) / disk.name
    shutil.rmtree(disk.parent)
    with pytest.raises(RefusedError):
        recover(copy)
    assert "finished" in str(recover(copy, force=[Reason.COPY]))
    assert pattern(copy, "raw", NEW)


def test_link_that_leads_elsewhere_takes_no_other_record(disk):
    link, other = disk.with_name("current"), disk.with_name("other.img")
    shutil.copyfile(disk, other)
    torn(other)
    link.symlink_to(disk.name)
    with transaction.transaction([open_chain(link, format="raw")], notice=lambda line: None):
        link.unlink()
        link.symlink_to(other.name)
    assert record_path(other).exists()
    assert not record_path(disk).exists()


def test_a_file_with_several_names_is_not_written(disk):
    disk.with_name("second").hardlink_to(disk)
    with pytest.raises(RefusedError, match="2 names"):
        write(disk)


def test_disk_in_the_way_leaves_no_record_of_the_first(disk):
    second = disk.with_name("second.img")
    shutil.copyfile(disk, second)
    with (
        transaction.transaction([open_chain(second, format="raw")], notice=lambda line: None),
        pytest.raises(RefusedError, match="another imgtool"),
    ):
        write(disk, second)
    assert left_over(disk.parent) == []


# Images whose data are not, or not only, in the file of that name


@pytest.fixture(params=["data file", "device"])
def apart(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Apart]:
    """An image of which the data are in another file, or of which no time tells when it was
    written to."""
    data = tmp_path / "data.raw"
    data.write_bytes(bytes([OLD]) * (4 << 20))
    if request.param == "data file":
        image = tmp_path / "image.qcow2"
        options = f"data_file={data},data_file_raw=on,preallocation=metadata"
        words = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "4M")
        subprocess.run(words, check=True)
        fill(image, "qcow2", OLD)
        yield Apart(image, data, "qcow2")
        return
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("needs root and loop devices")
    with attached(data) as device:
        yield Apart(device, device, "raw")


@dataclass(frozen=True)
class Apart:
    image: Path
    data: Path
    format: str

    def write(self, end: Callable[[], None]) -> None:
        """A write that QEMU does a part of; how it comes to its `end`."""

        def part(words: object, **options: object) -> None:
            self.put(NEW, 0)
            end()

        chain = open_chain(self.image, format=self.format)
        with (
            pytest.MonkeyPatch.context() as patch,
            transaction.transaction([chain], notice=lambda line: None) as writing,
        ):
            fill(writing.chains[0].active.path, "qcow2", NEW)
            patch.setattr(recovery, "qemu_img", part)
            writing.commit()

    def put(self, value: int, at: int) -> None:
        with self.data.open("r+b") as file:
            file.seek(at)
            file.write(bytes([value]) * 4096)


@contextlib.contextmanager
def attached(file: Path) -> Iterator[Path]:
    """A loop device on a file."""
    words = ("losetup", "--find", "--show", file)
    made = subprocess.run(words, check=True, capture_output=True, text=True)
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        record = record_path(device)
        for path in record.parent.glob(f"{record.stem}*"):
            path.unlink()
        subprocess.run(["losetup", "--detach", device], check=True)


def test_part_in_another_file_or_not_yet_on_disk_is_seen(apart):
    def fails() -> None:
        raise ImageError("QEMU died")

    with pytest.raises(ImageError, match="QEMU died"):
        apart.write(fails)
    assert read_facts(apart.image)["step"] == "commit"
    assert "finished" in str(recover(apart.image))
    assert pattern(apart.image, apart.format, NEW)


def test_later_write_to_a_data_file_or_device_is_kept(apart, tmp_path):
    assert in_child(lambda: apart.write(lambda: os._exit(KILLED))) == KILLED
    apart.put(0x77, 1 << 20)
    status = apart.data.stat()
    os.utime(apart.data, ns=(status.st_atime_ns, status.st_mtime_ns + 2_000_000_000))
    with pytest.raises(RefusedError, match="written to since a write") as caught:
        recover(apart.image)
    assert "--force changed" in str(caught.value.hint)
    with apart.data.open("rb") as file:
        file.seek(1 << 20)
        assert file.read(4096) == bytes([0x77]) * 4096
    assert "finished" in str(recover(apart.image, force=[Reason.CHANGED]))
    assert pattern(apart.image, apart.format, NEW)


@pytest.mark.parametrize("apart", ["data file"], indirect=True)
def test_a_data_file_of_before_put_back_is_not_written_over(tmp_path, apart):
    backup = tmp_path / "backup"
    shutil.copyfile(apart.data, backup)
    os.utime(backup, (10**9, 10**9))
    assert in_child(lambda: apart.write(lambda: os._exit(KILLED))) == KILLED
    subprocess.run(["cp", "-p", backup, apart.data], check=True)
    with pytest.raises(RefusedError, match="holds the data of it was replaced"):
        recover(apart.image)


def test_the_extents_of_a_vmdk_are_part_of_its_mark(tmp_path):
    image = tmp_path / "disk.vmdk"
    words = ["qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", image]
    subprocess.run([*words, "4M"], check=True)
    before = mark_of(image)
    assert is_as_noted(before, image)
    with (tmp_path / "disk-f001.vmdk").open("r+b") as file:
        file.write(b"since")
    assert not is_as_noted(before, image)


# A copy of what was left beside the original


def cut(image: Path, tmp_dir: Path, *, step: str | None) -> Path:
    """Write to a raw image, and be killed at a step; the overlay."""

    def dies(*words: object, **options: object) -> None:
        os._exit(KILLED)

    def work() -> None:
        if step is None:
            pytest.MonkeyPatch().setattr(transaction.Transaction, "commit", dies)
        else:
            pytest.MonkeyPatch().setattr(recovery, "remove_unread", dies)
        write(image, tmp_dir=tmp_dir)

    assert in_child(work) == KILLED
    assert read_facts(image).get("step") == step
    (overlay,) = tmp_dir.glob(".*imgtool-*")
    return overlay


@pytest.mark.parametrize("step", [None, "written"])
def test_work_on_a_copy_leaves_the_overlay_of_the_original(disk, tmp_path, step):
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    overlay = cut(disk, elsewhere, step=step)
    copies = [
        Path(shutil.copytree(disk.parent, tmp_path / name)) / disk.name for name in ("one", "two")
    ]
    said = str(recover(copies[0], force=[Reason.COPY]))
    assert "stays" in said and overlay.exists() and not record_path(copies[0]).exists()
    recover(copies[1], end=True)
    assert overlay.exists() and not record_path(copies[1]).exists()
    recover(disk)
    assert left_over(elsewhere) == [] and left_over(disk.parent) == []


@pytest.mark.parametrize("which", ["unproved", "copy", "own"])
def test_what_is_kept_is_said_to_have_all_of_a_torn_image(disk, tmp_path, imgtool_cli, which):
    torn(disk)
    image = disk
    if which == "unproved":
        lines = record_path(disk).read_text()
        record_path(disk).write_text(lines.replace('"proof"', '"prove"'))
    elif which == "copy":
        image = Path(shutil.copytree(disk.parent, tmp_path / "copy")) / disk.name
    done = imgtool_cli("recover", image, "--keep")
    (kept,) = image.parent.glob(f"{image.name}.kept-*.qcow2")
    assert done.status == 0
    assert f"by itself {image} may hold a part" in done.err
    said = f"all of it is in {kept}: imgtool overlay commit {kept} --force base-newer"
    assert said in done.err
    assert left_over(image.parent) == []
    done = imgtool_cli("overlay", "commit", kept, "--force", "base-newer")
    assert done.status == 0, done.err
    assert pattern(image, "raw", NEW)


# Other users


@needs_root
def test_other_user_is_refused_what_he_reads_only_in_part(open_folder):
    disk = made(open_folder, "raw")
    disk.chmod(0o644)
    torn(disk)
    with user(ALICE), pytest.raises(RefusedError, match="another user wrote") as caught:
        open_chain(disk, format="raw")
    assert "recover" in str(caught.value.hint)


@needs_root
def test_a_write_by_somebody_of_the_group_is_not_read_past(open_folder):
    disk = made(open_folder, "raw")
    torn(disk)
    os.chown(disk, ALICE, -1)
    os.chown(record_path(disk), BOB, -1)
    with pytest.raises(RefusedError, match="not written by its owner"):
        open_chain(disk, format="raw")


@needs_root
@pytest.mark.parametrize("step", [{}, {"step": "proved"}], ids=["begun", "proved"])
def test_others_base_cannot_have_an_overlay_written_into_it(open_folder, step):
    base, victim = made(open_folder, "qcow2"), open_folder / "victim.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, victim]
    subprocess.run(words, check=True)
    victim.chmod(0o600)
    os.chown(base, ALICE, -1)
    facts = {"operation": "commit", "overlay": victim.name, "remove": True, **step}
    os.chown(planted(base, of_overlay=victim, **facts), ALICE, -1)
    before = base.read_bytes()
    if step:
        assert recover(victim) is None  # there is nothing left to be written
    for image in (base,) if step else (victim, base):
        with pytest.raises(RefusedError, match="another user wrote"):
            recover(image)
        with pytest.raises(RefusedError, match="a file of another user"):
            recover(image, force=[Reason.UNPROVED])
    assert victim.exists()
    assert base.read_bytes() == before


def test_a_base_outside_its_places_is_not_looked_at(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    base, overlay = made(outside, "qcow2"), inside / "overlay.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay]
    subprocess.run(words, check=True)
    left(base, of_overlay=overlay, operation="commit", overlay=str(overlay), remove=True)
    assert recover(overlay) is None
    assert overlay.exists()
    assert "finished" in str(recover(overlay, backing_dirs=[outside]))


@needs_root
def test_a_record_cannot_have_a_file_of_somebody_else_removed(open_folder):
    disk = made(open_folder, "raw")
    theirs = open_folder / f".{disk.name}.imgtool-1234"
    theirs.write_text("precious")
    os.chown(disk, ALICE, -1)
    facts = {"operation": "write", "overlay": theirs.name, "images": [disk.name], "id": "x"}
    os.chown(planted(disk, of_overlay=theirs, **facts), ALICE, -1)
    with pytest.raises(RefusedError, match="another user wrote"):
        recover(disk)
    with pytest.raises(RefusedError, match="a file of another user"):
        recover(disk, force=[Reason.UNPROVED])
    assert theirs.read_text() == "precious"


def test_records_overlay_leads_no_further_than_the_image(disk, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    overlay, secret = outside / f".{disk.name}.imgtool-1234", outside / "secret"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={secret}", "-F", "raw"]
    subprocess.run([*words, "-b", disk, overlay], check=True, capture_output=True)
    facts = {"operation": "write", "step": "commit", "overlay": str(overlay), "images": [disk.name]}
    left(disk, of_overlay=overlay, **facts)
    with pytest.raises(RefusedError, match="outside the folders"):
        open_chain(disk, format="raw")


@pytest.mark.parametrize("names", [["a\0b"], [1], [], ["/nowhere/\0"], ["half \ud800"]])
def test_senseless_names_in_a_record_are_refused_in_words(disk, names):
    facts = {"operation": "write", "id": "x", "images": names, "overlay": f".{disk.name}.imgtool-1"}
    left(disk, **facts)
    with pytest.raises(RefusedError, match="makes no sense"):
        recover(disk)


# What comes while it is being written


def test_commit_killed_before_its_first_byte_changes_nothing(tmp_path):
    base, overlay = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    fill(base, "qcow2", OLD)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, overlay)
    fill(overlay, "qcow2", NEW)

    def work() -> None:
        patch = pytest.MonkeyPatch()
        patch.setattr(overlays, "mark_of", lambda path: os._exit(KILLED))  # before the first step
        overlays.plan_commit(overlay).run()

    assert in_child(work) == KILLED
    assert record_path(base).exists()
    assert open_chain(base).active.path == base  # and not what is on it
    assert reads_as(str(base), OLD) and reads_as(str(overlay), NEW)
    assert "undone: nothing had been written yet" in str(recover(base))
    assert left_over(tmp_path) == []
    overlays.plan_commit(overlay).run()
    assert reads_as(str(base), NEW)


def test_a_reader_that_locks_for_a_moment_makes_the_commit_wait(disk, monkeypatch):
    calls = []

    def busy(words, **options):
        calls.append(words[0])
        if len(calls) == 1:
            raise Locked('Failed to get "write" lock')
        run_qemu_img(words, **options)

    monkeypatch.setattr(recovery, "qemu_img", busy)
    write(disk)
    assert len(calls) == 2
    assert pattern(disk, "raw", NEW)


def holding(image: Path, work: Callable[[], None]) -> None:
    """Do something while a QEMU, as that of a guest, has the image open for writing."""
    words = ("qemu-io", "-f", "raw", image)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None and guest.stdout is not None
        guest.stdin.write(b"read 0 512\n")
        guest.stdin.flush()
        guest.stdout.readline()
        try:
            work()
        finally:
            guest.stdin.close()


def test_a_lock_of_another_qemu_is_known_as_one(disk):
    pidfile = disk.with_name("pid")
    serve = ["qemu-nbd", "--fork", "-t", "-f", "raw", f"--pid-file={pidfile}"]
    subprocess.run([*serve, f"--socket={disk.parent}/socket", disk], check=True)
    try:
        with pytest.raises(Locked):
            run_qemu_img(["resize", "-f", "raw", disk, "8M"], image=disk)
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)


def test_guest_started_before_the_word_has_the_image_alone(disk, monkeypatch):
    def started() -> None:
        with pytest.raises(RefusedError, match="in use"):
            writing.commit()

    with transaction.transaction(
        [open_chain(disk, format="raw")], notice=lambda line: None
    ) as writing:
        fill(writing.chains[0].active.path, "qcow2", NEW)
        begun: list[Chain] = []

        def looked(chain, **options):
            if begun:  # the first look was before it waited for readers
                refuse_if_in_use(chain, **options)
            begun.append(chain)

        monkeypatch.setattr(transaction, "refuse_if_in_use", looked)
        holding(disk, started)
    assert pattern(disk, "raw", OLD)
    assert left_over(disk.parent) == []


def test_the_word_is_taken_back_where_nothing_could_be_written(disk, monkeypatch):
    def refused(*words, **options):
        raise OSError("no")

    monkeypatch.setattr(recovery, "_commit", refused)
    with pytest.raises(OSError, match="no"):
        write(disk)
    assert left_over(disk.parent) == []
    assert sees(disk, OLD)


def test_an_overlay_that_was_made_meanwhile_keeps_its_base(disk):
    with (
        pytest.raises(RefusedError, match="base of an overlay"),
        transaction.transaction(
            [open_chain(disk, format="raw")], notice=lambda line: None
        ) as writing,
    ):
        fill(writing.chains[0].active.path, "qcow2", NEW)
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk]
        subprocess.run([*words, disk.with_name("above.qcow2")], check=True)
        writing.commit()
    assert pattern(disk, "raw", OLD)
    assert left_over(disk.parent) == []


def test_while_a_clone_is_made_its_base_is_not_written(disk, monkeypatch):
    monkeypatch.setattr("imgtool.image.chain.reading.PATIENCE", 0.3)
    new = disk.with_name("clone.qcow2")
    with transaction.clone(open_chain(disk, format="raw"), new) as cloning:
        with pytest.raises(RefusedError, match="another imgtool has been reading it"):
            write(disk)
        cloning.commit()
    assert new.exists()
    assert pattern(disk, "raw", OLD)
    with pytest.raises(RefusedError, match="base of an overlay"):
        write(disk)


def test_a_clone_of_a_torn_image_is_refused(disk):
    from imgtool.opening import open_guest_to_write

    torn(disk)
    for options in ({"clone": disk.with_name("clone.qcow2")}, {"review": lambda chains: None}):
        with (
            pytest.raises(RefusedError, match="was interrupted") as caught,
            open_guest_to_write(disk, format="raw", **options),
        ):
            pass
        assert "recover" in str(caught.value.hint)
    assert read_facts(disk)["step"] == "commit"


def test_ctrl_c_waits_until_the_image_is_whole(disk):
    code = """
import os, signal, sys
from pathlib import Path
import imgtool.image.change.recovery as recovery
from imgtool.host import interrupt
from tests.unit.image.intent.test_intent_state import write
really = recovery.qemu_img
def interrupted(words, **options):
    os.killpg(0, signal.SIGINT)
    really(words, **options)
recovery.qemu_img = interrupted
os.setpgid(0, 0)
with interrupt.watch():
    try:
        write(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", code, disk], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # all of it is in the image
    assert pattern(disk, "raw", NEW)
    assert left_over(disk.parent) == []


def test_a_host_that_is_too_full_for_it_is_told_before_the_word(disk, monkeypatch):
    sparse = disk.with_name("sparse.raw")
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", sparse, "64M"], check=True)

    def little(folder):
        return shutil._ntuple_diskusage(1 << 30, 1 << 30, 100)

    with (
        pytest.raises(HostError, match="no room"),
        transaction.transaction(
            [open_chain(sparse, format="raw")], notice=lambda line: None
        ) as writing,
    ):
        fill(writing.chains[0].active.path, "qcow2", NEW)
        monkeypatch.setattr(shutil, "disk_usage", little)
        writing.commit()
    monkeypatch.undo()
    assert reads_as(str(sparse), 0)
    assert left_over(disk.parent) == []


def test_guests_content_is_not_mended_as_if_it_were_the_image(disk):
    inner = disk.with_name("inner.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", inner, "1G"], check=True)
    with disk.open("r+b") as file:
        file.write(inner.read_bytes())
    before = disk.read_bytes()
    left(disk, operation="resize", format="raw", noted={})
    assert "sound" in str(recover(disk))
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "said"), [("gone", "no such folder"), ("raw.img", "not a folder")]
)
def test_a_tmp_dir_that_is_none_is_said_in_words(disk, name, said):
    with pytest.raises(HostError, match=said):
        write(disk, tmp_dir=disk.parent / name)
    assert left_over(disk.parent) == []
