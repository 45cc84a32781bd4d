"""imgtool: look into, copy out of, and safely change the disks of guests that are not running.

from imgtool import open_guest
with open_guest("disk.qcow2") as guest:
    for entry in guest.walk("/etc"):
        print(entry.path, entry.size)
    data = guest.read_bytes("/etc/hostname")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest as Guest
    from imgtool.opening import open_guest as open_guest

__version__ = "0.2.0"
__all__ = ["Guest", "open_guest"]


def __getattr__(name: str) -> object:
    # Loaded at the first use: the command line's help needs neither.
    if name == "open_guest":
        from imgtool.opening import open_guest

        return open_guest
    if name == "Guest":
        from imgtool.guest.guest import Guest

        return Guest
    raise AttributeError(name)
