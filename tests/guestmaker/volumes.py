"""Guests on btrfs subvolumes, RAID and encrypted volumes, each with a small root."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgtool.host.process import run
from tests.guestmaker import facts
from tests.guestmaker.disks import MIB, Slice, blank, pack, partition, place
from tests.guestmaker.recipe import Recipe
from tests.guestmaker.trees import small_root

_CRYPT_PARTITION = Slice(1, 128)
_BTRFS_PARTITION = Slice(2, 200)


def _unpack(g: Any, archive: Path) -> None:
    """Fill what is mounted at / and take it off again."""
    g.tar_in(str(archive), "/", xattrs=True)
    g.umount_all()


def _prepare_btrfs(work: Path) -> None:
    fstab = (
        f"UUID={facts.BTRFS_UUID} / btrfs defaults,subvol=@ 0 0\n"
        f"UUID={facts.BTRFS_UUID} /home btrfs defaults,subvol=@home 0 0\n"
    )
    tree = small_root(work / "tree", fstab)
    shutil.move(tree / "home", work / "home")
    (tree / "home").mkdir()
    pack(tree, work / "root.tar")
    pack(work / "home", work / "home.tar")
    disk = blank(work / "btrfs.raw", 204 * MIB)
    partition(disk, "gpt", [Slice(1, 1, "bios"), _BTRFS_PARTITION])
    empty = blank(work / "btrfs", _BTRFS_PARTITION.size * MIB)
    run(["mkfs.btrfs", "-q", "-L", "btrfs", "-U", facts.BTRFS_UUID, empty])
    place(empty, disk, _BTRFS_PARTITION.start * MIB)


def _fill_btrfs(g: Any, devices: Sequence[str], work: Path) -> None:
    device = f"{devices[0]}2"
    g.mount(device, "/")
    g.btrfs_subvolume_create("/@")
    g.btrfs_subvolume_create("/@home")
    g.umount("/")
    for subvolume, archive in (("@", "root.tar"), ("@home", "home.tar")):
        g.mount_options(f"subvol={subvolume}", device, "/")
        _unpack(g, work / archive)


def _root_on_volume(g: Any, physical: str, group: str, work: Path) -> None:
    """LVM on `physical` with the small root on it."""
    g.pvcreate(physical)
    g.vgcreate(group, [physical])
    g.lvcreate("root", group, 64)
    volume = f"/dev/{group}/root"
    g.mke2fs(volume, fstype="ext4", label="root")
    g.mount(volume, "/")
    _unpack(g, work / "root.tar")
    g.vg_activate(False, [group])


def _root_tar(work: Path, source: str, crypttab: str = "") -> None:
    fstab = f"{source} / ext4 defaults 0 1\n"
    files = {"etc/crypttab": crypttab} if crypttab else None
    pack(small_root(work / "tree", fstab, files=files), work / "root.tar")


def _prepare_md(work: Path) -> None:
    _root_tar(work, "/dev/mapper/md--vg-root")
    for disk in ("md-1.raw", "md-2.raw"):
        blank(work / disk, 96 * MIB)


def _fill_md(g: Any, devices: Sequence[str], work: Path) -> None:
    before = set(g.list_md_devices())
    g.md_create("guest", list(devices), level="raid1")
    (array,) = set(g.list_md_devices()) - before
    _root_on_volume(g, array, facts.MD_VG, work)
    # The first copy from disk to disk has to end, or the guest is for ever a degraded one.
    g.debug("sh", [f"mdadm --wait {array} || true"])
    g.md_stop(array)


def _luks(volume: Path, *options: str) -> None:
    # As cheap a key derivation as there is: what is tested is not the passphrase's strength.
    run(
        [
            "cryptsetup", "luksFormat", "--batch-mode", *options,
            "--pbkdf-force-iterations", "1000", "--key-file", "-", volume,
        ],
        input=facts.PASSPHRASE.encode(),
    )  # fmt: skip


def _prepare_luks(work: Path) -> None:
    _root_tar(work, "/dev/mapper/luks--vg-root", f"vda1_crypt UUID={facts.LUKS_UUID} none luks\n")
    disk = blank(work / "luks.raw", (_CRYPT_PARTITION.start + _CRYPT_PARTITION.size + 1) * MIB)
    partition(disk, "gpt", [_CRYPT_PARTITION])
    volume = blank(work / "volume", _CRYPT_PARTITION.size * MIB)
    _luks(volume, "--type", "luks2", "--uuid", facts.LUKS_UUID, "--pbkdf", "pbkdf2")
    place(volume, disk, _CRYPT_PARTITION.start * MIB)


def _fill_luks(g: Any, devices: Sequence[str], work: Path) -> None:
    g.cryptsetup_open(f"{devices[0]}1", facts.PASSPHRASE, "luks")
    _root_on_volume(g, "/dev/mapper/luks", facts.LUKS_VG, work)
    g.cryptsetup_close("/dev/mapper/luks")


def _prepare_luks1(work: Path) -> None:
    _root_tar(work, "/dev/mapper/root_crypt", "root_crypt /dev/outer-vg/crypt none luks\n")
    disk = blank(work / "luks1-in-lvm.raw", 130 * MIB)
    partition(disk, "gpt", [Slice(1, 128, "lvm")])
    _luks(blank(work / "luks1.volume", 64 * MIB), "--type", "luks1", "--uuid", facts.LUKS1_UUID)


def _fill_luks1(g: Any, devices: Sequence[str], work: Path) -> None:
    disk, prepared = devices
    g.pvcreate(f"{disk}1")
    g.vgcreate(facts.LUKS1_VG, [f"{disk}1"])
    g.lvcreate("crypt", facts.LUKS1_VG, 64)
    volume = f"/dev/{facts.LUKS1_VG}/crypt"
    g.copy_device_to_device(prepared, volume)
    g.cryptsetup_open(volume, facts.PASSPHRASE, "luks1")
    g.mke2fs("/dev/mapper/luks1", fstype="ext4", label="root")
    g.mount("/dev/mapper/luks1", "/")
    _unpack(g, work / "root.tar")
    g.cryptsetup_close("/dev/mapper/luks1")
    g.vg_activate(False, [facts.LUKS1_VG])


RECIPES = (
    Recipe("btrfs", ("btrfs.qcow2",), _prepare_btrfs, _fill_btrfs),
    Recipe("md", ("md-1.raw", "md-2.raw"), _prepare_md, _fill_md),
    Recipe("luks", ("luks.qcow2",), _prepare_luks, _fill_luks),
    Recipe(
        "luks1-in-lvm",
        ("luks1-in-lvm.qcow2",),
        _prepare_luks1,
        _fill_luks1,
        helpers=("luks1.volume",),
    ),
)
