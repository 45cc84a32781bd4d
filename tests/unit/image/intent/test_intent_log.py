"""The record of work on an image: believed only where it may be, and never half of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgtool.errors import HostError, ImageError, RefusedError
from imgtool.image.change.made import made_file
from imgtool.image.change.plan import keep_attributes
from imgtool.image.change.recovery import recover
from imgtool.image.intent.intent_log import (
    is_temporary_of,
    open_record,
    read_facts,
    record_path,
    temporary_path,
)
from imgtool.image.intent.intent_state import unfinished_commit
from imgtool.image.intent.marks import identity_of
from tests.support.records import left, new_record


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 16))
    return path


def test_record_is_one_for_all_names_and_goes_when_empty(image):
    link = image.with_name("link")
    link.symlink_to(image.name)
    with new_record(link) as record:
        assert record_path(link) == record_path(image)
        record.note(operation="compact", temporary="x")
        assert read_facts(image) == {"operation": "compact", "temporary": "x"}
        record.remove()
    with open_record(image, create=True):
        assert record_path(image).exists()
    assert not record_path(image).exists()


def test_two_at_once_are_one_and_a_refusal(image):
    with open_record(image, create=True):
        with (
            pytest.raises(RefusedError, match="another imgtool is at work"),
            open_record(image, create=True),
        ):
            pass
        assert record_path(image).exists()


def test_a_record_that_is_done_with_takes_no_other_away(image):
    with new_record(image) as first:
        first.remove()
        with new_record(image) as second:
            second.note(operation="resize")
            first.remove()
            assert read_facts(image) == {"operation": "resize"}
    assert record_path(image).exists()


@pytest.mark.parametrize(
    "torn", [b'{"operation": "comm', b"\0\0\0", b"[1]\n", b"[" * 90000 + b"\n"]
)
def test_a_torn_line_says_nothing_and_does_not_swallow_the_next(image, torn):
    record_path(image).write_bytes(torn)
    assert read_facts(image) == {}
    with new_record(image) as record:
        assert record.facts == {}
        record.note(operation="resize")
        assert read_facts(image) == {"operation": "resize"}


def test_what_was_written_whole_before_a_torn_line_counts(image):
    record_path(image).write_bytes(b'{"operation": "revert"}\n{"step": "app')
    with open_record(image, create=False) as record:
        assert record is not None
        assert record.facts == {"operation": "revert"}


def test_there_is_no_room_for_a_record(image, monkeypatch):
    with new_record(image) as record:
        record.note(operation="revert")
        really = os.write
        monkeypatch.setattr(os, "write", lambda to, what: really(to, what[:5]))
        with pytest.raises(HostError, match="no space left") as caught:
            record.note(step="apply")
        monkeypatch.undo()
        assert "make room" in str(caught.value.hint)
        assert read_facts(image) == {"operation": "revert"}
        assert len(record_path(image).read_text().splitlines()) == 1


@pytest.mark.parametrize("kind", ["fifo", "link", "hard link", "directory"])
def test_what_is_no_record_of_ours_is_not_opened(image, kind, tmp_path):
    path, other = record_path(image), tmp_path / "other"
    other.write_text("precious\n")
    {
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(other),
        "hard link": lambda: path.hardlink_to(other),
        "directory": path.mkdir,
    }[kind]()
    assert read_facts(image) == {}
    with pytest.raises((HostError, RefusedError)), open_record(image, create=True):
        pass
    assert other.read_text() == "precious\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
def test_the_record_of_another_user_is_not_believed(image):
    path = left(image, operation="compact", temporary=".disk.raw.imgtool-1")
    os.chown(path, 12345, 12345)
    assert read_facts(image) == {}
    with pytest.raises(RefusedError, match="not written by its owner"):
        recover(image)
    os.chown(image, 12345, 12345)  # who may do to it what he likes
    assert read_facts(image)["operation"] == "compact"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_other_user_reads_the_record_and_who_can_settle_it(image):
    left(image, operation="resize")
    for folder in image.parents:
        if "pytest" in str(folder):
            folder.chmod(0o755)
    os.seteuid(12345)
    try:
        assert read_facts(image)["operation"] == "resize"
        with pytest.raises(RefusedError, match="another user") as caught:
            recover(image)
        assert "root" in str(caught.value.hint)
    finally:
        os.seteuid(0)


def test_others_can_read_a_record_whatever_the_umask(image):
    before = os.umask(0o077)
    try:
        with open_record(image, create=True):
            assert record_path(image).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "temporary",
    ["/etc/passwd", "precious", "../precious", ".disk.raw.imgtool-record", ".other.imgtool-1", ""],
)
def test_a_record_cannot_have_any_other_file_removed(image, tmp_path, temporary):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    record = left(image, operation="compact", temporary=temporary)
    with pytest.raises(RefusedError) as caught:
        recover(image)
    assert str(record) in str(caught.value.hint)
    assert precious.read_text() == "kept" and record.exists()


@pytest.mark.parametrize(
    "facts",
    [
        {"operation": "compact"},
        {"operation": "compact", "temporary": 5},
        {"operation": "compact", "temporary": ["x"]},
        {"operation": "revert", "noted": {}},
        {"operation": "commit"},
        {"operation": "commit", "overlay": 5},
        {"operation": "commit", "overlay": "gone.qcow2", "noted": {}},
        {"operation": "write", "step": "ready"},
        {"operation": "write", "step": "commit", "images": 5, "overlay": "/nowhere"},
        {"operation": "flee"},
        {"operation": ["x"]},
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_refused_in_words(image, facts):
    left(image, **facts)
    content = image.read_bytes()
    with pytest.raises((RefusedError, ImageError)):
        recover(image)
    assert image.read_bytes() == content


def test_commit_names_only_an_overlay_on_the_image(image, tmp_path):
    (tmp_path / "secret.raw").write_bytes(b"secret" * 1000)
    left(image, operation="commit", overlay="secret.raw", remove=True, noted={})
    with pytest.raises(ImageError, match="not there any more, or no longer stands"):
        unfinished_commit(image)
    with pytest.raises(RefusedError):
        recover(image)
    left(image, operation="commit", overlay="secret.raw", remove=True, step="proved")
    assert unfinished_commit(image) is None
    recover(image)
    assert (tmp_path / "secret.raw").exists()


def test_lost_image_leaves_its_copy_named_and_kept(image):
    made = temporary_path(image)
    made.write_bytes(b"the only copy")
    left(image, operation="compact", temporary=str(made), made=identity_of(made))
    image.unlink()
    with pytest.raises(ImageError, match="not there any more") as caught:
        recover(image)
    assert str(made) in str(caught.value.hint) and made.exists()


def test_a_folder_that_was_moved_is_settled_where_it_is_now(image, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    moved = image.rename(old / image.name)
    made = temporary_path(moved)
    made.write_bytes(b"half")
    left(moved, operation="compact", temporary=str(made), made=identity_of(made))
    old.rename(tmp_path / "new")
    moved = tmp_path / "new" / image.name
    assert "undone" in str(recover(moved))
    assert [path.name for path in moved.parent.iterdir()] == [moved.name]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "new\nline", "-x", "a:b", "\udcff"])
def test_any_name_of_an_image_has_a_record(tmp_path, name):
    image = tmp_path / name
    image.write_bytes(b"x")
    with new_record(image) as record:
        record.note(operation="resize", name=name)
        assert read_facts(image)["name"] == name
        assert is_temporary_of(image, temporary_path(image).name)
        temporary_path(image).touch()
    assert not is_temporary_of(image, record_path(image).name)


def test_no_image_and_no_record_is_nothing_to_recover(tmp_path):
    assert recover(tmp_path / "nothing") is None
    assert recover(tmp_path / "nowhere" / "nothing") is None


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_attributes_go_to_no_file_put_in_the_new_ones_place(tmp_path, kind):
    """The owner of the folder exchanges it while root works on his image."""
    image, temporary, precious = (tmp_path / name for name in ("image", "temporary", "precious"))
    image.touch(mode=0o666)
    precious.touch()
    precious.chmod(0o600)
    if kind == "symlink":
        temporary.symlink_to(precious)
    else:
        temporary.hardlink_to(precious)
    before = precious.stat()
    with (
        image.open() as old,
        pytest.raises(RefusedError, match="in the place"),
        made_file(temporary) as new,
    ):
        keep_attributes(old.fileno(), new)
    after = precious.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
