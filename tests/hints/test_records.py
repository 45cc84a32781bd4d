"""Hints about work that was cut off: it is finished, undone or ended by what they say to type."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.change import transaction
from imgtool.image.intent.intent_log import is_ours, record_path, temporary_path
from tests.hints.following import Done, Row, command, imgtool, matching, without
from tests.hints.images import overlay
from tests.support import writes
from tests.support.records import left, planted
from tests.support.writes import KILLED, NEW, fill, in_child, pattern

DISK = ("holding.img",)
KEEP = "{}"  # how it is ended and all kept


def torn(image: Path | None = None, folder: str | None = None) -> Path:
    """An image with a snapshot and a bitmap, to which a write was cut off in the middle."""
    image = image or writes.made(Path.cwd(), "holding")

    def killed(record, *others, **options):
        os._exit(KILLED)

    def work() -> None:
        pytest.MonkeyPatch().setattr(transaction, "finish_write", killed)
        chains = [open_chain(image)]
        where = Path(folder) if folder else None
        with transaction.transaction(chains, tmp_dir=where, notice=lambda line: None) as writing:
            for chain in writing.chains:
                fill(chain.active.path, "qcow2", NEW)
            writing.commit()

    assert in_child(work) == KILLED
    return image


def _finished(image: str = "holding.img") -> bool:
    folder = Path(image).absolute().parent
    return pattern(image, "qcow2", NEW) and not any(is_ours(x) for x in os.listdir(folder))


def _ended() -> bool:
    return not record_path(Path("holding.img").absolute()).exists()


def _copied() -> None:
    torn()
    inside = Path("copy")
    inside.mkdir()
    for name in os.listdir():
        if Path(name).is_file():
            shutil.copy2(name, inside)
            Path(name).unlink()


def _changed() -> None:
    image = torn()
    fill(image, "qcow2", 0x77)
    later = image.stat().st_mtime_ns + 2 * 10**9
    os.utime(image, ns=(later, later))


def _overlay_lost() -> None:
    Path("elsewhere").mkdir()
    torn(folder="elsewhere")
    shutil.move("elsewhere", "lost")


def _brought_back(words: list[str], text: str) -> Done:
    assert text.startswith("bring the overlay back; "), text
    shutil.move("lost", "elsewhere")
    return imgtool(*words)


def _commit_without_overlay() -> None:
    image = writes.made(Path.cwd(), "holding")
    top = overlay("top.qcow2", image.name, "qcow2")
    left(image, of_overlay=top.absolute(), operation="commit", overlay=str(top.absolute()))
    fill(image, "qcow2", NEW)
    top.unlink()


def _first_disk_lost() -> None:
    image = writes.made(Path.cwd(), "holding")
    images = ["first.img", image.name]
    facts: dict[str, Any] = {"operation": "write", "step": "ready", "images": images, "id": "x"}
    left(image, overlay=str(image.with_name("x")), number=1, **facts)


def _planted(**facts: Any) -> Path:
    image = writes.made(Path.cwd(), "holding")
    return planted(image, **{"operation": "snapshot create", "step": "begun", **facts})


def _left(**facts: Any) -> Path:
    return left(writes.made(Path.cwd(), "holding"), **facts)


def _names_a_file_elsewhere() -> None:
    image = writes.made(Path.cwd(), "holding")
    Path("../apart").mkdir()
    top = overlay("../apart/top.qcow2", str(image))
    facts = {"operation": "commit", "overlay": str(top.resolve())}
    planted(image, of_overlay=top.resolve(), **facts)


def _image_gone() -> None:
    name = temporary_path(Path("holding.img").absolute())
    _left(operation="flatten", temporary=str(name))
    name.touch()
    Path("holding.img").rename("kept elsewhere")


ROWS = (
    Row(
        f"if this is a copy of all as it was left: imgtool recover {{}} --force {{}}; {KEEP}",
        _copied,
        "recover copy/holding.img",
        command(0),
        lambda: _finished("copy/holding.img"),
        ("copy/holding.img",),
    ),
    Row(
        "{} holds all that was to be written. To finish it over what was done since: imgtool"
        f" recover {{}} --force {{}}; {KEEP}",
        _changed,
        "recover holding.img",
        command(0),
        _finished,
        DISK,
    ),
    Row(
        "{} holds all that was to be written. To finish it over what was done since: imgtool"
        f" recover {{}} --force {{}}; {KEEP}",
        _changed,
        "recover holding.img",
        command(1),
        lambda: _ended() and pattern("holding.img", "qcow2", 0x77),
    ),
    Row(
        f"bring the overlay back; {KEEP}",
        _overlay_lost,
        "recover holding.img",
        _brought_back,
        _finished,
        DISK,
    ),
    Row(f"bring the overlay back; {KEEP}", _overlay_lost, "info holding.img", command(0), _ended),
    Row(
        f"bring that overlay back; {KEEP}",
        _commit_without_overlay,
        "recover holding.img",
        command(0),
        _ended,
    ),
    Row(
        f"bring that disk and its record back; {KEEP}",
        _first_disk_lost,
        "recover holding.img",
        command(0),
        _ended,
    ),
    Row(
        f"to have that done: imgtool recover {{}} --force {{}}; {KEEP}",
        _planted,
        "recover holding.img",
        command(0),
        _ended,
    ),
    Row(
        f"to have that done: imgtool recover {{}} --force {{}}; {KEEP}",
        _planted,
        "recover holding.img",
        command(1),
        _ended,
    ),
    Row(
        f"use the imgtool that began it; {KEEP}",
        lambda: _left(operation="weave"),
        "recover holding.img",
        command(0),
        _ended,
    ),
    Row(
        "look at it: {}; to end it and keep all that is there: imgtool recover {} --keep",
        lambda: _left(operation="write", step="begun"),
        "recover holding.img",
        command(0),
        _ended,
    ),
    Row(
        f"if you know that one: --backing-dir {{}}; {KEEP}",
        _names_a_file_elsewhere,
        "recover holding.img --force unproved",
        matching("--backing-dir [^;]+"),
        _ended,
        DISK,
    ),
    Row(
        f"leave --format out; {KEEP}",
        torn,
        "info holding.img --format raw",
        without("--format raw"),
    ),
    Row(
        "bring it back and repeat this; or, if nothing of it is needed: rm {}",
        _image_gone,
        "recover holding.img",
        command(0),
        _ended,
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.hint[:30]} {row.wrong[:12]}")
def test_what_it_says_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    row.follow()
