"""The guests with a real Debian: one partition, LVM, and a chain of overlays on that."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imgtool.host.process import run
from tests.guestmaker import facts
from tests.guestmaker.disks import (
    MIB,
    Slice,
    blank,
    debugfs,
    differences,
    ext,
    pack,
    partition,
    place,
    write_files,
)
from tests.guestmaker.recipe import Recipe
from tests.guestmaker.trees import debian_archive, debian_root

# LVM puts the first extent 1 MiB into the physical volume, and the first volume that is made
# there. So the root filesystem is filled on the host, in seconds instead of a minute.
_ESP, _BOOT, _PV = (
    Slice(1, 64, "esp", "EFI system"),
    Slice(65, 256, "linux", "boot"),
    Slice(321, 3774, "lvm", "lvm"),
)
_ROOT_OFFSET = (_PV.start + 1) * MIB
_ROOT_SIZE = 2304 * MIB
_ROOT_MARK = b"the root volume begins here"

_PLAIN_FSTAB = f"UUID={facts.PLAIN_UUID} / ext4 errors=remount-ro 0 1\n"
_LVM_FSTAB = f"""\
# <file system> <mount point> <type> <options> <dump> <pass>
/dev/mapper/debian--vg-root / ext4 errors=remount-ro 0 1
UUID={facts.BOOT_UUID} /boot ext4 defaults 0 2
UUID={facts.ESP_UUID} /boot/efi vfat umask=0077 0 1
LABEL=home /home xfs defaults 0 0
/dev/mapper/debian--vg-swap none swap sw 0 0
/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
"""


def _prepare_plain(work: Path) -> None:
    tree = debian_root(work / "tree", debian_archive(work.parent), _PLAIN_FSTAB)
    part = Slice(1, 1023)
    disk = blank(work / "plain.raw", 1024 * MIB)
    partition(disk, "dos", [part])
    root = ext(
        work / "root", part.size * MIB, tree, uuid=facts.PLAIN_UUID, label="plain", indexed=True
    )
    place(root, disk, part.start * MIB)


def _prepare_lvm(work: Path) -> None:
    tree = debian_root(work / "tree", debian_archive(work.parent), _LVM_FSTAB)
    for folder in ("boot", "home"):  # what the other filesystems hold
        shutil.move(tree / folder, work / folder)
        (tree / folder).mkdir()
    (work / "boot/efi").mkdir()
    pack(work / "home", work / "home.tar")
    write_files(work / "esp", {"EFI/debian/grubx64.efi": b"not a boot loader\n"})
    pack(work / "esp", work / "esp.tar")

    disk = blank(work / "lvm.raw", facts.LVM_SIZE)
    partition(disk, "gpt", [_ESP, _BOOT, _PV])
    esp = blank(work / "esp.vfat", _ESP.size * MIB)
    run(["mkfs.vfat", "-n", "ESP", "-i", facts.ESP_UUID.replace("-", ""), esp])
    place(esp, disk, _ESP.start * MIB)
    boot = ext(
        work / "boot.ext4", _BOOT.size * MIB, work / "boot", uuid=facts.BOOT_UUID, label="boot"
    )
    place(boot, disk, _BOOT.start * MIB)
    ext(work / "root", _ROOT_SIZE, tree, uuid=facts.ROOT_UUID, label="root", indexed=True)


def _fill_lvm(g: Any, devices: Sequence[str], work: Path) -> None:
    disk = devices[0]
    g.pvcreate(f"{disk}3")
    g.vgcreate("debian-vg", [f"{disk}3"])
    for name, size in (("root", _ROOT_SIZE // MIB), ("home", 512), ("swap", 256)):
        g.lvcreate(name, "debian-vg", size)
    g.pwrite_device("/dev/debian-vg/root", _ROOT_MARK, 0)
    g.mkfs("xfs", "/dev/debian-vg/home", label="home")
    g.set_uuid("/dev/debian-vg/home", facts.HOME_UUID)
    g.mkswap("/dev/debian-vg/swap", label="swap", uuid=facts.SWAP_UUID)
    for device, archive in (("/dev/debian-vg/home", "home.tar"), (f"{disk}1", "esp.tar")):
        g.mount(device, "/")
        g.tar_in(str(work / archive), "/", xattrs=archive == "home.tar")
        g.umount("/")
    g.vg_activate(False, ["debian-vg"])


def _finish_lvm(work: Path) -> None:
    disk = work / "lvm.raw"
    with disk.open("rb") as file:
        file.seek(_ROOT_OFFSET)
        if file.read(len(_ROOT_MARK)) != _ROOT_MARK:
            raise RuntimeError("LVM did not put the root volume at the start of the group")
    place(work / "root", disk, _ROOT_OFFSET)


def _root_of(image: Path, root: Path) -> None:
    """Take the root filesystem out of the LVM guest, as a file."""
    run(
        [
            "qemu-img", "convert", "--image-opts", "-O", "raw",
            f"driver=raw,offset={_ROOT_OFFSET},size={_ROOT_SIZE},"
            "file.driver=qcow2,file.file.driver=file,"
            f"file.file.filename={str(image).replace(',', ',,')}",
            root,
        ]
    )  # fmt: skip


@contextlib.contextmanager
def _one_word(content: bytes) -> Iterator[str]:
    """A file with this content, in /tmp: debugfs and qemu-io split commands at spaces."""
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        file.write(content)
        file.flush()
        yield file.name


def _lay_over(work: Path, base: Path, overlay: Path, added: tuple[str, bytes]) -> None:
    """An overlay on `base` in which one file was added to the root filesystem."""
    _root_of(base, work / "before")
    run(["cp", "--sparse=always", work / "before", work / "after"])
    path, content = added
    with _one_word(content) as source:
        debugfs(work / "after", [f"write {source} {path}"], write=True)
    # The base is named without a folder, so that the chain can be moved as a whole.
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, overlay])
    changed = differences(work / "before", work / "after")
    if not 1 <= len(changed) <= 64:
        raise RuntimeError(f"{len(changed)} changed blocks are not those of one small file")
    for offset, block in changed:
        with _one_word(block) as source:
            command = f"write -s {source} {_ROOT_OFFSET + offset} {len(block)}"
            run(["qemu-io", "-f", "qcow2", "-c", command, overlay])


def _prepare_overlays(work: Path) -> None:
    first, second = work / "overlay1.qcow2", work / "overlay2.qcow2"
    _lay_over(work, work / "lvm.qcow2", first, facts.OVERLAY1_FILE)
    _lay_over(work, first, second, facts.OVERLAY2_FILE)


RECIPES = (
    Recipe("lvm", ("lvm.qcow2",), _prepare_lvm, _fill_lvm, _finish_lvm),
    Recipe("plain", ("plain.raw",), _prepare_plain),
    Recipe("overlay", ("overlay1.qcow2", "overlay2.qcow2"), _prepare_overlays, needs=("lvm",)),
)
