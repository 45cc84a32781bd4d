"""The test guests: `guest("lvm")` is the path of an image, built at the first call if need be.

What is in them are the constants of `tests.guestmaker.facts`, which are here too:
`from tests.support.guests import LETTER, guest`.

    plain              raw, MBR, one ext4 with a real Debian 12
    lvm                qcow2, GPT: ESP, /boot, LVM with ext4 root (Debian 12), XFS home, swap
    overlay1 overlay2  qcow2 overlays on lvm and on each other, each adds a file to /etc
    btrfs              qcow2, GPT, subvolumes @ and @home
    md                 two raw disks (md-1, md-2), RAID1, LVM on it
    luks               qcow2, LVM in LUKS2; luks1-in-lvm: LUKS1 in LVM
    windows            qcow2, MBR, NTFS with registry hives
    selinux            qcow2, a labelled root of the Fedora kind
    multiboot          qcow2, two operating systems
    liar               qcow2, a good root whose fstab lies
    twodisk            two raw disks (twodisk-root, twodisk-data), the second is /srv
    data twodata       qcow2, no operating system: one filesystem, two filesystems
    awkward many       qcow2: hostile names, links, devices, a sparse file; 50,000 names
    blank empty        raw: 64 MiB of zeros, a file of no bytes
    nofs damaged       qcow2: filesystems that do not mount, files that cannot be read
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from tests.guestmaker.build import default_cache, find, folder
from tests.guestmaker.facts import *  # noqa: F403

_MAKE_GUESTS = Path(__file__).resolve().parents[2] / "scripts/make-guests"


@cache
def _built(name: str) -> Path:
    target = folder(default_cache())
    if not all((target / file).exists() for file in find(name).files):
        subprocess.run([_MAKE_GUESTS, "--dir", default_cache(), name], check=True, stdout=2)
    return target


def disks(name: str) -> tuple[Path, ...]:
    """All image files of a guest, the first disk first."""
    return tuple(_built(name) / file for file in find(name).files)


def guest(name: str) -> Path:
    """The image file `name` (`lvm`, `md-2`, `empty`), or the first disk of the guest `name`.

    Images are shared by all tests and must not be written: copy first.
    """
    paths = disks(name)
    return next((path for path in paths if name in (path.name, path.stem)), paths[0])
