"""What people type who come from other tools, and what does it here."""

from __future__ import annotations

_MEANT = {
    "cp": "imgtool copy-out (from the guest), imgtool copy-in (into it)",
    "get": "imgtool copy-out",
    "put": "imgtool copy-in",
    "mv": "imgtool copy-out, imgtool copy-in, imgtool rm",
    "download": "imgtool copy-out",
    "upload": "imgtool copy-in",
    "tar-out": "imgtool copy-out IMAGE SRC -",
    "tar-in": "imgtool copy-in IMAGE - DEST",
    "commit": "imgtool overlay commit",
    "blockcommit": "imgtool overlay commit",
    "rebase": "imgtool overlay rebase",
    "flatten": "imgtool overlay flatten",
    "blockpull": "imgtool overlay flatten",
    "clone": "imgtool overlay create",
    "branch": "imgtool overlay create",
    "tree": "imgtool chain tree, imgtool ls -R",
    "snapshots": "imgtool snapshot list",
    "revert": "imgtool snapshot revert",
    "fsck": "imgtool check (the image itself)",
    "repair": "imgtool check --repair",
    "list": "imgtool ls, imgtool filesystems",
    "ll": "imgtool ls -l",
    "dir": "imgtool ls",
    "grep": "imgtool find --grep PATTERN",
    "less": "imgtool cat ... | less",
    "more": "imgtool cat ... | less",
    "delete": "imgtool rm",
    "unlink": "imgtool rm",
    "unmount": "imgtool umount",
    "guestunmount": "imgtool umount",
    "guestmount": "imgtool mount",
    "passwd": "imgtool inject --password USER:prompt",
    "fdisk": "imgtool partitions",
    "parted": "imgtool partitions",
    "kpartx": "imgtool partitions, imgtool mount",
    "nbd": "imgtool mount --via nbd",
    "lsblk": "imgtool filesystems --all",
    "blkid": "imgtool filesystems",
    "mounted": "imgtool mounts",
    "sparsify": "imgtool compact",
    "shrink": "imgtool resize --shrink, imgtool compact",
    "packages": "imgtool inspect --packages",
    "customize": "imgtool inject",
    "sysprep": "imgtool inject",
    "builder": "imgtool create, imgtool inject",
    "ls-lr": "imgtool ls -lR",
    "inspector": "imgtool inspect",
    "get-kernel": "imgtool copy-out IMAGE '/boot/vmlinuz*' DEST",
    "make-fs": "imgtool create",
    "rescue": "imgtool mount, imgtool edit",
    "version": "imgtool --version",
}


def meant(name: str, commands: frozenset[str]) -> str | None:
    """What does what a command of another tool does, for a hint; None where nothing is known.

    The virt tools are known by their names, `virt-df` as `df`.
    """
    for prefix in ("virt-", "guestfish-"):
        name = name.removeprefix(prefix)
    return _MEANT.get(name) or (f"imgtool {name}" if name in commands else None)
