"""The classic exercise: write 123, keep it, append 456, keep it, go back, look.

Every state is read without going back to it: by the names of overlays and of snapshots.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chain_work import imgtool, qemu_img

FILE = "/notes.txt"


def cat(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "imgtool", "cat", "--engine", "direct", *words, FILE],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def did(*words: str | Path) -> str:
    status, said = imgtool(*words)
    assert status == 0, said
    return said


def put(image: Path, text: str) -> None:
    """Write a file in the guest, as a guest would: into a raw copy, then only what differs."""
    raw, source = image.with_name("raw"), image.with_name("source")
    source.write_text(text)
    qemu_img("convert", "-O", "raw", image, raw)
    commands = f"rm {FILE}\nwrite {source} {FILE}\n"
    subprocess.run(
        ["/sbin/debugfs", "-w", "-f", "-", raw],
        input=commands.encode(),
        check=True,
        capture_output=True,
    )
    before, after = image.with_name("before"), raw.read_bytes()
    qemu_img("convert", "-O", "raw", image, before)
    old = before.read_bytes()
    block = 4096
    piece = image.with_name("piece")
    for at in range(0, len(after), block):
        if after[at : at + block] != old[at : at + block]:
            piece.write_bytes(after[at : at + block])
            command = f"write -s {piece} {at} {block}"
            subprocess.run(
                ["qemu-io", "-t", "writeback", "-f", "qcow2", "-c", command, image],
                check=True,
                capture_output=True,
            )
    for path in (raw, source, before, piece):
        path.unlink(missing_ok=True)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "hostname").write_text("classic\n")
    raw, image = tmp_path / "raw", tmp_path / "disk.qcow2"
    subprocess.run(
        ["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, raw, "16M"],
        check=True,
    )
    qemu_img("convert", "-O", "qcow2", raw, image)
    raw.unlink()
    return image


def test_with_snapshots(guest: Path) -> None:
    put(guest, "123\n")
    did("snapshot", "create", guest, "first")
    put(guest, "123\n456\n")
    did("snapshot", "create", guest, "second")
    put(guest, "123\n456\n789\n")
    # Looked at without going back.
    assert cat(guest) == "123\n456\n789\n"
    assert cat(guest, "--snapshot", "first") == "123\n"
    assert cat(guest, "--snapshot", "second") == "123\n456\n"
    status, said = imgtool("snapshot", "revert", guest, "first")
    assert status == 4 and "--save-as" in said
    did("snapshot", "revert", guest, "first", "--save-as", "third")
    assert cat(guest) == "123\n"
    did("snapshot", "revert", guest, "second")
    assert cat(guest) == "123\n456\n"
    assert cat(guest, "--snapshot", "third") == "123\n456\n789\n"
    said = did("snapshot", "delete", guest, "third")
    assert "does not shrink" in said and "compact" in said
    did("compact", guest)
    assert cat(guest) == "123\n456\n" and cat(guest, "--snapshot", "first") == "123\n"


def test_with_overlays(guest: Path) -> None:
    folder = guest.parent
    first, second, third = (folder / f"{name}.qcow2" for name in ("first", "second", "third"))
    did("overlay", "create", guest, first, "--protect-base")
    put(first, "123\n")
    did("overlay", "create", first, second)
    put(second, "123\n456\n")
    did("overlay", "create", second, third)
    put(third, "123\n456\n789\n")
    states = {first: "123\n", second: "123\n456\n", third: "123\n456\n789\n"}
    for link, text in states.items():
        assert cat(link) == text
    # To commit, to rebase and to flatten gives the same guest.
    for name in ("rebased", "flat"):
        shutil.copy2(third, folder / name)
    did("overlay", "rebase", folder / "rebased", guest)
    did("overlay", "flatten", folder / "flat")
    for name in ("rebased", "flat"):
        assert cat(folder / name) == states[third]
        if name == "flat":
            (folder / name).unlink()
    status, said = imgtool("overlay", "commit", second)
    assert status == 0, said  # `third` is its overlay, not another one of its base
    for link in (first, second, third):
        assert cat(link) == (states[link] if link != first else states[second])
    status, said = imgtool("overlay", "commit", first)
    assert status == 4, said  # the base is protected, and has another overlay
    did("overlay", "commit", third, "--remove")
    assert cat(second) == states[third]
    assert subprocess.run(["qemu-img", "check", "-q", second], check=False).returncode == 0
