"""Each kind of qcow2 under each command: done, with all that it holds kept, or as it was; which of
the two, and the exit status, says `outcomes.py`.

The default run has a sixth of the cells; `pytest -m long tests/matrix` has all.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imgtool.image.intent.intent_log import is_ours
from tests.matrix.features import FEATURES, make
from tests.matrix.operations import OPERATIONS, Cell
from tests.matrix.outcomes import outcome
from tests.matrix.state import files_of, state_of

_CELLS = [(feature, operation) for operation in OPERATIONS for feature in FEATURES]
# Cells that the default run tries besides.
_ALWAYS = [
    ("plain", "write"),
    ("plain", "resize"),
    ("plain", "compact"),
    ("plain", "commit-into"),
    ("plain", "commit-removing"),
    ("snapshots", "revert"),
    ("snapshots", "revert-saving"),
    ("snapshots", "snapshot-create"),
    ("snapshots", "snapshot-delete"),
    ("snapshots", "write"),
    ("snapshots", "repair-all"),
    ("memory", "snapshot-delete"),
    ("dirty", "repair-all"),
    ("encrypted", "write"),
    ("encrypted-aes", "write"),
    ("overlay", "flatten"),
    ("overlay", "rebase"),
    ("overlay", "write"),
    ("bitmaps", "write"),
    ("bitmaps-snapshots", "write"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    """One image of each kind, made when it is first asked for, to be copied."""
    folder = tmp_path_factory.mktemp("kinds")
    made: dict[str, Path] = {}

    def copy(feature: str, new: Path) -> Path:
        if feature not in made:
            made[feature] = make(feature, folder / feature)
        subprocess.run(["cp", "-a", made[feature].parent, new], check=True)
        _name_files_of_the_copy(feature, made[feature].parent, new)
        return new / "disk.qcow2"

    return copy


def _name_files_of_the_copy(feature: str, old: Path, new: Path) -> None:
    """Absolute names lead to the copy, not to the pattern."""
    image = new / "disk.qcow2"
    if not (feature.startswith("data-file") or feature == "overlay-absolute"):
        return
    attributes, mode = os.listxattr(image), image.stat()
    shutil.rmtree(new)
    made = make(feature, new)
    assert (os.listxattr(made), made.stat().st_mode) == (attributes, mode.st_mode)


def _imgtool(*words: str | Path) -> int:
    done = subprocess.run([sys.executable, "-m", "imgtool", *words], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or done.stderr or done.stdout, "it failed without a word"
    print(*words, done.returncode, done.stderr)
    return done.returncode


def _try(images, feature: str, name: str, folder: Path) -> None:
    operation, secret = OPERATIONS[name], FEATURES[feature].secret
    image = images(feature, folder / "cell")
    operation.prepare(image, secret)
    before, files = state_of(image, secret=secret), files_of(image.parent)
    cell = Cell(image, before, secret, _imgtool)
    status = operation.do(cell)
    assert status == outcome(feature, name)
    assert [path.name for path in image.parent.iterdir() if is_ours(path.name)] == []
    if status:
        assert files_of(image.parent) == files
        return
    now = state_of(image, secret=secret)
    wanted = operation.wanted(cell, now)
    # Space that is lost, and a flag that says that there may be some, may go.
    kept = dict(wanted.kind)["dirty"] and dict(now.kind)["dirty"]
    wanted, now = (
        dataclasses.replace(
            each, kind=tuple(row for row in each.kind if row[0] != "dirty"), faults=()
        )
        for each in (wanted, now)
    )
    assert now == wanted
    assert not state_of(image, secret=secret).faults or kept or before.faults


@pytest.mark.parametrize(("feature", "operation"), _CELLS[::6])
def test_some_cells(images, feature, operation, tmp_path):
    _try(images, feature, operation, tmp_path)


@pytest.mark.parametrize(("feature", "operation"), _ALWAYS)
def test_what_matters_most(images, feature, operation, tmp_path):
    _try(images, feature, operation, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("feature", "operation"), _CELLS)
def test_every_cell(images, feature, operation, tmp_path):
    """Some minutes."""
    _try(images, feature, operation, tmp_path)
