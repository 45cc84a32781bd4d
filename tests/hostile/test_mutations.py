"""Hostile images: whatever is changed in one, reading it ends, and with an answer or an error.

The long form makes more of them: `pytest -m long tests/hostile`. A run begins at a number, which it
prints; IMGTOOL_SEED=NUMBER begins there again, and IMGTOOL_MUTANTS=COUNT says how many to make.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hostile.mutations import mutant
from tests.hostile.reading import Outcome, differences, is_sound, read
from tests.hostile.seeds import Seed, make_seeds

_SHORT, _LONG = 60, 1050
_PROGRAMS = (
    "mke2fs",
    "mkfs.xfs",
    "mkfs.vfat",
    "mcopy",
    "mkfs.exfat",
    "mkntfs",
    "ntfscp",
    "genisoimage",
)
# The kernel's own mount is the reference for what was read as if it were sound.
_CAN_MOUNT = os.geteuid() == 0 and Path("/dev/loop-control").exists()
_SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Seed]:
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    assert not missing, f"the test suite needs {', '.join(missing)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", _SEARCH)
        return make_seeds(tmp_path_factory.mktemp("sound"))


def _run(seeds: Sequence[Seed], first: int, count: int, scratch: Path) -> list[Outcome]:
    """Read so many hostile images; a test fails with the numbers of those that are defects."""
    print(f"hostile images {first} to {first + count - 1}; again: IMGTOOL_SEED={first}")
    outcomes: list[Outcome] = []
    defects: list[str] = []
    slowest = ""
    compared = 0
    for number in range(first, first + count):
        made = mutant(seeds, number)
        folder = scratch / "one"
        outcome = read(made, folder)
        if outcome.seconds > max((each.seconds for each in outcomes), default=0):
            slowest = str(made)
        outcomes.append(outcome._replace(entries=None))
        found = list(outcome.defects)
        image = folder / "image"
        if _CAN_MOUNT and outcome.entries is not None and is_sound(made, image):
            compared += 1
            found += differences(image, outcome.entries)[:3]
        defects += [f"{made}: {line}" for line in found]
        shutil.rmtree(folder)
        if len(outcomes) % 100 == 0:
            print(f"{len(outcomes)} images, {len(defects)} defects", flush=True)
    how = Counter(outcome.how for outcome in outcomes)
    print(
        f"{count} images: {how['read']} read, {how['damaged']} damaged, {how['refused']} refused; "
        f"{compared} compared with the kernel; "
        f"slowest {max(outcome.seconds for outcome in outcomes):.1f} s: {slowest}; "
        f"largest memory {max(outcome.memory for outcome in outcomes) >> 20} MiB"
    )
    assert defects == []
    return outcomes


@pytest.fixture(scope="module")
def sound(
    seeds: Sequence[Seed], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Outcome, list[str] | None]]:
    """What became of each image before it was changed, and how the kernel's answer differs."""
    found: dict[str, tuple[Outcome, list[str] | None]] = {}
    for number, seed in enumerate(seeds):
        folder = tmp_path_factory.mktemp("one") / seed.name
        # An odd number, so that a layout is given where one is needed.
        made = mutant(seeds, number)._replace(seed=seed, number=15, content=seed.content)
        outcome = read(made, folder)
        differing = None
        if _CAN_MOUNT and outcome.entries is not None and is_sound(made, folder / "image"):
            differing = differences(folder / "image", outcome.entries)
        found[seed.name] = outcome, differing
        shutil.rmtree(folder)
    return found


def test_every_sound_image_is_read(sound: dict[str, tuple[Outcome, list[str] | None]]) -> None:
    """Otherwise nothing is learnt from what becomes of the others."""
    unread = {
        name: (outcome.how, outcome.reason, outcome.defects)
        for name, (outcome, _) in sound.items()
        if outcome.how != "read" or not outcome.entries or outcome.defects
    }
    assert unread == {}


@pytest.mark.skipif(
    not _CAN_MOUNT, reason="needs root and loop devices: the kernel's own mount is the reference"
)
def test_sound_images_are_read_as_the_kernel_shows_them(
    seeds: Sequence[Seed], sound: dict[str, tuple[Outcome, list[str] | None]]
) -> None:
    wrong = {seed.name: sound[seed.name][1] for seed in seeds if seed.filesystem is not None}
    assert wrong == {"ext4": [], "ext4-4k": [], "ext3": [], "ext2": [], "xfs": []}


def test_some_hostile_images_end_in_an_answer_or_an_error(
    seeds: Sequence[Seed], tmp_path: Path
) -> None:
    outcomes = _run(seeds, int(os.environ.get("IMGTOOL_SEED", "0")), _SHORT, tmp_path)
    assert any(outcome.how == "read" for outcome in outcomes)
    assert any(outcome.how == "refused" for outcome in outcomes)


@pytest.mark.long
def test_many_hostile_images_end_in_an_answer_or_an_error(
    seeds: Sequence[Seed], tmp_path: Path
) -> None:
    first = os.environ.get("IMGTOOL_SEED")
    start = random.SystemRandom().randrange(10**9) if first is None else int(first)
    _run(seeds, start, int(os.environ.get("IMGTOOL_MUTANTS", _LONG)), tmp_path)
