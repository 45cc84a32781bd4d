"""Work that is killed at each of its steps, and then somebody uses its images, before the next
command: what was written since is never lost, and what was to be done is done or said."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import ImgtoolError, RefusedError
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.reading import remove_unread
from imgtool.image.change import (
    compacting,
    mending,
    overlays,
    plan,
    recovery,
    single,
    snapshots,
    transaction,
)
from imgtool.image.change.plan import sync_file
from imgtool.image.change.rehearsing import json_name
from imgtool.image.checks.ages import newer_bases
from imgtool.image.intent import intent_log
from imgtool.image.intent.intent_log import is_ours, record_path
from imgtool.image.intent.marks import is_as_noted
from imgtool.image.qemu.qemu_img import qemu_img as run_qemu_img
from imgtool.image.qemu.qemu_img import same_content
from tests.support import writes
from tests.support.writes import KILLED, cut_at, in_child

SIZE = 4 << 20
SINCE = 0x77
LATER = 2_000_000_000  # nanoseconds: when somebody uses it, after it was killed


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, image], check=True, capture_output=True)


def content(image: Path, snapshot: str | None = None) -> bytes:
    """What a guest sees, by QEMU alone."""
    flat = image.parent / ".flat"
    chosen = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    qemu_img("convert", "-U", "-O", "raw", *chosen, image, flat)
    try:
        return flat.read_bytes()
    finally:
        flat.unlink()


def names(image: Path) -> list[str]:
    said = subprocess.run(["qemu-img", "snapshot", "-l", image], check=True, capture_output=True)
    return [line.split()[1] for line in said.stdout.decode().splitlines()[2:]]


def everything_in(folder: Path) -> list[bytes]:
    """What a guest sees in each image of a folder, and in each of their snapshots."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".qcow2" and not is_ours(path.name):
            found.append(content(path))
            found += [content(path, name) for name in names(path)]
    return found


# The work


@dataclass(frozen=True)
class Job:
    """Work on images in a folder: how they are made, what is done, and on which image."""

    make: Callable[[Path], None]
    do: Callable[[Path], object]
    image: str
    other: str


def _pair(folder: Path) -> None:
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE))
    write(base, "write -P 1 0 2M")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", top)
    write(top, "write -P 2 1M 2M")


def _with_snapshot(folder: Path) -> None:
    image = folder / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    write(image, "write -P 1 0 2M")
    qemu_img("snapshot", "-c", "one", image)
    write(image, "write -P 2 1M 2M")


def _commit(*, remove: bool) -> Callable[[Path], object]:
    return lambda folder: overlays.plan_commit(folder / "top.qcow2", remove=remove).run()


def _revert(save_as: str | None) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        chosen = {"save_as": save_as} if save_as else {"discard": True}
        snapshots.plan_revert(folder / "base.qcow2", "one", **chosen).run()

    return do


def _plain(folder: Path) -> None:
    image = folder / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    writes.fill(image, "qcow2", writes.OLD)


def _three(folder: Path) -> None:
    _pair(folder)
    other = folder / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, str(SIZE))
    write(other, "write -P 3 2M 1M")


def _alone(job: Callable[[Path], plan.Plan]) -> Job:
    """Work on an image of its own in one step."""
    return Job(_with_snapshot, lambda folder: job(folder / "base.qcow2").run(), *["base.qcow2"] * 2)


# Work that is in one file, or in a new one: as before or as after at each moment.
OTHER_JOBS = {
    "compact": _alone(compacting.plan_compact),
    "resize": _alone(lambda image: single.plan_resize(image, "8M", require_empty_tail=_cut_all)),
    "snapshot create": _alone(lambda image: snapshots.plan_create(image, "new")),
    "snapshot delete": _alone(lambda image: snapshots.plan_delete(image, "one")),
    "repair": _alone(lambda image: single.plan_repair(image, "all")),
    "flatten": Job(
        _pair,
        lambda folder: overlays.plan_flatten(folder / "top.qcow2").run(),
        *["top.qcow2"] * 2,
    ),
    "rebase": Job(
        _three,
        lambda folder: overlays.plan_rebase(folder / "top.qcow2", folder / "other.qcow2").run(),
        *["top.qcow2"] * 2,
    ),
}


