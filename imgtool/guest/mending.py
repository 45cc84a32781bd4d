"""What to do about a filesystem that says of itself that it has errors."""

from __future__ import annotations

from imgtool.errors import Reason, RefusedError


def has_errors(device: str) -> RefusedError:
    """The refusal to write to an ext filesystem with errors; what is written could be lost in them.

    Its hint works for an image of any format, and leaves the image itself alone.
    """
    return RefusedError(
        "its filesystem says that it has errors, so it is not written to",
        subject=device,
        hint=f"mend it in a copy: cp IMAGE COPY, then guestfish -a COPY run : e2fsck {device}"
        " forceall:true",
        reason=Reason.DAMAGED,
    )
