"""What to do about a filesystem that has errors."""

from __future__ import annotations

from imgtool.errors import Reason, RefusedError


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
