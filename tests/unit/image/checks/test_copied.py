"""An overlay and a base that were copied together are told from a base that was changed, where what
is in them can tell."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.checks import check_chain

HOUR = 3600
MIB = 1 << 20


def run(*words: object, clock: float | None = None) -> None:
    """Run a program; for those of e2fsprogs with this clock."""
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}
    if clock is not None:
        environment["E2FSPROGS_FAKE_TIME"] = str(int(clock))
    argv = [str(word) for word in words]
    subprocess.run(argv, check=True, capture_output=True, env=environment)


def disk(path: Path, filesystem: Path, table: str | None) -> Path:
    """A raw disk with the filesystem in it: all of it, or a partition at 1 MiB."""
    if table is None:
        shutil.copy(filesystem, path)
        return path
    path.write_bytes(bytes(8 * MIB))
    words = f"label: {table}\nstart=2048, size=8192\n".encode()
    subprocess.run(["/sbin/sfdisk", "-q", path], input=words, check=True)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(filesystem.read_bytes())
    return path


def made(folder: Path, table: str | None = "gpt", *, kind: str = "ext4") -> Path:
    """A base, and an overlay in which a guest has written an hour ago; gives the overlay."""
    folder.mkdir(exist_ok=True)
    filesystem = folder / "filesystem"
    run("mke2fs", "-q", "-t", kind, filesystem, "4M", clock=time.time() - 2 * HOUR)
    base = disk(folder / "base.raw", filesystem, table)
    run("debugfs", "-w", "-R", "mkdir new", filesystem, clock=time.time() - HOUR)
    now = disk(folder / "now.raw", filesystem, table)
    run("qemu-img", "convert", "-O", "qcow2", base, folder / "base.qcow2")
    words = ("-O", "qcow2", "-B", folder / "base.qcow2", "-F", "qcow2")
    run("qemu-img", "convert", *words, now, folder / "a.qcow2")
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "base.qcow2", folder / "a.qcow2")
    for file in (filesystem, base, now):
        file.unlink()
    return folder / "a.qcow2"


def copied(top: Path, folder: Path) -> Path:
    """Both files copied by cp in one go, the overlay first, as its name comes first."""
    folder.mkdir()
    for name in (top.name, "base.qcow2"):
        shutil.copyfile(top.with_name(name), folder / name)
        time.sleep(0.05)  # more than a tick of the clock that files have
    return folder / top.name


def found(top: Path) -> list[str]:
    return [finding.what for finding in check_chain(top)]


@pytest.mark.parametrize("table", [None, "gpt", "dos"])
def test_a_copy_in_one_go_is_no_changed_base(tmp_path, imgtool_cli, table):
    top = copied(made(tmp_path / "here", table), tmp_path / "there")
    assert top.stat().st_mtime_ns < top.with_name("base.qcow2").stat().st_mtime_ns
    assert found(top) == []
    assert "was changed after it" not in imgtool_cli("info", top).err
    assert imgtool_cli("resize", top, "+1M").status == 0


def test_a_base_that_a_guest_wrote_to_is_changed_all_the_same(tmp_path):
    top = made(tmp_path / "here", None)
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-O", "raw", top.with_name("base.qcow2"), raw)
    run("debugfs", "-w", "-R", "mkdir other", raw, clock=time.time() - HOUR / 2)
    run("qemu-img", "convert", "-O", "qcow2", raw, top.with_name("base.qcow2"))
    assert found(copied(top, tmp_path / "there")) == ["base-newer"]


def test_a_base_that_was_replaced_is_changed(tmp_path):
    top = made(tmp_path / "here", None)
    other = made(tmp_path / "other", None)
    shutil.copyfile(other.with_name("base.qcow2"), top.with_name("base.qcow2"))
    assert found(copied(top, tmp_path / "there")) == ["base-newer"]


def test_a_base_that_was_written_in_its_place_is_changed(tmp_path):
    top = made(tmp_path / "here", None)
    base = top.with_name("base.qcow2")
    subprocess.run(["qemu-io", "-c", "write -P 9 3M 4k", base], check=True, capture_output=True)
    assert found(top) == ["base-newer"]
    again = copied(top, tmp_path / "there")
    base = again.with_name("base.qcow2")
    born = base.stat().st_mtime
    os.utime(base, (born + HOUR, born + HOUR))  # written an hour after it was copied
    assert found(again) == ["base-newer"]


def test_where_nothing_tells_it_is_taken_for_changed(tmp_path):
    top = made(tmp_path / "here", None)
    base = top.with_name("base.qcow2")
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, top
    )  # it is empty
    assert found(copied(top, tmp_path / "there")) == ["base-newer"]
