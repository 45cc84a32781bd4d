"""What is said to be written in place is: cut off at any write of QEMU's, it is finished whole."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.change import recovery, transaction
from imgtool.image.change.recovery import recover
from imgtool.image.qemu.qemu_img import qemu_img as run_qemu_img
from imgtool.image.qemu.qemu_img import same_content
from tests.support.format_images import WRITABLE, Kind, qemu_img, qemu_io
from tests.support.writes import KILLED, in_child, left_over

_WRITES = "pwrite64,pwritev,pwritev2,fallocate,ftruncate"
_CHANGES = (
    "write -P 11 1M 200k",
    "write -P 12 10M 2M",
    "write -z 5M 512k",
    "write -P 13 22M 64k",
    "write -P 14 8M 4k",
)


def write(image: Path, format: str, number: int) -> None:
    """Write to an image; this process and QEMU are killed at QEMU's `number`th write into it."""

    def cut_off(words, *, image, **options):
        if words[0] != "commit":
            return run_qemu_img(words, image=image, **options)
        kill = f"inject={_WRITES}:signal=KILL:when={number}"
        argv = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={_WRITES}", "-e", kill]
        if subprocess.run([*argv, "qemu-img", *words], capture_output=True, check=False).returncode:
            os._exit(KILLED)
        return None

    pytest.MonkeyPatch().setattr(recovery, "qemu_img", cut_off)
    chain = open_chain(image, format=format)
    with transaction.transaction([chain], notice=lambda line: None) as writing:
        qemu_io(writing.chains[0].active.path, "qcow2", *_CHANGES)
        writing.commit()


def moments():
    """The first writes one by one, then some of the many that are alike."""
    return itertools.chain(range(1, 9), range(10, 60, 7))


@pytest.mark.parametrize("kind", WRITABLE.values(), ids=WRITABLE.keys())
def test_a_write_that_is_cut_off_anywhere_is_finished(kind: Kind, tmp_path: Path):
    wanted = tmp_path / "wanted"
    Kind("raw").make(wanted)
    qemu_io(wanted, "raw", *_CHANGES)
    kills = 0
    for number in moments():
        folder = tmp_path / str(number)
        folder.mkdir()
        image = kind.make(folder / "disk.img")
        if in_child(lambda: write(image, kind.format, number)) != KILLED:  # noqa: B023
            break
        kills += 1
        between = open_chain(image, format=kind.format).filename()
        assert same_content(between, str(wanted)), f"read after it was killed at {number}"
        recover(image)
        assert left_over(folder) == []
        now = open_chain(image, format=kind.format)
        assert same_content(now.filename(), str(wanted)), f"recovered after {number}"
        checked = subprocess.run(
            ["qemu-img", "check", "-f", kind.format, image], capture_output=True, check=False
        )
        # 63: it has no check. What is lost to nobody is left to `check --repair leaks` in a qed.
        assert checked.returncode in ((0, 3, 63) if kind.format == "qed" else (0, 63)), checked
        if kind.format == "vpc":
            assert image.read_bytes()[-512:-504] == b"conectix"
    assert kills >= 1
    assert same_content(open_chain(image, format=kind.format).filename(), str(wanted))


def test_what_stands_on_a_vmdk_is_written_too(tmp_path: Path):
    base = WRITABLE["vmdk"].make(tmp_path / "base.vmdk")
    image = tmp_path / "delta.vmdk"
    qemu_img("create", "-f", "vmdk", "-F", "vmdk", "-b", base, image)
    wanted = Kind("raw").make(tmp_path / "wanted")
    qemu_io(wanted, "raw", *_CHANGES)
    assert in_child(lambda: write(image, "vmdk", 3)) == KILLED
    recover(image)
    assert same_content(open_chain(image).filename(), str(wanted))
    assert same_content(open_chain(base).filename(), str(Kind("raw").make(tmp_path / "old")))
