"""Hostile partition tables through libparted: an answer, or an error of one line, and in time.

A crash in the sandbox is such an error. The numbers are those of `tests.hostile.mutations`.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from imgtool.engines.parted.parent import asking
from imgtool.engines.parted.parent.sectors import table_sectors
from imgtool.errors import EngineError
from tests.hostile.mutations import mutant
from tests.hostile.seeds import Region, Seed

_SHORT, _LONG = 60, 3000
_SIZE = 32 << 20
_TWO = "mkpart primary 8MiB 12MiB mkpart primary 16MiB 24MiB"
_LABELS = {
    "sun": "mkpart 8MiB 12MiB mkpart 16MiB 24MiB",
    "dvh": _TWO,
    "bsd": "mkpart 8MiB 12MiB mkpart 16MiB 24MiB",
    "atari": _TWO,
    "amiga": "mkpart one 8MiB 12MiB mkpart two 16MiB 24MiB",
    "mac": "mkpart one 8MiB 12MiB mkpart two 16MiB 24MiB",
    "pc98": _TWO,
    "gpt": "mkpart one 8MiB 12MiB mkpart two 16MiB 24MiB",
    "msdos": "mkpart primary 8MiB 12MiB mkpart extended 14MiB 30MiB"
    " mkpart logical 15MiB 18MiB mkpart logical 20MiB 24MiB",
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Seed]:
    made = []
    for label, words in _LABELS.items():
        disk = tmp_path_factory.mktemp(label) / "disk"
        disk.write_bytes(bytes(_SIZE))
        command: list[str | Path] = [
            "parted",
            "-s",
            "-a",
            "none",
            disk,
            "mklabel",
            label,
            *words.split(),
        ]
        subprocess.run(command, check=True, capture_output=True)
        content = disk.read_bytes()
        sectors = {
            at + inner
            for at, data in table_sectors(lambda at, n, c=content: c[at : at + n], _SIZE)  # type: ignore[misc]
            for inner in range(0, len(data), 512)
            if any(data[inner : inner + 512])
        }
        regions = tuple(Region("table", at, 512) for at in sorted(sectors))
        made.append(Seed(label, content, regions))
    return made


def _ask_all(
    seeds: list[Seed], first: int, count: int
) -> tuple[Counter[str], list[str], float, int]:
    """How often each way to end was met, what is wrong, the longest time in seconds, and the
    largest memory in bytes of what this process has started."""
    how: Counter[str] = Counter()
    defects = []
    slowest = 0.0
    for number in range(first, first + count):
        made = mutant(seeds, number)
        content = made.content
        started = time.monotonic()
        try:
            label = asking.ask(lambda at, n, c=content: c[at : at + n], len(content))  # type: ignore[misc]
        except EngineError as error:
            how["failed"] += 1
            if "\n" in str(error) or not str(error).startswith("libparted failed at"):
                defects.append(f"{made}: {error}")
        else:
            how["read" if label.name else "refused"] += 1
        slowest = max(slowest, time.monotonic() - started)
        if slowest > asking.PATIENCE + 5:
            defects.append(f"{made}: {slowest:.1f} s")
            slowest = 0
    return how, defects, slowest, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def _run(seeds: list[Seed], first: int, count: int) -> None:
    print(f"hostile tables {first} to {first + count - 1}; again: IMGTOOL_SEED={first}")
    # Of this process an appliance may have been started, which takes more than any of them may.
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        how, defects, slowest, memory = apart.submit(_ask_all, seeds, first, count).result()
    print(f"{count} tables: {dict(how)}; slowest {slowest:.1f} s; most memory {memory >> 20} MiB")
    assert defects == []
    assert how["read"] and how["refused"]
    assert 0 < memory <= asking.MEMORY


def test_sound_tables_are_read(seeds: list[Seed]) -> None:
    for seed in seeds:
        content = seed.content
        label = asking.ask(lambda at, n, c=content: c[at : at + n], len(content))  # type: ignore[misc]
        assert label.name == seed.name
        assert len(label.rows) >= 2


def test_some_hostile_tables_end_in_an_answer_or_an_error(seeds: list[Seed]) -> None:
    _run(seeds, int(os.environ.get("IMGTOOL_SEED", "0")), _SHORT)


@pytest.mark.long
def test_many_hostile_tables_end_in_an_answer_or_an_error(seeds: list[Seed]) -> None:
    first = os.environ.get("IMGTOOL_SEED")
    start = random.SystemRandom().randrange(10**9) if first is None else int(first)
    _run(seeds, start, int(os.environ.get("IMGTOOL_MUTANTS", _LONG)))


def test_sectors_that_lead_in_circles_are_copied_once(tmp_path: Path) -> None:
    disk = bytearray(_SIZE)
    for sector, to in ((0, 4096), (4096, 0), (4096 + 8, 8)):
        at = sector * 512
        disk[at + 446 : at + 462] = (
            bytes(4) + b"\5" + bytes(3) + to.to_bytes(4, "little") + bytes(4)
        )
        disk[at + 510 : at + 512] = b"\x55\xaa"
    disk[:4], disk[16:20] = b"RDSK", b"\0\0\0\1"
    disk[512:516] = b"PART"
    disk[512 + 16 : 512 + 20] = b"\0\0\0\1"
    given = list(table_sectors(lambda at, n: bytes(disk[at : at + n]), _SIZE))
    assert sum(len(data) for _, data in given) < 4 << 20
