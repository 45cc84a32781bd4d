"""What to do about a filesystem that has errors, or cannot be written to."""

from __future__ import annotations

from imgtool.errors import Reason, RefusedError

# What is made once, and has no way of being changed; as kernels and libblkid call it.
FOR_READING = frozenset(("squashfs", "erofs", "iso9660", "cramfs", "romfs"))


def refuse_only_read(device: str, mountpoint: str, type: str | None) -> None:
    """Raise `RefusedError` for what can only be read though it was to be written to.

    Not for what is so by its nature, as long as it is not the root.
    """
    if type not in FOR_READING:
        raise RefusedError(
            "its filesystem can only be read: it is hibernated, or damaged",
            subject=device,
            hint="shut the guest down properly (Windows: without fast start-up), or check it",
        )
    if mountpoint == "/":
        raise RefusedError(
            f"its filesystem is of a kind that can only be read ({type})",
            subject=device,
            hint="mount it without --rw, or copy its files out and make a new one of them",
        )


def mending(device: str, type: str | None) -> str:
    """How a filesystem of an image of any format is mended in a copy, in words for a hint."""
    if type in ("ext2", "ext3", "ext4"):
        return (
            f"mend it in a copy: cp IMAGE COPY, then guestfish -a COPY run : e2fsck {device}"
            " forceall:true"
        )
    return "have its guest check it, in a copy of the image"


def has_errors(device: str) -> RefusedError:
    """The refusal to write to an ext filesystem that says of itself that it has errors."""
    return RefusedError(
        "its filesystem says that it has errors, so it is not written to",
        subject=device,
        hint=mending(device, "ext4"),
        reason=Reason.DAMAGED,
    )