def _cut_all(*_: object) -> None:
    """Everything may be cut off."""


JOBS = {
    "commit": Job(_pair, _commit(remove=False), "base.qcow2", "top.qcow2"),
    "commit --remove": Job(_pair, _commit(remove=True), "base.qcow2", "top.qcow2"),
    "revert": Job(_with_snapshot, _revert(None), "base.qcow2", "base.qcow2"),
    "revert --save-as": Job(_with_snapshot, _revert("saved"), "base.qcow2", "base.qcow2"),
    "write": Job(
        _plain,
        lambda folder: writes.write([folder / "base.qcow2"], ["qcow2"]),
        "base.qcow2",
        "base.qcow2",
    ),
}


def _rehearse_on_snapshots(qemu_img, node, image, option, name):
    qemu_img(["snapshot", option, name, json_name(node)], image=image)


def killed(job: Job, folder: Path, number: int, after: bool) -> bool:
    """Make the images and do the work, killed before or after a step; whether there was one."""
    folder.mkdir()
    job.make(folder)

    def cut() -> None:
        wrap = cut_at(number, after)
        patch = pytest.MonkeyPatch()
        # A rehearsal does nothing to the image: it is no step of the work.
        rehearsed = partial(_rehearse_on_snapshots, run_qemu_img)
        patch.setattr(snapshots, "try_on_snapshots", rehearsed)
        for module in (plan, recovery, mending, transaction):
            patch.setattr(module, "qemu_img", wrap(module.qemu_img))
        patch.setattr(plan, "same_content", wrap(same_content))
        patch.setattr(overlays, "sync_file", wrap(sync_file))
        patch.setattr(plan, "put_in_place", wrap(plan.put_in_place))
        patch.setattr(plan, "replace", wrap(plan.replace))
        patch.setattr(intent_log.Record, "note", wrap(intent_log.Record.note))
        patch.setattr(intent_log.Record, "remove", wrap(intent_log.Record.remove))
        patch.setattr(recovery, "remove_unread", wrap(remove_unread))
        job.do(folder)

    status = in_child(cut)
    assert status in (0, KILLED), status
    return status == KILLED


# What somebody does then


def _guest(image: Path) -> None:
    """A guest is started on it, later, and writes where the work writes too, and elsewhere."""
    write(image, f"write -P {SINCE} 1536k 64k", f"write -P {SINCE} 3584k 64k")
    _later(image)


def _snapshot(image: Path) -> None:
    qemu_img("snapshot", "-c", "since", image)
    _later(image)


def _overlay(image: Path) -> None:
    new = image.with_name(f"on-{image.name}")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image.name, new)
    write(new, f"write -P {SINCE} 1536k 64k")


def _later(image: Path) -> None:
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + LATER))


USES = {"guest": _guest, "snapshot": _snapshot, "overlay": _overlay}
COMMANDS = [
    ("recover", "IMAGE"),
    ("resize", "IMAGE", "8M"),
    ("overlay", "create", "IMAGE", "new.qcow2"),
    ("compact", "IMAGE"),
    ("recover", "OTHER"),
    ("overlay", "commit", "top.qcow2", "--remove"),
    ("snapshot", "create", "OTHER", "mine"),
    ("info", "IMAGE"),
]


def _words(command: tuple[str, ...], job: Job, folder: Path) -> list[str | Path]:
    files = {"IMAGE": job.image, "OTHER": job.other}
    named = {**files, "new.qcow2": "new.qcow2", "top.qcow2": "top.qcow2"}
    return [folder / named[word] if word in named else word for word in command]


