"""Internal snapshots: kept, gone back to without losing the present, deleted; space given back."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.change.mending import on_snapshots
from imgtool.image.change.snapshots import space_to_give_back
from imgtool.image.intent.intent_log import is_ours
from imgtool.image.intent.marks import snapshots_of
from imgtool.image.qemu.disk_reader import open_contents
from tests.support.records import left

MIB = 1 << 20


def qemu_img(*words: str | Path) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True).stdout


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    argv: list[str | Path] = ["qemu-io", "-t", "writeback", "-f", "qcow2", *words, image]
    subprocess.run(argv, check=True, capture_output=True)


def first_byte(image: Path) -> int:
    with open_contents(open_chain(image)) as (read, _):
        return read(0, 1)[0]


def names(image: Path) -> list[str]:
    return [snapshot.name for snapshot in open_chain(image).active.snapshots]


def nothing_left(folder: Path) -> bool:
    return not any(is_ours(path.name) for path in folder.iterdir())


def made(path: Path, *options: str) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, "8M")
    write(path, "write -P 1 0 1M")
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """`one` holds ones; the present state holds twos and is in no snapshot."""
    path = made(tmp_path / "disk.qcow2")
    qemu_img("snapshot", "-c", "one", path)
    write(path, "write -P 2 0 1M")
    return path


def test_revert_refuses_to_lose_the_present_state(image, imgtool_cli):
    content = image.read_bytes()
    done = imgtool_cli("snapshot", "revert", image, "one")
    assert done.status == 4 and "--save-as" in done.err and "--discard" in done.err
    assert image.read_bytes() == content
    assert imgtool_cli("snapshot", "revert", image, "one", "--save-as", "two").status == 0
    assert first_byte(image) == 1 and names(image) == ["one", "two"]
    assert imgtool_cli("snapshot", "revert", image, "two").status == 0  # the present is in `one`
    assert first_byte(image) == 2
    write(image, "write -P 3 0 1M")
    assert imgtool_cli("snapshot", "revert", image, "one", "--discard").status == 0
    assert first_byte(image) == 1 and names(image) == ["one", "two"]
    assert nothing_left(image.parent)


def test_list_says_which_snapshot_is_the_present(image, imgtool_cli):
    rows = json.loads(imgtool_cli("snapshot", "list", image, "-o", "json").text)
    assert [(row["name"], row["present"]) for row in rows] == [("one", False)]
    imgtool_cli("snapshot", "create", image, "two")
    rows = json.loads(imgtool_cli("snapshot", "list", image, "-o", "json").text)
    assert [(row["name"], row["present"]) for row in rows] == [("one", False), ("two", True)]


def test_a_disk_of_another_size_is_another_state(tmp_path, imgtool_cli):
    image = made(tmp_path / "disk.qcow2")
    qemu_img("snapshot", "-c", "small", image)
    qemu_img("resize", "-q", image, "16M")
    assert imgtool_cli("snapshot", "revert", image, "small").status == 4
    done = imgtool_cli("snapshot", "revert", image, "small", "--save-as", "large")
    assert done.status == 0, done.err
    assert open_chain(image).active.virtual_size == 8 * MIB and first_byte(image) == 1
    assert imgtool_cli("snapshot", "revert", image, "large").status == 0
    assert open_chain(image).active.virtual_size == 16 * MIB and first_byte(image) == 1


def test_a_name_that_is_the_id_of_another(tmp_path, imgtool_cli):
    image = made(tmp_path / "disk.qcow2")
    qemu_img("snapshot", "-c", "2", image)  # id 1
    write(image, "write -P 2 0 1M")
    qemu_img("snapshot", "-c", "1", image)  # id 2
    assert imgtool_cli("snapshot", "revert", image, "2").status == 0  # by its name
    assert first_byte(image) == 1
    assert imgtool_cli("snapshot", "delete", image, "1").status == 0
    assert names(image) == ["2"]
    done = imgtool_cli("snapshot", "create", image, "1")
    assert done.status == 4 and "already" in done.err  # it is the id of that one


def test_duplicates_are_told_apart_by_their_ids(tmp_path, imgtool_cli):
    image = made(tmp_path / "disk.qcow2")
    for value in (2, 3):
        qemu_img("snapshot", "-c", "same", image)
        write(image, f"write -P {value} 0 1M")
    assert imgtool_cli("snapshot", "revert", image, "2", "--discard").status == 0
    assert first_byte(image) == 2
    done = imgtool_cli("snapshot", "delete", image, "2")
    assert done.status == 5 and "delete 1 first" in done.err
    assert imgtool_cli("snapshot", "delete", image, "1").status == 0
    assert imgtool_cli("snapshot", "revert", image, "2", "--discard").status == 0
    assert first_byte(image) == 2


@pytest.mark.parametrize("name", ["-x", "a,b", "new\nline", "ü" * 127, "snapshot.id=1"])
def test_any_name_of_a_snapshot(image, imgtool_cli, name):
    for command in ("create", "revert", "delete"):
        done = imgtool_cli("snapshot", command, image, "--", name)
        assert done.status == 0, done.err
    assert names(image) == ["one"]


@pytest.mark.parametrize("name", ["", "x" * 256, "ü" * 128])
def test_a_name_that_qemu_would_cut_is_refused(image, imgtool_cli, name):
    assert imgtool_cli("snapshot", "create", image, name).status == 2


def test_no_such_snapshot_lists_those_that_there_are(image, imgtool_cli):
    for command in ("revert", "delete"):
        done = imgtool_cli("snapshot", command, image, "two")
        assert done.status == 5 and "one" in done.err


def test_a_raw_image_has_no_snapshots_but_can_have_an_overlay(tmp_path, imgtool_cli):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"x" * MIB)
    for command in ("create", "revert", "delete", "list"):
        done = imgtool_cli("snapshot", command, raw, *([] if command == "list" else ["s"]))
        assert done.status == 3
        assert "imgtool overlay create" in done.err and "convert" in done.err


def test_delete_says_how_much_compact_gives_back(tmp_path, imgtool_cli):
    image = made(tmp_path / "disk.qcow2")
    qemu_img("snapshot", "-c", "keep", image)
    write(image, "write -P 2 0 4M")
    qemu_img("snapshot", "-c", "drop", image)
    write(image, "write -P 3 0 4M")
    done = imgtool_cli("snapshot", "delete", image, "drop")
    assert done.status == 0 and "the file does not shrink" in done.err
    assert "imgtool compact" in done.err
    expected = space_to_give_back(image)
    before = image.stat().st_blocks * 512
    assert imgtool_cli("compact", image).status == 0
    given = before - image.stat().st_blocks * 512
    assert abs(given - expected) < 512 << 10
    assert names(image) == ["keep"] and first_byte(image) == 3
    assert imgtool_cli("snapshot", "revert", image, "keep", "--discard").status == 0
    assert first_byte(image) == 1
    assert qemu_img("check", image).startswith(b"No errors")


@pytest.mark.parametrize("step", ["saved", "applied", "tidied"])
@pytest.mark.parametrize("finish", [True, False])
def test_a_revert_that_was_cut_off_is_finished_by_recover(image, imgtool_cli, step, finish):
    facts: dict[str, Any] = {"operation": "revert", "to": "1", "saved": "safety", "temporary": True}
    facts["others"] = snapshots_of(image)
    if step == "saved":
        left(image, **facts)
    qemu_img("snapshot", "-c", "safety", image)
    if step != "saved":
        left(image, **facts, step="apply")
        if finish:
            qemu_img("snapshot", "-a", "one", image)
    if step == "tidied":
        qemu_img("snapshot", "-a", "one", image)
        qemu_img("snapshot", "-d", "safety", image)
    done = imgtool_cli("recover", image)
    assert done.status == 0 and ("undone" if step == "saved" else "finished") in done.err
    assert first_byte(image) == (2 if step == "saved" else 1)
    assert names(image) == ["one"] and nothing_left(image.parent)


@pytest.mark.parametrize("failing", ["-c", "-a", "-d"])
def test_a_revert_that_fails_leaves_the_present_state(image, imgtool_cli, monkeypatch, failing):
    from imgtool.errors import ImgtoolError
    from imgtool.image.change import snapshots

    failed: list[str] = []

    def once(path: Path, option: str, name: str) -> None:
        if option == failing and not failed:
            failed.append(option)
            raise ImgtoolError("QEMU could not do it")
        on_snapshots(path, option, name)

    monkeypatch.setattr(snapshots, "on_snapshots", once)
    done = imgtool_cli("snapshot", "revert", image, "one", "--discard")
    assert done.status == 1 and "undone" in done.err
    assert first_byte(image) == 2 and names(image) == ["one"]
    assert nothing_left(image.parent)


def test_snapshot_that_qemu_cannot_make_leaves_the_image_sound(tmp_path, imgtool_cli):
    image = made(tmp_path / "disk.qcow2", "-o", "refcount_bits=1")
    done = imgtool_cli("snapshot", "create", image, "s")
    assert done.status == 3 and "refcount_bits=1" in done.err
    assert qemu_img("check", image).startswith(b"No errors") and first_byte(image) == 1
    assert names(image) == [] and nothing_left(tmp_path)


def test_an_old_qcow2_and_an_overlay_have_snapshots_too(tmp_path, imgtool_cli):
    base = made(tmp_path / "base.qcow2", "-o", "compat=0.10")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", top)
    for image in (base, top):
        assert imgtool_cli("snapshot", "create", image, "s").status == 0
    write(top, "write -P 5 0 1M")
    assert imgtool_cli("snapshot", "revert", top, "s", "--discard").status == 0
    assert first_byte(top) == 1
    refused = imgtool_cli("snapshot", "revert", base, "s")
    assert refused.status == 4 and "top.qcow2" in refused.err


@pytest.mark.parametrize("command", ["create s", "delete one", "revert one --discard"])
def test_a_dry_run_changes_nothing(image, imgtool_cli, command):
    before = (image.read_bytes(), image.stat().st_mtime_ns)
    verb, *more = command.split()
    assert imgtool_cli("snapshot", verb, image, *more, "--dry-run").status == 0
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before
    assert [path.name for path in image.parent.iterdir()] == [image.name]
