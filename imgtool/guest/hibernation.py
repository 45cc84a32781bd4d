"""Whether a Linux guest sleeps: its memory is in its swap, and with it what it knows of its disks.

When such a guest wakes up it goes on with its own idea of every filesystem that was mounted, and
writes that over what was written meanwhile. Windows says so in its filesystem, and ntfs-3g mounts
that for reading only (`soundness`); Linux says so in the swap alone.

Source: the kernel's kernel/power/swap.c, which puts HIBERNATE_SIG in the place of the signature of
swap at the end of its first page; libblkid, which calls such a device `swsuspend`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from imgtool.errors import Reason, RefusedError
from imgtool.guest.blocks import Block
from imgtool.guest.layout import LAYOUT_FILE_LIMIT
from imgtool.guest.model import Device

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


def refuse_sleeping_devices(devices: Iterable[Block] | Iterable[Device]) -> None:
    """Raise `RefusedError` if one of the guest's devices has the memory of a guest that sleeps."""
    for one in devices:
        if one.type == SLEEPS:
            raise _sleeps(one.device)


def refuse_sleeping_files(read: Callable[[str, int], bytes | None]) -> None:
    """The same for swap in a file. `read` gives the first so many bytes of a file of the guest, of
    which the layout is mounted; None where there is none."""
    listed = list(swap_files(read("/etc/fstab", LAYOUT_FILE_LIMIT) or b""))[:_MOST]
    for path in dict.fromkeys((*_USUAL, *listed)):
        start = read(path, max(_PAGES))
        if start is not None and is_asleep(start):
            raise _sleeps(path)


def _sleeps(subject: str) -> RefusedError:
    return RefusedError(
        "the guest is hibernated: when it wakes up, it would undo or damage what is written now",
        subject=subject,
        hint="start it and shut it down properly",
        reason=Reason.HIBERNATED,
    )
