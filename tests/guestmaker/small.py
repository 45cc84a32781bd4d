"""Guests that are small and made on the host alone: data disks, several roots, lies, labels."""

from __future__ import annotations

import os
from pathlib import Path

from tests.guestmaker import facts
from tests.guestmaker.disks import MIB, Slice, blank, ext, partition, place, write_files
from tests.guestmaker.recipe import Recipe
from tests.guestmaker.trees import small_root


def _prepare_data(work: Path) -> None:
    tree = write_files(work / "tree", facts.DATA_FILES)
    ext(work / "data.raw", 64 * MIB, tree, uuid=facts.DATA_UUID, label="data")


def _prepare_twodata(work: Path) -> None:
    parts = [Slice(1, 32, name="photos"), Slice(33, 32, name="backup")]
    disk = blank(work / "twodata.raw", 66 * MIB)
    partition(disk, "gpt", parts)
    photos = write_files(work / "photos", {"/cat.raw": b"cat"})
    backup = write_files(work / "backup", {"/monday.tar": b"monday"})
    first = ext(work / "first", 32 * MIB, photos, uuid=facts.PHOTOS_UUID, label="photos")
    second = ext(
        work / "second", 32 * MIB, backup, uuid=facts.BACKUP_UUID, label="backup", type="ext2"
    )
    place(first, disk, parts[0].start * MIB)
    place(second, disk, parts[1].start * MIB)


def _prepare_twodisk(work: Path) -> None:
    fstab = (
        f"UUID={facts.TWODISK_ROOT_UUID} / ext4 defaults 0 1\n"
        f"UUID={facts.TWODISK_DATA_UUID} /srv ext4 defaults 0 2\n"
    )
    tree = small_root(work / "tree", fstab)
    (tree / "srv").mkdir()
    disk = blank(work / "twodisk-root.raw", 66 * MIB)
    partition(disk, "dos", [Slice(1, 64)])
    place(ext(work / "root", 64 * MIB, tree, uuid=facts.TWODISK_ROOT_UUID), disk, MIB)
    path, content = facts.TWODISK_FILE
    data = write_files(work / "data", {path.removeprefix("/srv"): content})
    ext(work / "twodisk-data.raw", 64 * MIB, data, uuid=facts.TWODISK_DATA_UUID)


def _prepare_multiboot(work: Path) -> None:
    disk = blank(work / "multiboot.raw", 130 * MIB)
    parts = [Slice(1, 64), Slice(65, 64)]
    partition(disk, "gpt", parts)
    for part, uuid, (device, distribution, version, hostname) in zip(
        parts, facts.MULTIBOOT_UUIDS, facts.MULTIBOOT, strict=True
    ):
        tree = small_root(
            work / distribution,
            f"UUID={uuid} / ext4 defaults 0 1\n",
            distribution=distribution,
            version=version,
            hostname=hostname,
        )
        root = ext(work / Path(device).name, part.size * MIB, tree, uuid=uuid, label=distribution)
        place(root, disk, part.start * MIB)


_LIAR_FSTAB = f"""\
# what follows is mostly untrue
UUID={facts.LIAR_UUID} / ext4 defaults 0 1
UUID={facts.LIAR_MISSING_UUID} /missing ext4 defaults 0 2
{facts.LIAR_MISSING_LV} /gone xfs defaults 0 0
/dev/sdz9 /var/lib/none ext4 defaults 0 2
UUID={facts.LIAR_DATA_UUID} {facts.LIAR_DATA_MOUNTPOINT.replace(" ", chr(92) + "040")} ext4 ro 0 2
/home /mnt/home none bind 0 0
server:/export /net nfs defaults 0 0
//server/share /share cifs guest 0 0
tmpfs /tmp tmpfs size=10m 0 0
proc /proc proc defaults 0 0
UUID=
this line is not one
LABEL=nowhere ../../escape ext4 defaults 0 0
UUID={facts.LIAR_DATA_UUID} relative ext4 defaults 0 0
"""