ALL = {**JOBS, **OTHER_JOBS}
USED = [
    (name, which)
    for name, job in ALL.items()
    for which in (["IMAGE", "OTHER"] if job.other != job.image else ["IMAGE"])
]


# What ends in one step with a guest alone; the long form has all of them with all.
TRIALS = [
    pytest.param(*one, use, marks=[pytest.mark.long] * (one[0] in OTHER_JOBS and use != "guest"))
    for one in USED
    for use in USES
]


@pytest.mark.parametrize(("name", "which", "use"), TRIALS)
def test_what_was_written_after_the_kill_is_not_lost(tmp_path, imgtool_cli, name, which, use):
    job = ALL[name]
    commands = [one for one in COMMANDS if "top.qcow2" not in one or job.other == "top.qcow2"]
    tried = 0
    for number in range(1, 40):
        for after in (False, True):
            folder = tmp_path / f"{number}-{after}"
            if not killed(job, folder, number, after):
                assert tried >= (8 if name in JOBS else 3)
                return
            used = folder / (job.image if which == "IMAGE" else job.other)
            if not used.exists() or not record_path(folder / job.image).exists():
                continue
            USES[use](used)
            new = used.with_name(f"on-{used.name}")
            seen, listed = content(new if use == "overlay" else used), names(used)
            command = commands[tried % len(commands)]
            tried += 1
            done = imgtool_cli(*_words(command, job, folder))
            where = f"cut {'after' if after else 'before'} {number}, then {command}: {done.err}"
            assert done.status in (0, 3, 4), where
            found = [one[: len(seen)] for one in everything_in(folder)]
            assert seen in found, f"lost: {where}"
            if used.exists():
                assert [one for one in names(used) if one in listed] or not listed, where
    pytest.fail("it never ends")


@pytest.mark.parametrize(
    ("name", "which"),
    [one for one in USED if one[0] in ("commit", "commit --remove", "write")],
)
def test_older_backup_put_in_place_is_not_written_over(tmp_path, imgtool_cli, name, which):
    """By `cp -p`: the file stays the same, and its time is one from before the work."""
    job = JOBS[name]
    used = job.image if which == "IMAGE" else job.other
    backup = tmp_path / "backup"

    def make(folder: Path) -> None:
        job.make(folder)
        shutil.copy2(folder / used, backup)
        os.utime(backup, (10**9, 10**9))
        write(folder / used, f"write -P {SINCE} 3584k 64k")
        os.utime(folder / job.other)  # which stands on it

    refused = 0
    for number in range(1, 40):
        folder = tmp_path / str(number)
        if not killed(replace(job, make=make), folder, number, after=True):
            break
        image, path = folder / job.image, folder / used
        if not record_path(image).exists() or not path.exists():
            continue
        subprocess.run(["cp", "-p", backup, path], check=True)
        kept = list(folder.iterdir())
        done = imgtool_cli("recover", image)
        assert path.read_bytes() == backup.read_bytes(), (number, done.err)
        assert done.status in (0, 4), done.err
        if done.status == 4:
            assert all(other.exists() for other in kept), done.err
            refused += "was replaced since" in done.err and "--force changed" in done.err
    assert refused


@pytest.mark.parametrize("name", JOBS)
def test_reading_commands_say_that_work_was_cut_off(tmp_path, imgtool_cli, name):
    job, folder = JOBS[name], tmp_path / "cut"
    assert killed(job, folder, 2, after=True)
    image = folder / job.image
    (tmp_path / "empty").mkdir()
    for words in (
        ("info", image),
        ("chain", "show", image),
        ("chain", "tree", folder),
        ("chain", "check", image),
        ("check", image),
        ("snapshot", "list", image),
        ("partitions", image),
        ("df", image),
        ("ls", image, "/"),
        ("cat", image, "/etc/fstab"),
        ("copy-out", image, "/etc", folder / "out"),
        ("filesystems", image),
        ("inspect", image),
        ("diff", image, folder / job.other),
        ("mount", "-m", "/dev/sda:/", image, tmp_path / "empty"),
        ("convert", image, folder / "new.qcow2"),
        ("resize", image, "8M", "--dry-run"),
        ("compact", image, "--dry-run"),
    ):
        done = imgtool_cli(*words)
        said = done.err + done.text
        assert "was interrupted" in said and "imgtool recover" in said, (words, done)
    other = folder / job.other
    assert "was interrupted" in imgtool_cli("info", other).err


