"""Images that are written to in a transaction, and processes that are cut off at it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.change import recovery, transaction
from imgtool.image.change.plan import sync_file
from imgtool.image.intent import intent_log
from imgtool.image.intent.intent_log import Record

OLD, NEW = 0x11, 0x22
KILLED = 99


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def pattern(image: Path | str, format: str, value: int) -> bool:
    """Whether the image reads as this value where the tests write, at the start and further on."""
    commands = ["-c", f"read -P {value} 0 64k", "-c", f"read -P {value} 1M 192k"]
    done = subprocess.run(
        ["qemu-io", "-r", "-f", format, *commands, image], capture_output=True, check=False
    )
    return done.returncode == 0


def fill(image: Path, format: str, value: int) -> None:
    commands = ["-c", f"write -P {value} 0 64k", "-c", f"write -P {value} 1M 192k"]
    subprocess.run(["qemu-io", "-f", format, *commands, image], check=True, capture_output=True)


def made(folder: Path, kind: str) -> Path:
    """An image that holds the old content."""
    image = folder / f"{kind}.img"
    if kind == "raw":
        qemu_img("create", "-f", "raw", image, "4M")
        fill(image, "raw", OLD)
    elif kind == "qcow2":
        qemu_img("create", "-f", "qcow2", image, "4M")
        fill(image, "qcow2", OLD)
    elif kind == "holding":
        qemu_img("create", "-f", "qcow2", image, "4M")
        fill(image, "qcow2", OLD)
        qemu_img("snapshot", "-c", "before", image)
        qemu_img("bitmap", "--add", image, "since")
        fill(image, "qcow2", OLD)
    else:
        base = folder / f"{kind}-base.qcow2"
        qemu_img("create", "-f", "qcow2", base, "4M")
        fill(base, "qcow2", OLD)
        qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", base.name, image)
    return image


def held(image: Path) -> list[str]:
    """The snapshots and the bitmaps that QEMU finds in it."""
    done = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", image], check=True, capture_output=True
    )
    said = json.loads(done.stdout)
    rows = [*said.get("snapshots", ()), *said["format-specific"]["data"].get("bitmaps", ())]
    return [row["name"] for row in rows]


def format_of(kind: str) -> str:
    return "raw" if kind == "raw" else "qcow2"


def write(images: Sequence[Path], kinds: Sequence[str]) -> None:
    chains = [
        open_chain(image, format=format_of(kind)) for image, kind in zip(images, kinds, strict=True)
    ]
    with transaction.transaction(chains, notice=lambda line: None) as writing:
        for chain in writing.chains:
            fill(chain.active.path, "qcow2", NEW)
        writing.commit()


def in_child(work: Callable[[], None]) -> int:
    """Run something in a process that may be cut off; its status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cut_at(number: int, after: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrappers for functions: the `number`th call of any of them is the last thing that happens."""
    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            mine = calls
            if mine == number and not after:
                os._exit(KILLED)
            result = function(*args, **named)
            if mine == number:
                os._exit(KILLED)
            return result

        return wrapped

    return wrap


def cut_off(images: Sequence[Path], kinds: Sequence[str], number: int, after: bool) -> bool:
    """Write, killed at a step; whether there was such a step."""

    def work() -> None:
        wrap = cut_at(number, after)
        patch = pytest.MonkeyPatch()
        for module in (transaction, recovery):
            patch.setattr(module, "qemu_img", wrap(module.qemu_img))
        patch.setattr(transaction, "sync_file", wrap(sync_file))
        patch.setattr(Record, "note", wrap(Record.note))
        patch.setattr(Record, "remove", wrap(Record.remove))
        patch.setattr(Path, "unlink", wrap(Path.unlink))
        write(images, kinds)

    status = in_child(work)
    assert status in (0, KILLED)
    return status == KILLED


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if intent_log.is_ours(path.name)]


def reads_as(name: str, value: int) -> bool:
    commands = ["-c", f"read -P {value} 0 64k", "-c", f"read -P {value} 1M 192k"]
    done = subprocess.run(["qemu-io", "-r", *commands, name], capture_output=True, check=False)
    return done.returncode == 0