def _prepare_liar(work: Path) -> None:
    tree = small_root(work / "tree", _LIAR_FSTAB)
    (tree / facts.LIAR_DATA_MOUNTPOINT.lstrip("/")).mkdir(parents=True)
    disk = blank(work / "liar.raw", 130 * MIB)
    parts = [Slice(1, 64), Slice(65, 64)]
    partition(disk, "gpt", parts)
    root = ext(work / "root", 64 * MIB, tree, uuid=facts.LIAR_UUID, label="liar")
    truth = write_files(work / "truth", {"/truth.txt": b"this one is real\n"})
    data = ext(work / "data", 64 * MIB, truth, uuid=facts.LIAR_DATA_UUID)
    place(root, disk, parts[0].start * MIB)
    place(data, disk, parts[1].start * MIB)


_FILE_CONTEXTS = """\
/.*	system_u:object_r:default_t:s0
/	-d	system_u:object_r:root_t:s0
/etc(/.*)?	system_u:object_r:etc_t:s0
/usr(/.*)?	system_u:object_r:usr_t:s0
/usr/bin(/.*)?	system_u:object_r:bin_t:s0
/usr/lib(/.*)?	system_u:object_r:lib_t:s0
/var(/.*)?	system_u:object_r:var_t:s0
/home	-d	system_u:object_r:home_root_t:s0
/home/[^/]+	-d	unconfined_u:object_r:user_home_dir_t:s0
/home/[^/]+/.+	unconfined_u:object_r:user_home_t:s0
/etc/shadow	--	system_u:object_r:shadow_t:s0
/etc/hostname	--	system_u:object_r:hostname_etc_t:s0
/usr/bin/bash	--	system_u:object_r:shell_exec_t:s0
"""

# The same policy as the file above gives, for this tree: by the start of the path, last one wins.
_LABELS = (
    ("", "system_u:object_r:default_t:s0"),
    ("etc", "system_u:object_r:etc_t:s0"),
    ("usr", "system_u:object_r:usr_t:s0"),
    ("usr/bin", "system_u:object_r:bin_t:s0"),
    ("usr/lib", "system_u:object_r:lib_t:s0"),
    ("var", "system_u:object_r:var_t:s0"),
    ("home", "system_u:object_r:home_root_t:s0"),
    ("home/alice", "unconfined_u:object_r:user_home_t:s0"),
)


def _set_label(path: Path, label: str) -> None:
    os.setxattr(path, "security.selinux", label.encode() + b"\0", follow_symlinks=False)


def _prepare_selinux(work: Path) -> None:
    tree = small_root(
        work / "tree",
        f"UUID={facts.SELINUX_UUID} / ext4 defaults 0 1\n",
        distribution="fedora",
        version="40",
        files={
            "etc/selinux/config": "SELINUX=enforcing\nSELINUXTYPE=targeted\n",
            "etc/selinux/targeted/contexts/files/file_contexts": _FILE_CONTEXTS,
        },
    )
    (tree / "srv/www").mkdir(parents=True)
    for path in tree.rglob("*"):
        inside = path.relative_to(tree)
        _set_label(path, [label for start, label in _LABELS if inside.is_relative_to(start)][-1])
    for name, label in facts.SELINUX_LABELS.items():
        _set_label(tree / name.lstrip("/"), label)
    _set_label(tree, "system_u:object_r:root_t:s0")
    disk = blank(work / "selinux.raw", 66 * MIB)
    partition(disk, "gpt", [Slice(1, 64)])
    place(ext(work / "root", 64 * MIB, tree, uuid=facts.SELINUX_UUID, label="root"), disk, MIB)


RECIPES = (
    Recipe("data", ("data.qcow2",), _prepare_data),
    Recipe("twodata", ("twodata.qcow2",), _prepare_twodata),
    Recipe("twodisk", ("twodisk-root.raw", "twodisk-data.raw"), _prepare_twodisk),
    Recipe("multiboot", ("multiboot.qcow2",), _prepare_multiboot),
    Recipe("liar", ("liar.qcow2",), _prepare_liar),
    Recipe("selinux", ("selinux.qcow2",), _prepare_selinux),
)
