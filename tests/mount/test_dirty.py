"""A guest that died with a full journal: mounted read-only it is whole, and nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.host import good, here, imgtool, mount_at, run, state_of
from tests.mount.images import blank, divide, make_filesystem, mounted, put, to_qcow2

MIB = 1 << 20
START = 2 * MIB
_APPLIANCE = pytest.mark.appliance


def _force_out(path: Path) -> None:
    """fsync: into the journal with it, and no further."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _work(root: Path, take: Callable[[], object]) -> None:
    """Files, links and deletions that are only in the journal when `take` is called."""
    (root / "kept").write_bytes(b"from before\n")
    (root / "gone").write_bytes(b"deleted before the crash\n")
    (root / "folder").mkdir()
    os.sync()
    for number in range(50):
        (root / "folder" / f"file {number}").write_bytes(b"%d\n" % number * 500)
    (root / "link").symlink_to("folder/file 7")
    (root / "gone").unlink()
    for path in (*(root / "folder").iterdir(), root / "folder", root):
        _force_out(path)
    take()


def crashed(folder: Path, kind: str) -> Path:
    """A filesystem as it is when the power goes: a copy of it while it is mounted."""
    live, image = folder / f"live-{kind}.fs", folder / f"{kind}.fs"
    make_filesystem(live, kind, None)
    with mounted(live) as root:
        _work(root, lambda: shutil.copyfile(live, image))
    live.unlink()
    return image


def shut_down(folder: Path) -> Path:
    """An XFS that was shut down at once, its log written, as when its disk goes away."""
    image = folder / "shut-down.fs"
    make_filesystem(image, "xfs", None)
    with mounted(image) as root:
        _work(root, lambda: run("xfs_io", "-x", "-c", "shutdown -f", root))
    return image


def in_partition(filesystem: Path, name: str) -> Path:
    disk = blank(filesystem.with_name(name), filesystem.stat().st_size + 4 * MIB)
    divide(disk, ["label: gpt", f"start={START // 512},size={filesystem.stat().st_size // 512}"])
    put(filesystem, disk, START)
    return disk


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """The raw disk with a dirty filesystem of this kind in its first partition."""
    folder = tmp_path_factory.mktemp("dirty")
    made: dict[str, Path] = {}

    def disk(kind: str) -> Path:
        if kind not in made:
            source = shut_down(folder) if kind == "xfs, shut down" else crashed(folder, kind)
            made[kind] = in_partition(source, f"{source.stem}.raw")
        return made[kind]

    return disk


@pytest.mark.parametrize("via", ["loop", "export"])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "xfs, shut down", "btrfs"])
def test_what_is_only_in_the_journal_is_there(dirty, place, kind, via):
    disk = dirty(kind)
    before = state_of([disk])
    done = good("mount", disk, place, "--via", via, "-p", "1", "-v")
    options = mount_at(place).options
    names = {path.name for path in (place / "folder").iterdir()}
    seven = (place / "link").read_bytes()
    kept, gone = (place / "kept").read_bytes(), (place / "gone").exists()
    here("umount", place)
    assert names == {f"file {number}" for number in range(50)}
    assert seven == b"7\n" * 500
    assert (kept, gone) == (b"from before\n", False)
    assert "ro" in options
    assert state_of([disk]) == before
    if via == "loop":
        assert "journal" in done.err  # it says why it is not quite so direct


def test_behind_two_overlays(dirty, place, tmp_path):
    from tests.mount.images import overlay

    base = to_qcow2(dirty("ext4"), tmp_path / "base.qcow2")
    active = overlay(tmp_path / "active.qcow2", overlay(tmp_path / "middle.qcow2", base))
    before = state_of([active, base])
    here("mount", active, place, "--via", "export")
    assert (place / "folder" / "file 49").read_bytes() == b"49\n" * 500
    here("umount", place)
    assert state_of([active, base]) == before


def test_a_crashed_filesystem_can_be_written_to(dirty, place, tmp_path):
    disk = Path(shutil.copy(dirty("xfs"), tmp_path))
    here("mount", disk, place, "--via", "loop", "-p", "1", "--rw")
    (place / "new").write_bytes(b"new\n")
    here("umount", place)
    here("mount", disk, place, "--via", "loop", "-p", "1")
    assert (place / "new").read_bytes() == b"new\n"
    assert (place / "link").read_bytes() == b"7\n" * 500
    here("umount", place)


@pytest.mark.parametrize("via", ["loop", "export", pytest.param("fuse", marks=_APPLIANCE)])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_filesystem_shown_beside_a_written_one_keeps_journals(dirty, place, tmp_path, kind, via):
    """The hint is followed to the letter."""
    disk = Path(shutil.copy(dirty(kind), tmp_path))
    before = disk.read_bytes()
    words = ["mount", disk, place, "--via", via, "--rw"]
    done = imgtool(*words, "-m", "/dev/sda1:/:ro")
    assert done.status == 4
    assert "the kernel would replay its journal, which writes to it (/dev/sda1)" in done.err
    shown = done.err.split("hint: without what is in the journal: ")[1].split()
    assert shown[1].startswith("/dev/sda1:/:ro,")
    good(*words, *shown)
    try:
        assert via == "fuse" or "ro" in mount_at(place).options
        with pytest.raises(OSError, match=r"Read-only|Input/output"):
            (place / "newer").write_text("newer")
    finally:
        good("umount", place)
    assert disk.read_bytes() == before
