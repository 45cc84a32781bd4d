"""Whether a Linux guest sleeps: its memory is in its swap, and with it what it knows of its disks.

When such a guest wakes up it goes on with its own idea of every filesystem that was mounted, and
writes that over what was written meanwhile. Windows says so in its filesystem, and ntfs-3g mounts
that for reading only (`soundness`); Linux says so in the swap alone.

Source: the kernel's kernel/power/swap.c, which puts HIBERNATE_SIG in the place of the signature of
swap at the end of its first page; libblkid, which calls such a device `swsuspend`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from imgtool.engines.libguestfs.volumes import ApplianceVolume
from imgtool.errors import RefusedError
from imgtool.guest.blocks import Block

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest import LibguestfsGuest

SLEEPS = "swsuspend"
# Of the kernel's own hibernation, and of uswsusp and TuxOnIce.
_SIGNATURES = (
    *(b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001"),
    b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",
)
_PAGES = (4096, 8192, 16384, 32768, 65536)
_FROM_END = 10
# Files that installers make; others are in fstab.
_USUAL = ("/swapfile", "/swap.img")
_MOST = 8


def is_asleep(start: bytes) -> bool:
    """Whether swap that begins with these bytes holds the memory of a guest that sleeps."""
    return any(start.startswith(_SIGNATURES, page - _FROM_END) for page in _PAGES)


def swap_files(fstab: bytes) -> Iterator[str]:
    """The files that are swap by an fstab."""
    for line in fstab.decode("utf-8", "replace").splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "swap" and re.match(r"/(?!dev/)", fields[0]):
            yield fields[0]


def refuse_sleeping_devices(blocks: Sequence[Block]) -> None:
    """Raise `RefusedError` if one of the guest's devices has the memory of a guest that sleeps."""
    for block in blocks:
        if block.type == SLEEPS:
            raise _sleeps(block.device)


def refuse_sleeping_files(guest: LibguestfsGuest) -> None:
    """The same for swap in a file, once the layout is mounted."""
    root = ApplianceVolume(guest.handle, guest.calls)
    listed = list(swap_files(root.read("/etc/fstab") or b""))[:_MOST]
    for path in dict.fromkeys((*_USUAL, *listed)):
        start = root.read(path, max(_PAGES))
        if start is not None and is_asleep(start):
            raise _sleeps(path)


def _sleeps(subject: str) -> RefusedError:
    return RefusedError(
        "the guest is hibernated: when it wakes up, it would undo or damage what is written now",
        subject=subject,
        hint="start it and shut it down properly; or give its session up with "
        "mkswap on this swap, on a copy of the image",
    )
