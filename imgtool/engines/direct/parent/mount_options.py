"""Mount options that a user gives with `-m`, as far as they are followed without the appliance."""

from __future__ import annotations

from collections.abc import Sequence

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.guest.model import Mount

# Of ext and XFS: the journal, or the log, is left alone, and what is there is read as it is.
_UNREPLAYED = {"noload", "norecovery"}
_TYPES = ("", "ext2", "ext3", "ext4", "xfs")


def unreplayed_devices(mounts: Sequence[Mount]) -> list[str]:
    """The devices that are to be read without what is in their journals.

    Raises `Unsupported` for every other option, and for a type that is given.
    """
    found = []
    for mount in mounts:
        options = set(mount.options.split(",")) - {"", "ro"}
        if options - _UNREPLAYED or (mount.fstype or "") not in _TYPES:
            raise Unsupported("mount options are given")
        if options:
            found.append(mount.source)
    return found
