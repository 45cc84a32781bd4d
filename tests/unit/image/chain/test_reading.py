"""Readers of an image and a write that becomes its content keep out of each other's way."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool.errors import ExitStatus, RefusedError
from imgtool.image.chain import reading
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.reading import block_readers, chain_to_read, passes_locks, remove_unread
from imgtool.image.change import transaction
from imgtool.image.change.recovery import recover
from imgtool.image.intent import intent_state
from imgtool.image.intent.intent_log import record_path, worker_on
from imgtool.image.intent.intent_state import unfinished_commit
from imgtool.image.qemu.disk_reader import open_contents
from tests.support.writes import NEW, cut_off, fill, made, write


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return made(tmp_path, "qcow2")


def first(chain) -> bytes:
    with open_contents(chain) as (read, _):
        return read(0, 4096)


def test_no_write_is_kept_while_somebody_reads(image, monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE", 0.2)
    with chain_to_read(image) as chain:
        old = first(chain)
        with pytest.raises(RefusedError, match="another imgtool has been reading it") as caught:
            write([image], ["qcow2"])
        assert caught.value.status is ExitStatus.REFUSED and caught.value.hint
        assert first(chain) == old
    write([image], ["qcow2"])
    with chain_to_read(image) as chain:
        assert first(chain) != old


def test_a_write_waits_for_a_reader_who_is_done_in_a_moment(image):
    reader = chain_to_read(image)
    reader.__enter__()
    threading.Timer(0.3, lambda: reader.__exit__(None, None, None)).start()
    began = time.monotonic()
    write([image], ["qcow2"])
    assert time.monotonic() - began > 0.25


def test_what_is_finished_while_it_is_opened_is_opened_anew(image, monkeypatch):
    """The overlay of an interrupted write is found, and is gone before a lock is on it."""
    assert cut_off([image], ["qcow2"], 6, after=True)
    found = unfinished_commit(image)
    assert found is not None
    asked = []

    def then_finished(path):
        asked.append(path)
        if len(asked) == 1:
            recover(image)
            return found
        return None

    monkeypatch.setattr(reading, "unfinished_commit", then_finished)
    with chain_to_read(image) as chain:
        assert [link.path for link in chain.links] == [image]
    assert not found.exists() and len(asked) >= 3


def test_an_overlay_stays_until_who_found_it_has_opened_it(image):
    assert cut_off([image], ["qcow2"], 6, after=True)
    with chain_to_read(image) as chain:
        overlay = chain.active.path
        assert overlay != image and passes_locks(chain)
        finisher = threading.Thread(target=recover, args=(image,))
        finisher.start()
        time.sleep(0.5)
        assert overlay.exists() and record_path(image).exists()
        new = first(chain)
    finisher.join(20)
    assert not overlay.exists() and not record_path(image).exists()
    with chain_to_read(image) as chain:
        assert [link.path for link in chain.links] == [image]
        assert first(chain) == new


def test_overlay_read_for_long_is_removed_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE", 0.1)
    path = tmp_path / "overlay"
    path.write_bytes(b"x")
    descriptor = os.open(path, os.O_RDONLY)
    lock = struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, reading._BYTE, 1, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
    remove_unread(path)
    os.close(descriptor)
    assert not path.exists()


def test_readers_do_not_keep_a_virtual_machine_from_starting(image):
    with chain_to_read(image):
        fill(image, "qcow2", NEW)  # a QEMU that writes


def test_many_read_at_once(image):
    with chain_to_read(image), chain_to_read(image) as chain:
        assert chain.active.path == image
        assert not passes_locks(chain)


def test_what_cannot_be_opened_is_told_by_who_opens_it(tmp_path):
    with block_readers([tmp_path / "nothing"]):
        pass
    with pytest.raises(Exception, match="no such file"), chain_to_read(tmp_path / "nothing"):
        pass


def test_a_write_of_two_disks_waits_for_the_readers_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE", 0.1)
    disks = [made(tmp_path, "qcow2"), made(tmp_path, "raw")]
    for read in disks:
        with (
            chain_to_read(read, format="raw" if read is disks[1] else None),
            pytest.raises(RefusedError, match="reading it"),
            transaction.transaction(
                [open_chain(disks[0]), open_chain(disks[1], format="raw")],
                notice=lambda line: None,
            ) as writing,
        ):
            writing.commit()
        assert not any(record_path(disk).exists() for disk in disks)


@pytest.fixture
def work_of_another(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process at work on the image, which proves nothing to this user; it ends with its input."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.support.records import left, record_path\n"
        "from imgtool.image.intent.intent_log import open_record\n"
        "image = Path(sys.argv[1])\n"
        "left(image, operation='commit', overlay='x')\n"
        "with open_record(image, create=True) as record:\n"
        "    print(flush=True); sys.stdin.readline(); record.remove()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "IMGTOOL_STATE_DIR": str(image.parent / "theirs")},
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        yield other


def test_a_reader_waits_for_the_work_of_another_user(image, work_of_another):
    """Whose record proves nothing to him; it is not taken for one that was left."""
    threading.Timer(0.3, work_of_another.stdin.close).start()
    with chain_to_read(image) as chain:
        assert chain.active.path == image
    assert not record_path(image).exists()


def end_before(lookup, work):
    """A lookup of who is at work that is made only once that work has ended."""

    def looked_up(path):
        work.stdin.close()
        work.wait(10)
        return lookup(path)

    return looked_up


def test_work_that_ends_after_its_record_was_read_was_not_left(image, work_of_another, monkeypatch):
    monkeypatch.setattr(reading, "worker_on", end_before(worker_on, work_of_another))
    with chain_to_read(image) as chain:
        assert chain.active.path == image


def test_work_that_ends_after_the_look_is_not_warned_of(image, work_of_another, monkeypatch):
    lookup = end_before(worker_on, work_of_another)
    monkeypatch.setattr(intent_state, "worker_on", lookup)
    assert intent_state.line_on(image) is None
