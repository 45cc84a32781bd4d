"""What people type who come from other tools, and what does it here."""

from __future__ import annotations

from collections.abc import Container, Sequence

OTHER_NAMES = {
    "cp": (
        "copy-out",
        "copy-in",
    ),
    "get": ("copy-out",),
    "put": ("copy-in",),
    "mv": (
        "copy-out",
        "copy-in",
        "rm",
    ),
    "download": ("copy-out",),
    "upload": ("copy-in",),
    "tar-out": ("copy-out IMAGE SRC -",),
    "tar-in": ("copy-in IMAGE - DEST",),
    "commit": ("overlay commit",),
    "blockcommit": ("overlay commit",),
    "rebase": ("overlay rebase",),
    "flatten": ("overlay flatten",),
    "blockpull": ("overlay flatten",),
    "clone": ("overlay create",),
    "branch": ("overlay create",),
    "tree": (
        "chain tree",
        "ls -R",
    ),
    "snapshots": ("snapshot list",),
    "revert": ("snapshot revert",),
    "fsck": ("check",),
    "repair": ("check --repair",),
    "list": (
        "ls",
        "filesystems",
    ),
    "ll": ("ls -l",),
    "dir": ("ls",),
    "grep": ("find --grep PATTERN",),
    "less": ("cat",),
    "more": ("cat",),
    "delete": ("rm",),
    "unlink": ("rm",),
    "unmount": ("umount",),
    "guestunmount": ("umount",),
    "guestmount": ("mount",),
    "passwd": ("inject --password USER:prompt",),
    "fdisk": ("partitions",),
    "parted": ("partitions",),
    "kpartx": (
        "partitions",
        "mount",
    ),
    "nbd": ("mount --via nbd",),
    "lsblk": ("filesystems --all",),
    "blkid": ("filesystems",),
    "mounted": ("mounts",),
    "sparsify": ("compact",),
    "shrink": (
        "resize --shrink",
        "compact",
    ),
    "packages": ("inspect --packages",),
    "customize": ("inject",),
    "sysprep": ("inject",),
    "builder": (
        "create",
        "inject",
    ),
    "ls-lr": ("ls -lR",),
    "inspector": ("inspect",),
    "get-kernel": ("copy-out IMAGE /boot/... DEST",),
    "make-fs": ("create",),
    "rescue": (
        "mount",
        "edit",
    ),
    "version": ("--version",),
    "password": ("inject --password USER:prompt",),
    "overlay merge": ("overlay commit",),
    "chain merge": ("overlay commit",),
    "chain commit": ("overlay commit",),
    "chain rebase": ("overlay rebase",),
    "chain flatten": ("overlay flatten",),
    "snapshot apply": ("snapshot revert",),
    "snapshot restore": ("snapshot revert",),
    "snapshot rollback": ("snapshot revert",),
    "snapshot make": ("snapshot create",),
    "snapshot add": ("snapshot create",),
    "snapshot take": ("snapshot create",),
    "snapshot create-as": ("snapshot create",),
    "snapshot remove": ("snapshot delete",),
    "snapshot rm": ("snapshot delete",),
    "overlay add": ("overlay create",),
    "overlay new": ("overlay create",),
}


def meant(above: Sequence[str], name: str, commands: Container[str]) -> str | None:
    """What does what a command of another tool does, for a sentence; None where nothing is known.

    `above` is the group in which it was looked for, if it was one, and `commands` are what is
    there. The virt tools are known by their names, `virt-df` as `df`.
    """
    if not above:
        name = name.removeprefix("virt-")
    found = OTHER_NAMES.get(" ".join([*above, name]))
    if found is None and not above and name in commands:
        found = (name,)
    return None if found is None else " or ".join(f"'imgtool {one}'" for one in found)
