"""What to do about a filesystem that has errors, or cannot be written to."""

from __future__ import annotations

from imgtool.errors import Reason, RefusedError
from imgtool.text import typed

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


# With what the kernel shows a filesystem without its journal, or log, having been replayed.
_UNREPLAYED = {
    **dict.fromkeys(("ext3", "ext4"), "noload"),
    **dict.fromkeys(("xfs", "f2fs"), "norecovery"),
    "btrfs": "rescue=nologreplay",
}


def keeps_journal(type: str | None) -> bool:
    """Whether a filesystem of this type may have a journal to replay."""
    return type in _UNREPLAYED


def needs_replay(device: str, mountpoint: str, type: str) -> RefusedError:
    """The refusal to show a filesystem read-only, among others that are written to, of which the
    journal would be written out first.
    """
    return RefusedError(
        "it is to be shown read-only, and the kernel would replay its journal, which writes to it",
        subject=device,
        hint="without what is in the journal: -m "
        + typed(f"{device}:{mountpoint}:ro,{_UNREPLAYED[type]}"),
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
