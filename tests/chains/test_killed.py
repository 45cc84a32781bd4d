"""Work that is killed, or interrupted, at any moment: the old state is there or the new one.

Whatever is left is settled by `imgtool recover` or by the same command again, after which nothing
of it can be seen.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from imgtool.image.intent.intent_log import read_facts, record_path
from tests.support.chain_work import (
    SCENES,
    Scene,
    backing,
    bitmaps,
    checked,
    children_of,
    imgtool,
    left_over,
    snapshots,
    start,
)

_LONGEST = 60.0  # seconds, for anything


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@functools.cache
def trials_of(name: str, folder: Path) -> Trials:
    """The images of a scene are made, and the work is timed, once."""
    return Trials(name, folder)


class Trials:
    """One scene: its images, what they hold before and after, and how long the work takes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.scene: Scene = SCENES[name]
        folder.mkdir(exist_ok=True)
        self.template = folder / f"{name}-template"
        self.template.mkdir()
        self.scene.make(self.template)
        self.folder = folder / name
        self.old = self.scene.contents(self.template)
        before = {name: snapshots(self.template / name) for name in self.scene.images}
        self.seconds = _LONGEST
        for _ in range(2):  # the shortest, so that kills come before the end
            self.scene.copy(self.template, self.folder)
            process = start(*self.scene.command(self.folder))
            self._wait_for_work(process)
            began = time.monotonic()
            assert process.communicate()[0] == b""
            self.seconds = min(self.seconds, time.monotonic() - began)
            assert process.returncode == 0
        self.new = self.scene.contents(self.folder)
        self.seen = self.state()
        self.seen_bitmaps = self.bitmaps()
        self.must_stay = {
            name: [what for what in before[name] if what in snapshots(self.folder / name)]
            for name in self.scene.images
        }
        self.landed: Counter[str] = Counter()

    def _wait_for_work(self, process: subprocess.Popen[bytes]) -> None:
        """Until its record says what is done: it is locked before, while that is tried out."""
        self._wait(process, lambda record: record.exists() and record.stat().st_size > 0)

    def _wait(self, process: subprocess.Popen[bytes], seen: Callable[[Path], bool]) -> None:
        record = record_path(self.folder / self.scene.image)
        until = time.monotonic() + _LONGEST
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError):  # removed between two looks
                if seen(record):
                    break
            time.sleep(0.001)

    def state(self) -> tuple[object, ...]:
        """What the finished work looks like besides the contents."""
        images = [self.folder / name for name in self.scene.images]
        return tuple((backing(image), snapshots(image), checked(image)) for image in images)

    def bitmaps(self) -> list[list[str]]:
        return [bitmaps(self.folder / name) for name in self.scene.images]

    def cut_off(self, moment: float, number: int) -> int:
        """Do the work on a new copy and send the signal, `moment` of the way; the exit status."""

        def wait(process: subprocess.Popen[bytes]) -> None:
            self._wait_for_work(process)
            time.sleep(moment * self.seconds)
            self.landed[self._step(process)] += 1

        return self._cut_off(wait, number)

    def cut_off_before(self, number: int) -> int:
        """The same, as soon as the image is locked; the exit status."""
        return self._cut_off(lambda process: self._wait(process, Path.exists), number)

    def _cut_off(self, wait: Callable[[subprocess.Popen[bytes]], None], number: int) -> int:
        self.scene.copy(self.template, self.folder)
        process = start(*self.scene.command(self.folder))
        try:
            wait(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, number)
        self.said = process.communicate(timeout=_LONGEST)[1].decode()
        until = time.monotonic() + _LONGEST
        while _lives(process.pid):  # its qemu-img dies with it, or a moment later
            assert time.monotonic() < until
            time.sleep(0.002)
        return process.returncode

    def _step(self, process: subprocess.Popen[bytes]) -> str:
        facts = read_facts(self.folder / self.scene.image)
        if not facts:
            return "before" if process.poll() is None else "after"
        child = [words for words in children_of(process.pid) if len(words) > 1]
        doing = f"qemu-img {child[0][1]}" if child else "imgtool itself"
        step = facts.get("step") or ("swap" if "inode" in facts else None)
        return f"{doing} ({step})" if step else doing

    def settled(self) -> None:
        """Old or new now, and new after the same command again; nothing is left behind."""
        self.spoilt = False
        now = self.scene.contents(self.folder)
        for name, checksum in now.items():
            assert checksum in (self.old[name], self.new[name]), f"{name} is neither old nor new"
        for name in self.scene.images:
            kept = set(self.must_stay[name])
            assert kept <= set(snapshots(self.folder / name)), f"{name} has lost what it held"
            if not left_over(self.folder):  # QEMU may have been at work on each of them
                wrong = checked(self.folder / name)
                assert not wrong, f"{name}: {wrong} after: {self.said}"
        if left_over(self.folder):
            status, said = imgtool("recover", self.folder / self.scene.image)
            assert status == 0, said
            self.spoilt = "has to begin anew" in said
            assert left_over(self.folder) == []
            now = self.scene.contents(self.folder)
            assert now in (self.old, self.new)
        if now != self.new or self.state() != self.seen:
            status, said = imgtool(*self.scene.command(self.folder))
            assert status == 0, said
            assert self.scene.contents(self.folder) == self.new
            assert self.state() == self.seen
            assert left_over(self.folder) == []
        # A QEMU that is killed while it writes a bitmap down leaves none that holds.
        if not self.spoilt:
            assert self.bitmaps() == self.seen_bitmaps


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _killed(name: str, folder: Path, times: int) -> None:
    trials = trials_of(name, folder)
    trials.landed.clear()
    trials.cut_off_before(signal.SIGKILL)
    trials.settled()
    seed = random.randrange(1 << 32)
    chosen = random.Random(seed)
    for number in range(times):
        # Spread over the whole of it, so that a few kills already come in different steps.
        moment = (number + chosen.random()) / times
        trials.cut_off(moment, signal.SIGKILL)
        try:
            trials.settled()
        except AssertionError as error:
            raise AssertionError(f"{name}, seed {seed}, moment {moment:.3f}: {error}") from error
    where = ", ".join(f"{step}: {count}" for step, count in trials.landed.most_common())
    print(f"{name}, {times} kills in {trials.seconds:.2f} s of work: {where}")
    inside = times - trials.landed["before"] - trials.landed["after"]
    assert inside >= times // 3, f"too few kills came while it was at work: {where}"


@pytest.mark.parametrize("name", SCENES)
def test_what_is_killed_is_as_before_or_as_after(name: str, folder: Path) -> None:
    _killed(name, folder, 3)


@pytest.mark.long
@pytest.mark.parametrize("name", SCENES)
def test_what_is_killed_200_times_is_as_before_or_as_after(name: str, tmp_path: Path) -> None:
    _killed(name, tmp_path, 200 // (len(SCENES) - 1))


@pytest.mark.parametrize("name", ["commit", "flatten", "revert"])
def test_ctrl_c_is_status_130_and_leaves_nothing_half_done(name: str, folder: Path) -> None:
    trials = trials_of(name, folder)
    for moment in (0.1, 0.5):
        status = trials.cut_off(moment, signal.SIGINT)
        # Once the work is done Python ends the way it likes.
        assert status == 130 or trials.scene.contents(trials.folder) == trials.new, trials.said
        if name != "commit":  # which is read through the overlay until it is finished
            assert left_over(trials.folder) == [], trials.said
        trials.settled()
