"""Writing that happens whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import time

import pytest

from imgtool.errors import RefusedError
from imgtool.host import interrupt
from imgtool.image.chain.chain import open_chain
from imgtool.image.change import transaction
from imgtool.image.change.recovery import recover
from imgtool.image.intent.intent_log import record_path
from tests.support.writes import (
    NEW,
    cut_off,
    fill,
    format_of,
    in_child,
    left_over,
    made,
    pattern,
    qemu_img,
    write,
)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])
def test_what_is_written_is_there_and_the_file_is_the_same_file(tmp_path, kind):
    image = made(tmp_path, kind)
    image.chmod(0o640)
    os.setxattr(image, "user.note", b"kept")
    before = image.stat()
    write([image], [kind])
    after = image.stat()
    assert pattern(image, format_of(kind), NEW)
    assert (after.st_ino, after.st_mode, after.st_uid) == (
        before.st_ino,
        before.st_mode,
        before.st_uid,
    )
    assert os.getxattr(image, "user.note") == b"kept"
    assert left_over(tmp_path) == []


def test_a_raw_image_stays_sparse(tmp_path):
    image = tmp_path / "sparse.raw"
    qemu_img("create", "-f", "raw", image, "1G")
    write([image], ["raw"])
    assert image.stat().st_blocks * 512 < 2 << 20


def test_an_error_before_the_commit_leaves_the_image_as_it_was(tmp_path):
    image = made(tmp_path, "qcow2")
    content, changed = image.read_bytes(), image.stat().st_mtime_ns
    with (
        pytest.raises(ZeroDivisionError),
        transaction.transaction([open_chain(image)], notice=lambda line: None) as writing,
    ):
        fill(writing.chains[0].active.path, "qcow2", NEW)
        raise ZeroDivisionError
    assert (image.read_bytes(), image.stat().st_mtime_ns) == (content, changed)
    assert left_over(tmp_path) == []


def test_the_overlay_is_for_its_owner_alone(tmp_path):
    image = made(tmp_path, "qcow2")
    with transaction.transaction([open_chain(image)], notice=lambda line: None) as writing:
        path = writing.chains[0].active.path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_writers_at_once_are_one_and_a_refusal(tmp_path):
    image = made(tmp_path, "qcow2")

    def second() -> None:
        with pytest.raises(RefusedError, match="another imgtool is at work"):
            write([image], ["qcow2"])

    with transaction.transaction([open_chain(image)], notice=lambda line: None):
        assert in_child(second) == 0


def test_a_writer_after_one_that_was_killed_begins_anew(tmp_path):
    image = made(tmp_path, "qcow2")
    assert cut_off([image], ["qcow2"], 4, after=True)
    assert left_over(tmp_path)
    with pytest.raises(RefusedError, match="interrupted"):
        write([image], ["qcow2"])
    recover(image)
    write([image], ["qcow2"])
    assert pattern(image, "qcow2", NEW)


def test_a_base_is_not_written(tmp_path):
    made(tmp_path, "chain")
    base = tmp_path / "chain-base.qcow2"
    with pytest.raises(RefusedError, match="base of an overlay"):
        write([base], ["qcow2"])


def test_a_record_names_the_image_and_nothing_else(tmp_path):
    image = made(tmp_path, "qcow2")
    link = tmp_path / "link.qcow2"
    link.symlink_to(image)
    assert record_path(link) == record_path(image)


def test_base_that_a_named_folder_allows_can_be_committed_to(tmp_path):
    base = made(tmp_path, "qcow2")
    folder = tmp_path / "work"
    folder.mkdir()
    image = folder / "overlay.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", base, image)
    chain = open_chain(image, backing_dirs=[tmp_path])
    with transaction.transaction(
        [chain], backing_dirs=[tmp_path], notice=lambda line: None
    ) as writing:
        fill(writing.chains[0].active.path, "qcow2", NEW)
        writing.commit()
    assert pattern(image, "qcow2", NEW)
    assert left_over(folder) == []


def test_interrupt_in_the_commit_comes_too_late_and_is_told(tmp_path, monkeypatch):
    """All of it is in the image: the command is done, with status 0."""
    image = made(tmp_path, "qcow2")
    said: list[str] = []
    really = transaction.Transaction._finish

    def finish(self):
        os.kill(os.getpid(), signal.SIGINT)
        while not interrupt.pending():
            time.sleep(0.001)
        really(self)

    monkeypatch.setattr(transaction.Transaction, "_finish", finish)
    try:
        with (
            interrupt.watch(),
            transaction.transaction([open_chain(image)], notice=said.append) as writing,
        ):
            fill(writing.chains[0].active.path, "qcow2", NEW)
            writing.commit()
    finally:
        interrupt._seen.clear()
    assert pattern(image, "qcow2", NEW) and left_over(tmp_path) == []
    assert said == [
        "the write is being finished, so that nothing is left half done",
        "done: all of it is in the image",
    ]


def test_an_interrupt_of_a_commit_that_fails_is_an_interrupt(tmp_path):
    with interrupt.watch(), pytest.raises(KeyboardInterrupt), interrupt.defer_interrupts(last=True):
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError
    interrupt._seen.clear()
