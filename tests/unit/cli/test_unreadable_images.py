"""An image that this user may not read: an error of its own, and no end of the others."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer

from imgtool.cli import _open_no_file
from imgtool.cli.command_table import app_with
from tests.support.chain_images import qcow2, raw

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to make a file that another user may not read"
)
_ROOT = str(Path(__file__).parents[3])


def imgtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """As a user who may read little."""
    return subprocess.run(
        [sys.executable, "-m", "imgtool", *words],
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        env={**os.environ, "PYTHONPATH": _ROOT, "HOME": "/nonexistent"},
    )


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """One image that may be read, one that may not, and an overlay on that one."""
    top = Path(tempfile.gettempdir())  # below it are pytest's own, one more with xdist
    for folder in (tmp_path, *itertools.takewhile(lambda above: above != top, tmp_path.parents)):
        folder.chmod(0o755)
    made = {"open": raw(tmp_path / "open.img", 2 << 20), "shut": raw(tmp_path / "shut.img")}
    subprocess.run(["mke2fs", "-q", "-F", made["open"]], check=True, capture_output=True)
    made["overlay"] = qcow2(tmp_path / "overlay.qcow2", "shut.img", "raw")
    made["shut"].chmod(0)
    return made


def test_of_several_images_the_others_are_shown(images):
    done = imgtool("df", "-o", "json", images["shut"], images["open"])
    rows = json.loads(done.stdout)
    assert done.returncode == 6
    assert [(row["image"], bool(row["error"]), row["type"]) for row in rows] == [
        (str(images["shut"]), True, None),
        (str(images["open"]), False, "ext2"),
    ]
    assert "permission denied" in rows[0]["error"]


@pytest.mark.parametrize(
    "words",
    [
        ("info",),
        ("filesystems",),
        ("partitions",),
        ("chain", "show"),
        ("check",),
        ("inspect",),
        ("resize", "+1M"),
        ("compact",),
        ("snapshot", "list"),
        ("ls", "/"),
        ("cat", "/file"),
    ],
)
def test_permission_is_what_is_missing(images, words):
    command = 2 if words[0] in ("chain", "snapshot") else 1
    done = imgtool(*words[:command], images["shut"], *words[command:])
    assert (done.returncode, done.stdout) == (6, "")
    assert "permission denied" in done.stderr
    assert "hint: run imgtool as a user who may read it" in done.stderr


def test_permission_is_missing_for_a_base_too(images):
    done = imgtool("info", images["overlay"])
    assert done.returncode == 6
    assert "its backing file 'shut.img'" in done.stderr or "shut.img" in done.stderr


def test_no_command_takes_an_unreadable_file_for_wrong_usage():
    """The parser looks at no file of its own accord."""

    def types(command):
        for parameter in command.params:
            yield parameter.type
        for member in getattr(command, "commands", {}).values():
            yield from types(member)

    command = typer.main.get_command(app_with(None))
    _open_no_file(command)
    found = [kind for kind in types(command) if hasattr(kind, "readable")]
    assert len(found) > 20
    assert not any(kind.readable for kind in found)
