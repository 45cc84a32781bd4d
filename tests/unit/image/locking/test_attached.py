"""Who uses an image through the kernel, in a sysfs and with mounts of the test's own.

With the kernel's own loop devices: tests/mount/test_in_use.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from imgtool.errors import RefusedError
from imgtool.host import mountinfo
from imgtool.host.mountinfo import MountInfo
from imgtool.image.chain.chain import open_chain
from imgtool.image.locking import attached
from imgtool.image.locking.attached import Attached, attached_to
from imgtool.image.locking.locks import Holder, holders, in_use_for_writing, refuse_if_in_use
from imgtool.image.locking.locks import warn_if_written as warning

LOOP = "loop987654"  # for which there is no node in /dev, as for a user who may not open it


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    subprocess.run(["truncate", "--size=8M", path], check=True)
    return path


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sysfs"
    folder.mkdir()
    monkeypatch.setattr(attached, "_BLOCK", folder)
    return folder


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[MountInfo]:
    """What is mounted."""
    rows: list[MountInfo] = []
    monkeypatch.setattr(attached, "mounts", lambda: rows)
    return rows


def device(folder: Path, number: str, name: str = "", *, holds: Iterable[Path] = ()) -> Path:
    """A block device's folder; `holds` are the devices that it stands on."""
    folder.mkdir(parents=True)
    (folder / "dev").write_text(f"{number}\n")
    if name:
        (folder / "dm").mkdir()
        (folder / "dm/name").write_text(f"{name}\n")
    for below in holds:
        (below / "holders").mkdir(exist_ok=True)
        (below / "holders" / folder.name).symlink_to(folder)
    return folder


def loop(sysfs: Path, file: str | bytes | Path, *, read_only: bool = False) -> Path:
    folder = device(sysfs / LOOP, "7:987654")
    (folder / "ro").write_text(f"{int(read_only)}\n")
    (folder / "loop").mkdir()
    (folder / "loop/backing_file").write_bytes(os.fsencode(file) + b"\n")
    return folder


def mount(target: str, device: str, source: str = "none", read_only: bool = False) -> MountInfo:
    return MountInfo(target, "ext4", source, device, read_only)


@pytest.mark.usefixtures("mounted")
def test_a_loop_device_writes_unless_it_is_read_only(image: Path, sysfs: Path) -> None:
    folder = loop(sysfs, image)
    assert attached_to(image) == [Attached(f"the loop device /dev/{LOOP}", writes=True)]
    (folder / "ro").write_text("1\n")
    assert attached_to(image) == [Attached(f"the loop device /dev/{LOOP}", writes=False)]


@pytest.mark.usefixtures("mounted")
def test_the_file_counts_and_not_its_name(image: Path, sysfs: Path, tmp_path: Path) -> None:
    (tmp_path / "hard link").hardlink_to(image)
    (tmp_path / "symlink").symlink_to(image)
    loop(sysfs, tmp_path / "hard link")
    assert len(attached_to(tmp_path / "symlink")) == 1
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(512))
    assert attached_to(other) == []


@pytest.mark.usefixtures("mounted")
@pytest.mark.parametrize("name", [b"/none\n/x", b"/gone (deleted)", b"\xff\xfe", b""])
def test_a_file_that_is_not_there_any_more_is_no_failure(
    image: Path, sysfs: Path, name: bytes
) -> None:
    loop(sysfs, name)
    assert attached_to(image) == []


def test_a_loop_device_that_is_detached_at_this_moment(image: Path, sysfs: Path) -> None:
    (loop(sysfs, image) / "ro").unlink()
    assert attached_to(image) == []


def test_where_it_is_mounted(image: Path, sysfs: Path, mounted: list[MountInfo]) -> None:
    folder = loop(sysfs, image)
    part = device(folder / f"{LOOP}p1", "259:1")
    (part / "partition").write_text("1\n")
    device(sysfs / "dm-3", "253:3", "vg-root", holds=[part])
    mounted += [
        mount("/other", "8:1"),
        mount("/whole", "7:987654"),
        mount("/part", "0:55", f"/dev/{LOOP}p1"),  # btrfs has a number of its own
        mount("/root", "253:3"),
        mount("/again", "0:56", "/dev/mapper/vg-root"),
    ]
    (found,) = attached_to(image)
    assert found.program == (
        f"the loop device /dev/{LOOP}, mounted at /whole, /part, /root and 1 more"
    )


def test_writers_are_refused_and_readers_warned(
    image: Path, sysfs: Path, mounted: list[MountInfo]
) -> None:
    folder = loop(sysfs, image)
    mounted.append(mount("/mnt", "7:987654"))
    chain = open_chain(image, format="raw")
    what = f"the loop device /dev/{LOOP}, mounted at /mnt"
    holder = Holder(pid=None, program=what, writes=True, exclusive=True)
    assert holders(image) == (holder,)
    assert in_use_for_writing(image) == holder
    with pytest.raises(RefusedError, match=f"in use by {what}") as refused:
        refuse_if_in_use(chain)
    assert "unmount it" in str(refused.value.hint)
    assert warning(chain) == f"{image} is being written by {what}: what is read may be inconsistent"
    # It relies on nobody writing, and does not write itself.
    (folder / "ro").write_text("1\n")
    with pytest.raises(RefusedError, match=what):
        refuse_if_in_use(chain)
    assert warning(chain) is None
    assert in_use_for_writing(image) is None


@pytest.mark.usefixtures("mounted")
def test_device_on_a_base_does_not_lock_its_overlay(image: Path, sysfs: Path) -> None:
    active = image.with_name("active.qcow2")
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", active)
    subprocess.run(create, check=True)
    folder = loop(sysfs, image, read_only=True)
    refuse_if_in_use(open_chain(active))
    (folder / "ro").write_text("0\n")
    with pytest.raises(RefusedError, match=LOOP):
        refuse_if_in_use(open_chain(active))


def test_mountinfo_is_read_whole() -> None:
    rows = mountinfo.mounts()
    (proc,) = [row for row in rows if row.target == "/proc"][:1]
    status = os.stat("/proc")
    assert proc.fstype == "proc"
    assert proc.device == f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    assert not proc.read_only
