"""Disks in numbered files: no part is taken for a disk, and what is said makes one of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from imgtool import cli
from imgtool.errors import ExitStatus
from imgtool.image.checks.split import parts_of

PART = 1 << 20


def run(*words: object) -> int:
    try:
        return int(cli._run([str(word) for word in words]))
    except SystemExit as ended:
        return int(ended.code or 0)


def filesystem(path: Path, size: int = 4 * PART + 4096) -> bytes:
    """An ext4 with a file in it; what it is, as bytes."""
    tree = path.parent / "tree"
    tree.mkdir(exist_ok=True)
    (tree / "letter").write_text("a letter\n")
    words = ("-q", "-F", "-t", "ext4", "-d", tree, path, f"{size >> 10}k")
    subprocess.run(["mke2fs", *words], check=True, capture_output=True)
    return path.read_bytes()


def split(content: bytes, stem: Path, first: int, width: int = 3) -> list[Path]:
    made: list[Path] = []
    for at in range(0, len(content), PART):
        part = stem.with_name(f"{stem.name}.{first + len(made):0{width}}")
        part.write_bytes(content[at : at + PART])
        made.append(part)
    return made


@pytest.mark.parametrize(("first", "width"), [(0, 3), (1, 3), (1, 4)])
def test_a_part_is_refused_and_what_is_said_joins_them(first: int, width: int, tmp_path, capfd):
    whole = filesystem(tmp_path / "whole")
    folder = tmp_path / "it's here"
    folder.mkdir()
    parts = split(whole, folder / "disk", first, width)
    for number, part in enumerate(parts, 1):
        for words in (["info", part], ["ls", part, "/"]):
            assert run(*words) == ExitStatus.IMAGE_UNREADABLE
            said = capfd.readouterr().err
            assert f"it is part {number} of 5 of a disk that was split" in said
    step = re.search(r"hint: join them: (cat .*) > NEW, then look at NEW", said)
    assert step is not None, said
    done = subprocess.run(step[1], shell=True, capture_output=True, check=True)
    assert done.stdout == whole
    (tmp_path / "NEW").write_bytes(done.stdout)
    assert run("cat", tmp_path / "NEW", "/letter") == 0
    assert capfd.readouterr().out == "a letter\n"


def test_of_many_the_names_are_not_all_said(tmp_path: Path, capfd):
    whole = filesystem(tmp_path / "whole", 12 * PART)
    parts = split(whole, tmp_path / "disk", 1)
    assert run("info", parts[0]) == ExitStatus.IMAGE_UNREADABLE
    step = re.search(r"join them: (cat .*) > NEW", capfd.readouterr().err)
    assert step is not None
    assert subprocess.run(step[1], shell=True, capture_output=True).stdout == whole


def test_numbered_disks_are_disks(tmp_path: Path, capfd):
    """Such as backups: each is one by itself."""
    content = filesystem(tmp_path / "whole", 2 * PART)
    for number in (1, 2):
        (tmp_path / f"backup.{number:03}").write_bytes(content)
    for number in (1, 2):
        assert run("ls", tmp_path / f"backup.{number:03}", "/letter") == 0


def test_who_says_raw_gets_the_part(tmp_path: Path, capfd):
    first, *_ = split(filesystem(tmp_path / "whole"), tmp_path / "disk", 1)
    assert run("info", "--format", "raw", first) == 0


def test_what_is_no_part(tmp_path: Path):
    """Alone, of other lengths, with a gap, no file."""
    for name, size in {"a.001": 5, "b.001": 5, "b.002": 6, "c.001": 5, "c.003": 5}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "d.001").write_bytes(b"x")
    (tmp_path / "d.002").mkdir()
    for name in ("a.001", "b.001", "b.002", "c.001", "c.003", "d.001", "e.001", "disk.img"):
        assert parts_of(tmp_path / name) == []
