"""What tests may rely on in the virtual machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm.inside.machine import (
    MIB,
    loop_device,
    mounted,
    nbd_device,
    partition,
    run,
    settle,
    sparse,
    wait_until,
)

MODULES = ("nbd", "dm-mod", "dm-snapshot", "loop", "vfat", "exfat", "xfs", "btrfs", "fuse")


@pytest.mark.parametrize("module", MODULES)
def test_the_kernel_has_the_module(module: str) -> None:
    run("modprobe", module)
    assert Path("/sys/module", module.replace("-", "_")).is_dir()


# The NTFS driver of the kernel is not among them: Debian 12 builds none.
@pytest.mark.parametrize("kind", ["ext4", "vfat", "exfat", "xfs", "btrfs"])
def test_the_kernel_mounts_the_filesystem(kind: str, tmp_path: Path) -> None:
    image = sparse(tmp_path / "image", 320 * MIB)
    run(f"mkfs.{kind}", image)
    with mounted(image, tmp_path / "mounted", "-t", kind, "-o", "loop") as folder:
        (folder / "file").write_text("content")
    with mounted(image, tmp_path / "again", "-t", kind, "-o", "loop,ro") as folder:
        assert (folder / "file").read_text() == "content"


def test_ntfs_3g_mounts_ntfs(tmp_path: Path) -> None:
    image = sparse(tmp_path / "image", 32 * MIB)
    run("mkfs.ntfs", "--quick", "--force", image)
    with mounted(image, tmp_path / "mounted", "-t", "ntfs-3g", "-o", "loop") as folder:
        (folder / "file").write_text("content")
        assert (folder / "file").read_text() == "content"


def test_nbd_shows_the_partitions_of_a_qcow2(tmp_path: Path) -> None:
    raw, image = sparse(tmp_path / "disk.raw", 64 * MIB), tmp_path / "disk.qcow2"
    partition(raw, "gpt", "16MiB", "+")
    run("qemu-img", "convert", "-O", "qcow2", raw, image)
    with nbd_device(image, "--read-only") as device:
        wait_until(Path(f"{device}p2").is_block_device, f"{device}p2")
        assert Path("/sys/block/nbd0/nbd0p1/size").read_text().strip() == str(16 * MIB // 512)
        assert Path("/sys/block/nbd0/ro").read_text().strip() == "1"
    assert not Path(f"{device}p1").exists()


def test_loop_devices_show_partitions(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.raw", 64 * MIB)
    partition(disk, "dos", "16MiB", "+")
    with loop_device(disk, "--partscan") as device:
        wait_until(Path(f"{device}p2").is_block_device, f"{device}p2")


def test_kpartx_adds_and_removes_mappings(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.raw", 64 * MIB)
    partition(disk, "gpt", "16MiB", "+")
    run("modprobe", "dm-mod")
    assert Path("/dev/mapper/control").is_char_device()
    mapped = [line.split()[2] for line in run("kpartx", "-asv", disk).splitlines()]
    assert len(mapped) == 2
    for name in mapped:
        assert Path("/dev/mapper", name).is_block_device()
    run("kpartx", "-dsv", disk)
    for name in mapped:
        assert not Path("/dev/mapper", name).exists()
    assert run("losetup", "--associated", disk) == ""


def make_group(device: str, name: str, *options: str) -> None:
    """A volume group on the device, and in it the volume `a-b`, not active."""
    only = ("--devicesfile", "", "--devices", device)
    run("pvcreate", *only, device)
    run("vgcreate", *only, *options, name, device)
    run("lvcreate", *only, "-an", "--zero", "n", "--size", "16M", "--name", "a-b", name)
    settle()


def test_lvm_activates_a_group_on_a_named_device(tmp_path: Path) -> None:
    with loop_device(sparse(tmp_path / "pv", 64 * MIB)) as device:
        make_group(device, "asked", "--setautoactivation", "n")
        assert not Path("/dev/mapper/asked-a--b").exists()
        only = ("--devicesfile", "", "--devices", device)
        run("vgchange", "-ay", *only, "asked")
        try:
            assert Path("/dev/asked/a-b").is_block_device()
            assert Path("/dev/mapper/asked-a--b").is_block_device()
        finally:
            run("vgchange", "-an", *only, "asked")
        assert not Path("/dev/mapper/asked-a--b").exists()


def test_udev_activates_a_group_unasked(tmp_path: Path) -> None:
    """As on every host with lvm2: a guest's group becomes active when its disk is attached."""
    disk = sparse(tmp_path / "pv", 64 * MIB)
    with loop_device(disk) as device:
        make_group(device, "unasked")
        run("vgchange", "-an", "unasked")
        settle()
    with loop_device(disk):
        wait_until(Path("/dev/unasked/a-b").is_block_device, "/dev/unasked/a-b")
        run("vgchange", "-an", "unasked")


def test_the_storage_daemon_exports_through_fuse(tmp_path: Path) -> None:
    image, export = tmp_path / "disk.qcow2", sparse(tmp_path / "export", 0)
    run("qemu-img", "create", "-f", "qcow2", image, "8M")
    daemon = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", f"file,node-name=file,filename={image}"),
            *("--blockdev", "qcow2,node-name=disk,file=file"),
            *("--export", f"fuse,id=export,node-name=disk,mountpoint={export}"),
        ]
    )
    try:
        wait_until(lambda: export.stat().st_size == 8 * MIB, "the export")
        with loop_device(export, "--read-only") as device:
            assert run("blockdev", "--getsize64", device).strip() == str(8 * MIB)
    finally:
        daemon.terminate()
        assert daemon.wait(60) == 0


def test_imgtool_reads_an_image(tmp_path: Path) -> None:
    """Its sandbox needs a root that is no chroot, and user namespaces."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_text("hello\n")
    image = sparse(tmp_path / "image.raw", 16 * MIB)
    run("mkfs.ext4", "-q", "-d", tree, image)
    assert (
        run(sys.executable, "-m", "imgtool", "cat", "--engine=direct", image, "/hello") == "hello\n"
    )


def test_only_shared_folders_keep_what_is_written() -> None:
    repository = Path(__file__).parents[3]
    with contextlib.suppress(OSError):
        (repository / "written-in-the-vm").touch()
        pytest.fail("the repository is not read-only")
    for folder in ("/", "/etc", "/usr", "/var", "/mnt", "/tmp", "/run"):
        assert os.stat(folder).st_dev != repository.stat().st_dev
        Path(folder, "written-in-the-vm").touch()
