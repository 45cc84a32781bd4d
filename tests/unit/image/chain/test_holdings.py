"""Snapshots, dirty bitmaps and names in an image: there after every work on it, or it is undone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import ImgtoolError
from imgtool.formats.qcow2 import read_header
from imgtool.host.process import ProgramFailed
from imgtool.image.chain.holdings import lost, note_holdings
from imgtool.image.chain.info import probe
from imgtool.image.change import snapshots
from imgtool.image.change.mending import on_snapshots
from imgtool.image.change.plan import Plan, Work
from imgtool.image.change.repairing import repair_tables
from imgtool.image.intent.intent_log import record_path
from imgtool.image.intent.marks import snapshots_of
from tests.support.holding import (
    AUTOCLEAR,
    CLUSTER,
    INCOMPATIBLE,
    MIB,
    bitmaps_in,
    contents,
    held,
    kill_a_writer,
    leak,
    miscount,
    noted_in,
    nothing_left,
    patch,
    qemu_img,
    snapshots_in,
    tables,
    with_both,
    write,
)
from tests.support.records import left


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return with_both(tmp_path / "disk.qcow2")


def test_holdings_are_what_qemu_says(image):
    qemu_img("bitmap", "--add", "-g", "4k", "--disable", image, "b\u00fc 2")
    kill_a_writer(image)
    qemu_img("bitmap", "--add", "-g", "2M", image, "third")
    told = json.loads(qemu_img("info", "--output=json", image))
    assert [
        {
            "name": bitmap.name.decode(),
            "granularity": bitmap.granularity,
            "flags": ["in-use"] * bitmap.in_use + ["auto"] * bitmap.auto,
        }
        for bitmap in bitmaps_in(image)
    ] == told["format-specific"]["data"]["bitmaps"]
    assert {bitmap.in_use for bitmap in bitmaps_in(image)} == {True, False}
    assert [(row.id, row.name) for row in snapshots_in(image)] == [(b"1", b"one")]
    assert held(image).virtual_size == told["virtual-size"]


def test_bitmaps_that_a_program_without_them_has_left_are_none(image):
    patch(image, AUTOCLEAR, b"\0")
    assert held(image).bitmaps == () and len(snapshots_in(image)) == 1


def test_what_is_lost_is_said(image, tmp_path):
    before = held(image)
    assert lost(before, before) == []
    qemu_img("snapshot", "-d", "one", image)
    qemu_img("bitmap", "--remove", image, "since")
    qemu_img("resize", "-q", image, "16M")
    assert lost(before, held(image)) == [
        "snapshot 'one'",
        "bitmap 'since'",
        f"its size of {8 * MIB} bytes",
    ]


AS_IT_IS: Callable[[Path], None] = lambda image: None  # noqa: E731


@pytest.mark.parametrize("damage", [AS_IT_IS, leak, miscount], ids=["sound", "leak", "miscount"])
@pytest.mark.parametrize("flags", [None, (INCOMPATIBLE, 2), (INCOMPATIBLE, 1), (AUTOCLEAR, 0x81)])
def test_a_repair_loses_nothing(image, imgtool_cli, damage, flags):
    """Seen with QEMU 7.2: each of these lost its snapshots, by 'leaks' as well as by 'all'."""
    expected, before, dirty = contents(image), held(image), noted_in(image, "since")
    damage(image)
    if flags is not None:
        patch(image, flags[0], bytes([flags[1]]))
    done = imgtool_cli("check", "--repair", "all", image)
    assert done.status == 0, done.err
    assert held(image) == before and tables(image) == {}
    assert contents(image) == expected and noted_in(image, "since") == dirty
    assert nothing_left(image.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root repairs images of others")
def test_root_repairs_an_image_of_another_user(image, imgtool_cli):
    """Who could exchange it while QEMU opens it for the rehearsal."""
    miscount(image)
    os.chown(image, 1234, 1234)
    before = held(image)
    done = imgtool_cli("check", "--repair", "all", image)
    assert done.status == 0, done.err
    assert held(image) == before


def test_a_repair_loses_no_snapshot_where_bitmaps_are_not_valid(image, imgtool_cli):
    patch(image, AUTOCLEAR, b"\0")
    expected = contents(image)
    assert tables(image) != {}, "the clusters of the bitmap are lost space"
    done = imgtool_cli("check", "--repair", "leaks", image)
    assert done.status == 0, done.err
    assert tables(image) == {} and contents(image) == expected and len(expected) == 2


def test_a_repair_of_an_overlay_keeps_the_name_of_its_base(image, tmp_path, imgtool_cli):
    top = with_both(tmp_path / "top.qcow2", "-b", "disk.qcow2", "-F", "qcow2")
    before, expected = held(top), contents(top)
    leak(top)
    assert imgtool_cli("check", "--repair", "leaks", top).status == 0
    assert before.backing == b"disk.qcow2"
    assert held(top) == before and contents(top) == expected and tables(top) == {}


def test_lost_space_is_not_mended_where_snapshots_would_go(image, imgtool_cli):
    leak(image)
    miscount(image)
    content = image.read_bytes()
    done = imgtool_cli("check", "--repair", "leaks", image)
    assert done.status == 4 and "snapshot 'one'" in done.err
    assert image.read_bytes() == content and nothing_left(image.parent)
    assert f"imgtool check --repair all {image}" in done.err
    assert imgtool_cli("check", "--repair", "all", image).status == 0
    assert tables(image) == {} and len(contents(image)) == 2


def test_a_table_that_cannot_be_read_is_not_repaired_away(image, imgtool_cli):
    at = int.from_bytes(image.read_bytes()[64:72], "big")
    patch(image, at + 36, b"\xff\xff\xff\xff")  # the length of what is before the name
    content = image.read_bytes()
    done = imgtool_cli("check", "--repair", "all", image)
    assert done.status == 3 and "table of internal snapshots is damaged" in done.err
    assert image.read_bytes() == content and nothing_left(image.parent)
    assert followed(done.err, image) == contents(with_both(image.with_name("new.qcow2")))[0]


def followed(said: str, image: Path) -> bytes:
    """What the copy holds that a hint says to make; in a file of its own, named COPY."""
    steps = said.partition("then: ")[2].strip().split(", then ")
    assert len(steps) == 2, said
    content = image.read_bytes()
    for step in steps:
        subprocess.run(step, shell=True, check=True, capture_output=True, cwd=image.parent)
    assert image.read_bytes() == content
    return contents(image.with_name("COPY"))[0]


def test_a_table_of_bitmaps_that_cannot_be_read_is_named(image, imgtool_cli):
    expected = contents(image)[0]
    with image.open("rb") as file:
        header = read_header(file)
    assert header is not None and header.bitmaps is not None
    directory = int.from_bytes(header.bitmaps[16:24], "big")
    for at, content in ((20, b"\0\0\0\7"), (17, b"\x7f")):  # more than QEMU takes; granularity
        copy = image.with_name("damaged.qcow2")
        shutil.copy(image, copy)
        patch(copy, directory + at, content)
        assert held(copy).bitmaps is None
        done = imgtool_cli("snapshot", "create", copy, "two")
        assert done.status == 3 and "table of dirty bitmaps is damaged" in done.err
        assert followed(done.err, copy) == expected


def test_where_a_repair_cannot_be_tried_out_nothing_is_done(image, imgtool_cli, monkeypatch):
    miscount(image)
    content = image.read_bytes()

    def full(way: object, *_: object) -> None:
        raise ProgramFailed(["qemu-img"], 1, "qemu-img: No space left on device")

    monkeypatch.setattr("imgtool.image.change.repairing.rehearse", full)
    done = imgtool_cli("check", "--repair", "all", image)
    assert done.status == 6 and "TMPDIR" in done.err
    assert image.read_bytes() == content and nothing_left(image.parent)


@pytest.mark.parametrize("operation", ["resize", "rebase", "snapshot create", "snapshot delete"])
@pytest.mark.parametrize("damage", [AS_IT_IS, leak, miscount], ids=["sound", "leak", "miscount"])
def test_recover_loses_nothing(image, imgtool_cli, operation, damage):
    before, expected = held(image), contents(image)
    left(image, operation=operation, format="qcow2", noted={})
    damage(image)
    done = imgtool_cli("recover", image)
    assert done.status == 0, done.err
    assert held(image) == before and contents(image) == expected
    assert tables(image) in ({}, {"leaks": 1}) and nothing_left(image.parent)


def test_cut_off_commit_is_finished_and_loses_nothing(image, tmp_path, imgtool_cli):
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", top)
    write(top, "write -P 7 4M 1M")
    expected = contents(top)[0]
    left(image, of_overlay=top, operation="commit", overlay="top.qcow2", format="qcow2")
    leak(image)
    done = imgtool_cli("recover", image)
    assert done.status == 0, done.err
    assert len(contents(image)) == 2 and contents(image)[0] == expected
    assert [bitmap.name for bitmap in bitmaps_in(image)] == [b"since"]


def test_a_bitmap_that_a_killed_writer_has_spoilt_is_said(image, imgtool_cli):
    def killed(work: Work) -> None:
        kill_a_writer(image)
        raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Plan("resize", image, (), killed, "qcow2").run(notice=said.append)
    assert "a backup by its bitmap 'since' has to begin anew" in said[0]


def test_bitmaps_being_written_at_a_kill_are_said(image, imgtool_cli):
    holdings: Any = note_holdings(held(image), held(image))
    left(image, operation="resize", format="qcow2", noted={}, **holdings)
    patch(image, AUTOCLEAR, b"\0")  # as QEMU does before it writes them
    done = imgtool_cli("recover", image)
    assert done.status == 0 and "its bitmap 'since' has to begin anew" in done.err
    assert len(contents(image)) == 2 and nothing_left(image.parent)


def test_what_an_operation_loses_is_an_error(image):
    def loses(work: Work) -> None:
        qemu_img("snapshot", "-d", "one", image)

    with pytest.raises(ImgtoolError, match="snapshot 'one'"):
        Plan("resize", image, (), loses, "qcow2").run()
    assert nothing_left(image.parent)


LOSES = """#!/bin/sh
# Does what it is asked for, and forgets a snapshot.
{real} "$@" || exit
case "$1 $2 $3" in
  snapshot*) for image; do :; done ;;
  resize*) shift $(($# - 2)); image=$1 ;;
  *) exit 0 ;;
esac
{real} snapshot -d one "$image" 2>/dev/null || true
"""


@pytest.mark.parametrize(
    "words",
    [
        ("snapshot", "create", "{}", "now"),
        ("snapshot", "delete", "{}", "two"),
        ("snapshot", "revert", "--discard", "{}", "two"),
        ("snapshot", "revert", "--save-as", "now", "{}", "two"),
        ("resize", "{}", "+1M"),
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_loss_by_qemu_is_seen_before_the_image_is_touched(
    image, tmp_path, monkeypatch, imgtool_cli, words
):
    qemu_img("bitmap", "--remove", image, "since")
    qemu_img("snapshot", "-c", "two", image)
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "qemu-img"
    program.write_text(LOSES.format(real=shutil.which("qemu-img")))
    program.chmod(0o755)
    before = (image.read_bytes(), image.stat().st_mtime_ns)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        done = imgtool_cli(*(word.format(image) for word in words))
    assert done.status == 4, done.err
    assert "QEMU would lose what the image holds: snapshot 'one'; nothing was changed" in done.err
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before
    assert nothing_left(tmp_path)
    assert imgtool_cli(*(word.format(image) for word in words)).status == 0


def test_a_file_that_lacks_something_takes_nobodys_place(image, tmp_path):
    content = image.read_bytes()
    new = tmp_path / ".disk.qcow2.imgtool-00000000"

    def loses(work: Work) -> None:
        work.reserve(new)
        qemu_img("convert", "-O", "qcow2", image, new)
        work.swap(new, image)

    facts = {"temporary": str(new)}
    with pytest.raises(ImgtoolError, match="snapshot 'one'; bitmap 'since'"):
        Plan("compact", image, (), loses, "qcow2", facts=facts).run()
    assert image.read_bytes() == content and nothing_left(tmp_path)


def test_revert_beside_bitmaps_is_refused_at_once(image, imgtool_cli):
    content = image.read_bytes()
    for disable in (False, True):
        if disable:
            qemu_img("bitmap", "--disable", image, "since")
            content = image.read_bytes()
        done = imgtool_cli("snapshot", "revert", image, "one", "--save-as", "now")
        assert done.status == 4 and "since" in done.err
        assert image.read_bytes() == content and nothing_left(image.parent)
    assert f"qemu-img bitmap --remove {image} since" in done.err
    qemu_img("bitmap", "--remove", image, "since")
    assert imgtool_cli("snapshot", "revert", image, "one", "--save-as", "now").status == 0
    assert [row.name for row in snapshots_in(image)] == [b"one", b"now"]


@pytest.mark.parametrize("words", [("recover",), ("resize", "16M"), ("compact",)])
def test_a_bitmap_that_came_after_a_kill_ends_a_revert(image, imgtool_cli, words):
    """It is all that changed, and QEMU reverts no image that has one."""
    qemu_img("bitmap", "--remove", image, "since")
    others, before = snapshots_of(image), contents(image)
    qemu_img("snapshot", "-c", "saved", image)
    facts: dict[str, Any] = {"to": "1", "saved": "saved", "temporary": True, "others": others}
    left(image, operation="revert", format="qcow2", step="apply", **facts)
    qemu_img("bitmap", "--add", image, "later")
    done = imgtool_cli(words[0], image, *words[1:])
    assert done.status == 0 and "it stays as it is" in done.err, done.err
    assert nothing_left(image.parent)
    assert [row.name for row in snapshots_in(image)] == [b"one", b"saved"]
    assert [bitmap.name for bitmap in bitmaps_in(image)] == [b"later"]
    assert contents(image)[0][: 8 * MIB] == contents(image)[2] == before[0]


def test_nobody_writes_between_the_two_steps_of_a_revert(image, imgtool_cli, monkeypatch):
    qemu_img("bitmap", "--remove", image, "since")
    before = contents(image)[0]
    tried: list[int] = []

    def and_somebody_writes(path: Path, option: str, name: str) -> None:
        on_snapshots(path, option, name)
        argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", image]
        tried.append(subprocess.run(argv, check=False, capture_output=True).returncode)

    monkeypatch.setattr(snapshots, "on_snapshots", and_somebody_writes)
    done = imgtool_cli("snapshot", "revert", image, "one", "--save-as", "now")
    assert done.status == 0, done.err
    assert tried == [1, 1]
    one, _, now = contents(image)
    assert now == before and one[: 2 * MIB] == b"\1" * (2 * MIB)


@pytest.mark.parametrize(
    "words",
    [
        ("snapshot", "create", "two"),
        ("resize", "16M"),
        ("resize", "6M", "--force", "shrink"),
        ("compact",),
    ],
)
def test_the_rest_stays_through_other_work(image, imgtool_cli, words):
    before = held(image)
    command = words[:2] if words[0] == "snapshot" else words[:1]
    done = imgtool_cli(*command, image, *words[len(command) :])
    assert done.status == 0, done.err
    assert bitmaps_in(image) == before.bitmaps
    assert snapshots_in(image)[:1] == before.snapshots


def test_a_snapshot_is_deleted_and_the_bitmap_stays(image, imgtool_cli):
    before, dirty = held(image), noted_in(image, "since")
    assert imgtool_cli("snapshot", "delete", image, "one").status == 0
    assert held(image) == before.without_snapshot("1") and noted_in(image, "since") == dirty


def test_a_disk_that_qemu_does_not_resize_is_refused_in_words(image, tmp_path, imgtool_cli):
    kill_a_writer(image)
    done = imgtool_cli("resize", image, "16M")
    assert done.status == 4 and f"qemu-img bitmap --remove {image} since" in done.err
    old = tmp_path / "old.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", old, "8M")
    qemu_img("snapshot", "-c", "one", old)
    done = imgtool_cli("resize", old, "16M")
    assert done.status == 4 and "0.10" in done.err and nothing_left(tmp_path)


@pytest.fixture
def overlay(image: Path) -> Path:
    """An overlay with two dirty bitmaps, one of which notes nothing any more."""
    top = image.with_name("top.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", top)
    qemu_img("bitmap", "--add", "-g", "4k", top, "fine")
    write(top, "write -P 7 4M 8k")
    qemu_img("bitmap", "--disable", top, "fine")
    qemu_img("bitmap", "--add", top, "coarse")
    write(top, "write -P 6 5M 8k")
    return top


def test_flatten_takes_bitmaps_along(overlay, imgtool_cli):
    before, expected = held(overlay), contents(overlay)
    dirty = [noted_in(overlay, name) for name in ("fine", "coarse")]
    done = imgtool_cli("overlay", "flatten", overlay)
    assert done.status == 0 and "2 dirty bitmaps" in done.err
    assert bitmaps_in(overlay) == before.bitmaps and held(overlay).backing is None
    assert [noted_in(overlay, name) for name in ("fine", "coarse")] == dirty
    assert dirty == [[(4 * MIB, 8192)], [(5 * MIB, CLUSTER)]]
    assert contents(overlay) == expected


def test_flatten_drops_no_bitmaps_unasked(overlay, imgtool_cli):
    kill_a_writer(overlay)
    content = overlay.read_bytes()
    done = imgtool_cli("overlay", "flatten", overlay)
    assert done.status == 4 and "coarse" in done.err and "--force bitmaps" in done.err
    assert overlay.read_bytes() == content
    done = imgtool_cli("overlay", "flatten", overlay, "--force", "bitmaps")
    assert done.status == 0 and "leave out its 2 dirty bitmaps" in done.err
    assert held(overlay).bitmaps == () and held(overlay).backing is None


def test_commit_keeps_both_sides_and_no_bitmap_goes_unasked(image, overlay, imgtool_cli):
    base, top = held(image), held(overlay)
    done = imgtool_cli("overlay", "commit", overlay, "--remove")
    assert done.status == 4 and "--force bitmaps" in done.err and "coarse" in done.err
    assert imgtool_cli("overlay", "commit", overlay).status == 0
    assert held(image) == base and held(overlay) == top
    assert noted_in(image, "since") == [
        (3 * MIB, 2 * CLUSTER),
        (4 * MIB, CLUSTER),
        (5 * MIB, CLUSTER),
    ]
    done = imgtool_cli("overlay", "commit", overlay, "--remove", "--force", "bitmaps")
    assert done.status == 0 and "leave out its 2 dirty bitmaps" in done.err
    assert not overlay.exists() and held(image) == base


def test_convert_says_what_it_does_not_copy(image, tmp_path, imgtool_cli):
    done = imgtool_cli("convert", image, tmp_path / "new.qcow2")
    assert done.status == 0
    assert "leave out its 1 internal snapshot and 1 dirty bitmap\n" in done.err


def test_rebase_keeps_bitmaps(image, overlay, tmp_path, imgtool_cli):
    before = held(overlay)
    other = tmp_path / "other.qcow2"
    qemu_img("convert", "-O", "qcow2", image, other)
    assert imgtool_cli("overlay", "rebase", overlay, other).status == 0
    assert held(overlay) == before.on("other.qcow2", "qcow2")


def test_encrypted_image_is_not_repaired_and_has_no_record(tmp_path, imgtool_cli):
    path = tmp_path / "disk.qcow2"
    secret = ("--object", "secret,id=s,data=x")  # the old kind, which needs no second of hashing
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, path, "1M")
    done = imgtool_cli("check", "--repair", "all", path)
    assert done.status == 3 and "encrypted" in done.err
    assert nothing_left(tmp_path)
    left(path, operation="repair", format="qcow2", noted={})  # of an imgtool that began it
    done = imgtool_cli("recover", path)
    assert done.status == 0 and not record_path(path).exists(), done.err


def test_repair_that_is_not_enough_leaves_no_record(image, imgtool_cli):
    qemu_img("bitmap", "--remove", image, "since")
    miscount(image)
    leak(image)
    done = imgtool_cli("check", "--repair", "leaks", image)
    assert done.status == 3 and "more is wrong with its tables than lost space" in done.err
    assert tables(image) == {"corruptions": 1, "leaks": 1} and nothing_left(image.parent)
    assert f"imgtool check --repair all {image}" in done.err
    assert imgtool_cli("check", "--repair", "all", image).status == 0 and tables(image) == {}


def test_the_same_of_an_image_that_holds_nothing_else(tmp_path, imgtool_cli):
    path = tmp_path / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    write(path, "write 0 1M")
    miscount(path)
    wrong = tables(path)
    done = imgtool_cli("check", "--repair", "leaks", path)
    assert done.status == 3 and "more is wrong with its tables than lost space" in done.err
    assert tables(path) == wrong != {} and nothing_left(tmp_path)


def test_an_interrupted_repair_does_no_more_than_was_asked_for(image, imgtool_cli):
    qemu_img("bitmap", "--remove", image, "since")
    miscount(image)
    left(image, operation="repair", what="leaks", format="qcow2", noted={})
    wrong = tables(image)
    done = imgtool_cli("recover", image)
    assert done.status == 0 and "could not be finished" in done.err
    assert tables(image) == wrong != {} and nothing_left(image.parent)


def test_where_nothing_can_be_lost_a_repair_is_made_at_once(tmp_path, monkeypatch):
    path = tmp_path / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    write(path, "write 0 1M")
    leak(path)
    monkeypatch.setattr(
        "imgtool.image.change.repairing.rehearse", lambda *_: pytest.fail("no need")
    )
    assert repair_tables(probe(path), "leaks").sound and tables(path) == {}
