"""A hint that names an option is of a command that has it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hints.following import imgtool
from tests.hints.images import plain, qemu_img, unbased
from tests.hints.test_known import commands

# What each command is given besides the image, which is "{}".
_WORDS = {
    **dict.fromkeys(("df", "filesystems", "partitions", "inspect", "info", "check"), "{}"),
    **dict.fromkeys(("compact", "chain show", "chain check", "snapshot list"), "{}"),
    **dict.fromkeys(("overlay flatten", "overlay commit", "diff --against-base"), "{}"),
    **dict.fromkeys(("ls", "cat"), "{} /name"),
    "check --repair all": "{}",
    "diff": "{} {}",
    "copy-out": "{} /name .",
    "copy-in": "{} source /",
    "edit -e s/a/b/": "{} /name",
    "inject --hostname x": "{}",
    "mount": "{} place",
    "convert": "{} new.qcow2",
    "convert --snapshot one": "{} new.qcow2",
    "resize": "{} 1G",
    "overlay create": "{} new.qcow2",
    "overlay rebase": "{} good.qcow2",
    "overlay rebase --unsafe": "{} good.qcow2",
    "snapshot create": "{} one",
    "snapshot revert": "{} one",
    "snapshot delete": "{} one",
}


def _noise() -> Path:
    path = Path("disk")
    path.write_bytes(b"x" * (1 << 20))
    return path


def _raw_name() -> Path:
    plain("good.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "good.qcow2", "disk.raw")
    return Path("disk.raw")


def _vhd() -> Path:
    qemu_img("create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", "disk.raw", "8M")
    return Path("disk.raw")


def _missing_base() -> Path:
    unbased()
    return Path("top.qcow2")


def _base_outside() -> Path:
    Path("../apart").mkdir()
    plain("../apart/base.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "../apart/base.qcow2", "top.qcow2")
    return Path("top.qcow2")


def test_the_second_image_has_options_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain("good.qcow2")
    vhd = _vhd()
    for command, option in (
        ("diff good.qcow2", "--format-b"),
        ("overlay rebase --unsafe good.qcow2", "--base-format"),
        ("overlay create", "--base-format"),
    ):
        done = imgtool(*command.split(), vhd, *(["new.qcow2"] if "create" in command else []))
        assert f"say which it is: {option} raw or {option} vpc" in done.err, done.err


@pytest.mark.parametrize("make", [_noise, _raw_name, _vhd, _missing_base, _base_outside])
def test_the_command_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Path]
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    image = make()
    if not Path("good.qcow2").exists():
        plain("good.qcow2")
    Path("source").touch()
    Path("place").mkdir()
    known, seen = commands(), 0
    for words, others in _WORDS.items():
        done = imgtool(*words.split(), *others.format(image, image).split())
        name = next(name for name in (" ".join(words.split()[:n]) for n in (2, 1)) if name in known)
        for line in (line for line in done.err.splitlines() if line.startswith("  hint: ")):
            own = re.sub(r"imgtool [a-z]+[^;,]*", "", line)
            for option in re.findall(r"(?<=\s)--[a-z-]+", own):
                assert option in known[name], f"{name}: {line}"
                seen += 1
    assert seen