def test_while_it_is_under_way_another_imgtool_says_so(tmp_path, imgtool_cli):
    _plain(tmp_path)
    image = tmp_path / "base.qcow2"
    code = (
        "import sys; from pathlib import Path\n"
        "from imgtool.image.intent.intent_log import open_record\n"
        "with open_record(Path(sys.argv[1]), create=True) as record:\n"
        "    record.note(operation='resize'); print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable]
    with subprocess.Popen(
        [*words, "-c", code, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline()
        done = imgtool_cli("info", image)
        assert done.status == 0 and f"process {other.pid}, is at work on it" in done.err
        other.stdin.close()


@pytest.mark.parametrize("group", [False, True], ids=["imgtool", "its whole group"])
@pytest.mark.parametrize("name", ["commit", "write"])
def test_a_guest_that_is_started_at_once_is_seen(tmp_path, imgtool_cli, name, group):
    """Right after a kill in the middle of the writing, not some seconds later."""
    job, image = JOBS[name], tmp_path / "base.qcow2"
    job.make(tmp_path)
    started = tmp_path / "started"
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        patch = pytest.MonkeyPatch()

        def hang(*words: Any, **options: Any) -> None:
            run_qemu_img(*words, **options)
            started.touch()
            signal.pause()

        for module in (recovery, plan):
            patch.setattr(module, "qemu_img", hang)
        job.do(tmp_path)
        os._exit(1)
    until = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(-child if group else child, signal.SIGKILL)
    os.waitpid(child, 0)
    while _tries(image):  # until the locks are gone
        assert time.monotonic() < until
    write(image, f"write -P {SINCE} 1536k 64k")
    seen = content(image)
    done = imgtool_cli("recover", image)
    assert done.status == 4 and "it was written to since" in done.err, done.err
    assert content(image) == seen


# While it is under way


def _tries(image: Path) -> int:
    """The status of a guest that wants to write to an image."""
    words = ("qemu-io", "-f", "qcow2", "-c", f"write -P {SINCE} 3584k 64k", image)
    return subprocess.run(words, check=False, capture_output=True).returncode


def test_commit_lets_no_guest_in_between_proof_and_end(tmp_path, monkeypatch):
    _pair(tmp_path)
    top, base = tmp_path / "top.qcow2", tmp_path / "base.qcow2"
    expected, tried = content(top), []

    def and_a_guest(really: Callable[..., object]) -> Callable[..., object]:
        def both(*words: object, **options: object) -> object:
            tried.append((_tries(top), _tries(base)))
            return really(*words, **options)

        return both

    monkeypatch.setattr(plan, "qemu_img", and_a_guest(run_qemu_img))
    monkeypatch.setattr(plan, "same_content", and_a_guest(same_content))
    monkeypatch.setattr(overlays, "sync_file", and_a_guest(sync_file))
    monkeypatch.setattr(recovery, "remove_unread", and_a_guest(remove_unread))
    overlays.plan_commit(top, remove=True).run()
    assert tried == [(1, 1)] * 4
    assert not top.exists() and content(base) == expected
    assert _tries(base) == 0


def test_what_was_put_on_the_overlay_meanwhile_keeps_it(tmp_path, imgtool_cli, monkeypatch):
    _pair(tmp_path)
    top, new = tmp_path / "top.qcow2", tmp_path / "on-top.qcow2"
    expected = content(top)

    def and_an_overlay(path: Path) -> None:
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", top.name, new, str(SIZE))
        sync_file(path)

    monkeypatch.setattr(overlays, "sync_file", and_an_overlay)
    done = imgtool_cli("overlay", "commit", top, "--remove")
    assert done.status == 0, done.err
    assert "yet it stays" in done.err and f"{new} stands on it" in done.err
    assert content(new) == expected and not record_path(tmp_path / "base.qcow2").exists()


@pytest.mark.parametrize("name", JOBS)
def test_who_is_locked_out_has_done_nothing(tmp_path, name):
    job = JOBS[name]
    job.make(tmp_path)
    image = tmp_path / job.other
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = ["qemu-io", "-f", "qcow2", image]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None and guest.stdout is not None
        guest.stdin.write(b"read 0 512\n")
        guest.stdin.flush()
        guest.stdout.readline()
        try:
            with pytest.raises(RefusedError, match="in use"):
                job.do(tmp_path)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        finally:
            guest.stdin.close()


@pytest.mark.parametrize(
    "words", [("resize", "8M"), ("snapshot", "create", "new"), ("snapshot", "revert", "one")]
)
def test_guest_started_after_the_last_look_locks_work_out(
    tmp_path, imgtool_cli, monkeypatch, words
):
    """Nothing is left to be finished over what that guest writes."""
    _with_snapshot(tmp_path)
    image, held = tmp_path / "base.qcow2", []
    really = plan.Seen.refuse_if_changed

    def looked(seen: plan.Seen) -> None:
        really(seen)
        guest = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert guest.stdin is not None and guest.stdout is not None
        guest.stdin.write(f"write -P {SINCE} 3584k 64k\n".encode())
        guest.stdin.flush()
        guest.stdout.readline()
        held.append(guest)

    monkeypatch.setattr(plan.Seen, "refuse_if_changed", looked)
    more = ("--discard",) if "revert" in words else ()
    verb = words[:2] if words[0] == "snapshot" else words[:1]
    done = imgtool_cli(*verb, image, *words[len(verb) :], *more)
    monkeypatch.undo()
    (guest,) = held
    assert guest.stdin is not None and guest.stdout is not None
    try:
        kept = guest.poll() is None and words[0] == "resize"
        assert done.status == (1 if kept else 0), done.err
        assert not record_path(image).exists() or kept, done.err
    finally:
        guest.stdin.close()
        guest.wait()
        guest.stdout.close()
    if words[0] == "resize":
        seen = content(image)
        imgtool_cli("recover", image)
        assert content(image) == seen and not record_path(image).exists()
    assert names(image) == ["one"] or words[0] == "snapshot"


def test_what_cannot_be_finished_is_ended_and_all_of_it_is_kept(tmp_path, imgtool_cli, monkeypatch):
    job = JOBS["write"]
    for number in range(1, 40):
        folder = tmp_path / str(number)
        assert killed(job, folder, number, False)
        image = folder / job.image
        if intent_log.read_facts(image).get("step") == "commit":
            break

    def fails(*words: object, **options: object) -> None:
        raise ImgtoolError("QEMU could not do it", subject=image)

    monkeypatch.setattr(recovery, "qemu_img", fails)
    done = imgtool_cli("recover", image)
    assert done.status == 1 and f"imgtool recover {image} --keep" in done.err
    before = content(image)
    done = imgtool_cli("recover", image, "--keep")
    assert done.status == 0, done.err
    (kept,) = folder.glob("base.qcow2.kept-*.qcow2")
    assert str(kept) in done.err and content(image) == before
    assert writes.pattern(kept, "qcow2", writes.NEW)
    assert not any(is_ours(path.name) for path in folder.iterdir())
    assert imgtool_cli("resize", image, "8M").status == 4  # the base of what was kept


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to attach a device")
def test_device_writes_are_seen_by_the_kernels_count(tmp_path, imgtool_cli):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8 << 20))
    attach = ["/sbin/losetup", "-f", "--show", disk]
    device = Path(subprocess.run(attach, check=True, capture_output=True).stdout.decode().strip())
    try:
        qemu_img("create", "-q", "-f", "qcow2", device, "4M")
        write(device, "write -P 1 0 1M")
        qemu_img("snapshot", "-c", "one", device)
        write(device, "write -P 2 0 1M")

        def cut() -> None:
            patch = pytest.MonkeyPatch()
            wrap = cut_at(2, True)
            patch.setattr(intent_log.Record, "note", wrap(intent_log.Record.note))
            snapshots.plan_revert(device, "one", save_as="saved").run()

        assert in_child(cut) == KILLED
        facts: Any = intent_log.read_facts(device)
        noted = facts["noted"]["image"]
        assert is_as_noted(noted, device)
        write(device, f"write -P {SINCE} 0 1M")
        assert not is_as_noted(noted, device)
        seen = content_of_device(device, tmp_path)
        done = imgtool_cli("recover", device)
        assert done.status == 0 and "was used since" in done.err, done.err
        assert content_of_device(device, tmp_path) == seen
        assert names(device) == ["one", "saved"]
    finally:
        record_path(device).unlink(missing_ok=True)
        subprocess.run(["/sbin/losetup", "-d", device], check=True)


def content_of_device(device: Path, folder: Path) -> bytes:
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", device, folder / "flat")
    return (folder / "flat").read_bytes()


# Overlays on an image in which a guest sees the same after the work


def _with_overlays(folder: Path) -> None:
    """base <- top <- above <- higher; top has a dirty bitmap, which QEMU writes down."""
    _pair(folder)
    top = folder / "top.qcow2"
    qemu_img("bitmap", "--add", top, "dirty")
    for name, below in (("above", "top"), ("higher", "above")):
        words = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"{below}.qcow2"]
        qemu_img(*words, folder / f"{name}.qcow2")


