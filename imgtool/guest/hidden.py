"""What to say to who would write where a filesystem of the guest belongs that is not shown."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from imgtool.errors import Reason, RefusedError


def hidden_mount(mountpoint: str, why: str) -> RefusedError:
    """The refusal: what is written to the folder itself lies hidden as soon as the guest mounts
    there what it mounts."""
    return RefusedError(
        f"its filesystem is not shown, so what is written there would lie hidden below it: {why}",
        subject=mountpoint,
        hint="show it: give the --key of an encrypted device, -A for a further disk, or -m",
        reason=Reason.HIDDEN_MOUNT,
    )


def refuse_hidden(
    unshown: Mapping[str, str], optional: Container[str], notice: Callable[[str], None]
) -> None:
    """Raise `RefusedError` where all of a guest is to be written to, and not all of it is shown.

    Without what is `optional` the guest works too: of that there is a notice.
    """
    for mountpoint, why in unshown.items():
        if mountpoint not in optional:
            raise hidden_mount(mountpoint, why)
        notice(f"{mountpoint} is not shown: {why}; what is written there would lie hidden below it")
