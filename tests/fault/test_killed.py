"""Whole runs of copy-in, edit and inject that are killed, or lose their QEMU, at any moment.

Every file of the guest is old or every file is new, at once for a reader, and after `recover`; the
image and its filesystem are sound, and nothing is left behind.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fault.runs import (
    KINDS,
    RUNS,
    imgtool,
    kill_qemu,
    make,
    manifest,
    prepare,
    processes_of,
    sound,
    start,
    step,
)
from tests.support.chain_work import left_over

pytestmark = pytest.mark.appliance

_GONE_WITHIN = 15.0  # seconds: libguestfs looks every two whether its process is still there


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared") / "disk")


class Trials:
    """One command on one kind of image: the guest before and after, and how long it takes."""

    def __init__(self, name: str, kind: str, disk: Path, folder: Path) -> None:
        self.run, self.kind, self.disk, self.folder = RUNS[name], kind, disk, folder
        image = make(disk, kind, folder / "whole")
        self.old = manifest(image)
        began = time.monotonic()
        done = imgtool(*self.words(image))
        assert done.returncode == 0, done.stderr
        self.seconds = time.monotonic() - began
        self.new = manifest(image)
        assert self.new != self.old
        self.landed: Counter[str] = Counter()
        shutil.rmtree(image.parent)

    def words(self, image: Path) -> tuple[str | Path, ...]:
        return self.run.words(image, self.disk.parent)

    def trial(self, number: int, victim: str, chosen: random.Random) -> None:
        image = make(self.disk, self.kind, self.folder / f"{number}")
        base = image.with_name("base.qcow2")
        before = _bytes(base)
        process = start(self.words(image))
        if chosen.random() < 0.3:  # the shortest step, and the one that matters most
            while step(process, image) in ("start", "appliance"):
                time.sleep(0.002)
            time.sleep(chosen.random() * 0.04)  # it takes about as long
        else:
            moment = chosen.random()
            if victim == "qemu" and moment < 0.4 and chosen.random() < 0.8:
                moment += 0.4  # one that does not come up is started again, which takes long
            time.sleep(moment * self.seconds)
        where = step(process, image)
        if victim == "imgtool":
            process.kill()
        elif not kill_qemu(process):
            where = "ended"
        said = process.communicate()[1]
        self.landed[where] += 1
        whose = f"{victim} killed at {where}, status {process.returncode}, said: {said}"

        seen = manifest(image)  # by whoever reads it now
        assert seen in (self.old, self.new), f"the guest is neither old nor new: {whose}"
        if process.returncode == 0:
            assert seen == self.new, whose
        self._recovered(image, whose)
        assert manifest(image) == seen, whose
        sound(image, self.kind, self.folder)
        assert _bytes(base) == before
        assert processes_of(image.parent) == []
        shutil.rmtree(image.parent)

    def _recovered(self, image: Path, whose: str) -> None:
        """The next command leaves nothing behind, once the appliance of the dead one is gone."""
        until = time.monotonic() + _GONE_WITHIN
        while True:
            done = imgtool("recover", image)
            if done.returncode == 0 and not processes_of(image.parent):
                break
            assert done.returncode in (0, 4), f"{done.stderr} after: {whose}"
            assert time.monotonic() < until, f"{done.stderr} after: {whose}"
            time.sleep(0.1)
        assert left_over(image.parent) == [], whose


def _bytes(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _killed(trials: Trials, times: int, workers: int) -> None:
    seed = random.randrange(1 << 32)

    def one(number: int) -> None:
        victim = ("imgtool", "qemu")[number % 2]
        try:
            trials.trial(number, victim, random.Random(seed + number))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, trial {number}: {error}") from error

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(times)))
    where = ", ".join(f"{step}: {count}" for step, count in trials.landed.most_common())
    print(f"{trials.run.name} on {trials.kind}, {times} kills in {trials.seconds:.1f} s: {where}")


# Each command and each kind of image once; the long form has all of them with all.
@pytest.mark.parametrize(("name", "kind"), [*zip(RUNS, KINDS, strict=True)])
def test_what_is_killed_is_all_old_or_all_new(name, kind, disk, tmp_path):
    _killed(Trials(name, kind, disk, tmp_path), 4, 2)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_what_is_killed_300_times_is_all_old_or_all_new(name, kind, disk, tmp_path):
    trials = Trials(name, kind, disk, tmp_path)
    _killed(trials, 34, 2)
    assert trials.landed["commit"] >= 2, trials.landed
    assert trials.landed["appliance"] >= 8, trials.landed
