"""A repair of an image that holds more than content, killed at any moment: nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from imgtool.image.intent.intent_log import record_path
from tests.support.chain_work import imgtool, start
from tests.support.holding import contents, held, leak, miscount, nothing_left, tables, with_both


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.long)])
def test_a_repair_that_is_killed_loses_nothing(tmp_path: Path, kills: int) -> None:
    damaged = with_both(tmp_path / "damaged.qcow2")
    expected, before = contents(damaged), held(damaged)
    leak(damaged)
    miscount(damaged)
    image = tmp_path / "disk.qcow2"
    came_in_time = 0
    for number in range(kills):
        shutil.copy2(damaged, image)
        process = start("check", "--repair", "all", image)
        while not record_path(image).exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(number * 0.5 / kills)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        until = time.monotonic() + 60
        while _lives(process.pid):  # its QEMU dies with it, or a moment later
            assert time.monotonic() < until
            time.sleep(0.002)
        came_in_time += record_path(image).exists()
        status, said = imgtool("recover", image)
        assert status == 0, said
        assert nothing_left(tmp_path)
        status, said = imgtool("check", "--repair", "all", image)
        assert status == 0, said
        after = held(image)
        assert after.snapshots == before.snapshots and contents(image) == expected
        assert [bitmap.name for bitmap in after.bitmaps or ()] == [b"since"]
        assert tables(image) == {}
        image.unlink()
    assert came_in_time >= kills // 4
