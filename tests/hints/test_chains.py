"""Hints about images and what they stand on: what is to be typed mends it and harms nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hints.following import (
    Done,
    Row,
    command,
    commands_in,
    imgtool,
    run,
    type_in,
    typed,
)
from tests.hints.images import overlay, qcow2, qemu_img, reads, write
from tests.support import chain_images

DISK = ("disk.qcow2",)
TOP = ("top.qcow2",)
CHECK = "chain check {} -o json"


def _intact(image: str = "disk.qcow2") -> bool:
    return reads(image, 1) and reads(image, 2, 65536) and imgtool("check", image).status == 0


def _stand(*names: str) -> bool:
    """Whether these are the chain of the first of them."""
    rows = json.loads(imgtool("chain", "show", names[0], "-o", "json").text)
    return [Path(row["path"]).name for row in rows] == list(names)


def _killed() -> None:
    """Its writer was killed: it is marked, and its refcounts lag behind."""
    qcow2("disk.qcow2", "-o", "lazy_refcounts=on")
    chain_images.patch(Path("disk.qcow2"), chain_images.INCOMPATIBLE, b"\1")


def _with_base(format: bytes | None = None, name: str = "base.qcow2") -> None:
    qemu_img("create", "-q", "-f", "qcow2", name, "8M")
    overlay("top.qcow2", name)
    write("top.qcow2", "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "before", "top.qcow2")
    write("top.qcow2", "write -P 2 64k 64k")
    if format is not None:
        chain_images.named_format(Path("top.qcow2"), format)


def _formatless() -> None:
    _with_base(name="base.raw")
    path = Path("top.qcow2")
    at = path.read_bytes().index(chain_images.BACKING_FORMAT)
    chain_images.patch(path, at, b"\x12\x34\x56\x78")


def _loop() -> None:
    _with_base()
    qemu_img("create", "-q", "-f", "qcow2", "root.qcow2", "8M")
    words = ("rebase", "-u", "-F", "qcow2", "-b", "top.qcow2", "base.qcow2")
    qemu_img(*words)


def _elsewhere() -> None:
    """The base is in another folder, which is given."""
    _with_base()
    Path("bases").mkdir()
    Path("base.qcow2").rename("bases/base.qcow2")


def _encrypted() -> None:
    secret = ("--object", "secret,id=s,data=x")
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
    chain_images.create_encrypted("-q", "-f", "qcow2", *secret, *options, "disk.qcow2", "8M")


def _resize_with_the_key(words: list[str], text: str) -> Done:
    assert text == "qemu-img can, with --object secret and --image-opts"
    opts = "driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=s"
    secret = ("--object", "secret,id=s,data=x")
    run("qemu-img", "resize", *secret, "--image-opts", opts, "16M")
    return imgtool("info", "disk.qcow2")


def _as_qcow2(words: list[str], text: str) -> Done:
    """It was a raw disk, says the name; the test has made it, and knows better."""
    (raw,) = commands_in(text)
    assert " --base-format raw " in raw and text.endswith(" qcow2"), text
    type_in(raw.replace(" raw ", " qcow2 ", 1))
    return imgtool(*words)


ROWS = (
    Row(
        "QEMU mends them when it opens it next, or: imgtool check --repair all {}",
        _killed,
        CHECK.format("disk.qcow2"),
        typed(),
        _intact,
        DISK,
        finding="dirty",
    ),
    Row(
        "bring them up to date, as QEMU does when a guest starts: imgtool check --repair all {}",
        _killed,
        "resize disk.qcow2 16M",
        typed(),
        _intact,
        DISK,
    ),
    Row(
        "find out what the file is: imgtool info {}; then write that into the overlay: {}",
        lambda: _with_base(b"qcow9"),
        CHECK.format("top.qcow2"),
        typed(FORMAT="qcow2"),
        lambda: _intact("top.qcow2"),
        TOP,
        finding="unknown-backing-format",
    ),
    Row(
        "find out which it is, then write it down: {}, or the same with {}",
        _formatless,
        CHECK.format("top.qcow2"),
        _as_qcow2,
        lambda: _intact("top.qcow2"),
        TOP,
        finding="no-backing-format",
    ),
    Row(
        "find out which image stood on what, then write that into the wrong link: qemu-img rebase"
        " -u -F FORMAT -b BASE LINK",
        _loop,
        CHECK.format("top.qcow2"),
        command(0, FORMAT="qcow2", BASE="root.qcow2", LINK="base.qcow2"),
        lambda: _intact("top.qcow2") and _stand("top.qcow2", "base.qcow2", "root.qcow2"),
        ("base.qcow2",),
        finding="loop",
    ),
    Row(
        "if it is the right one, write its name into the overlay: imgtool overlay rebase --unsafe"
        " --base-format {} {} {}",
        _elsewhere,
        CHECK.format("top.qcow2 --backing-dir bases"),
        typed(),
        lambda: _intact("top.qcow2"),
        TOP,
        finding="base-found-by-name",
    ),
    Row(
        "write that name into it: imgtool overlay rebase --unsafe --base-format {} {} {}",
        _elsewhere,
        "resize top.qcow2 16M --backing-dir bases",
        typed(),
        lambda: _intact("top.qcow2"),
        TOP,
    ),
    Row(
        "qemu-img can, with --object secret and --image-opts",
        _encrypted,
        "resize disk.qcow2 16M",
        _resize_with_the_key,
        "16777216",
        DISK,
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.hint[:50])
def test_what_it_says_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    row.follow()