KEPT = {
    "commit": _commit(remove=False),
    "snapshot create": lambda folder: snapshots.plan_create(folder / "top.qcow2", "new").run(),
    "repair": lambda folder: single.plan_repair(folder / "top.qcow2", "all").run(),
}


def in_order(folder: Path) -> bool:
    return not list(newer_bases(open_chain(folder / "higher.qcow2").links))


@pytest.mark.parametrize("name", KEPT)
def test_overlays_stay_younger_than_an_unchanged_image(tmp_path, name):
    _with_overlays(tmp_path)
    KEPT[name](tmp_path)
    assert in_order(tmp_path)


@pytest.mark.parametrize(
    ("name", "then"), [*((name, "recover") for name in KEPT), ("commit", "repeat")]
)
def test_so_they_do_where_the_work_was_cut_off(tmp_path, name, then):
    for number in range(1, 40):
        folder = tmp_path / str(number)
        if not killed(Job(_with_overlays, KEPT[name], "", ""), folder, number, True):
            break
        if then == "repeat":
            KEPT[name](folder)
        else:
            recovery.recover(folder / "top.qcow2")
            recovery.recover(folder / "base.qcow2")
        assert in_order(folder), number
    assert number > 3


@pytest.mark.parametrize("name", KEPT)
def test_they_do_not_where_somebody_wrote_to_it_since(tmp_path, name):
    """Killed after the first step of QEMU; what stands on the image may not fit any more."""
    found = 0
    for number in range(1, 9):
        folder = tmp_path / str(number)
        if not killed(Job(_with_overlays, KEPT[name], "", ""), folder, number, True):
            break
        if not record_path(folder / ("base.qcow2" if name == "commit" else "top.qcow2")).exists():
            continue
        _guest(folder / "top.qcow2")
        for image in ("top", "base"):
            with contextlib.suppress(RefusedError):
                recovery.recover(folder / f"{image}.qcow2")
        assert not in_order(folder), number
        found += 1
    assert found
