"""Which package of Debian and Ubuntu has what is missing, as the command to type."""

from __future__ import annotations

import sys
from pathlib import Path

# By the program that is in it.
PACKAGES = {
    "bwrap": "bubblewrap",
    "cryptsetup": "cryptsetup-bin",
    "debugfs": "e2fsprogs",
    "dmsetup": "dmsetup",
    "e2fsck": "e2fsprogs",
    "fusermount": "fuse3",
    "fusermount3": "fuse3",
    "kpartx": "kpartx",
    "lvm": "lvm2",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils qemu-system-common",  # of the first from Debian 13 on
    "supermin": "supermin",
    "unshare": "util-linux",
    "vgchange": "lvm2",
}


def install(package: str) -> str:
    """The command that installs a package."""
    return f"sudo apt-get install {package}"


def install_program(program: str) -> str:
    """How a program comes onto this machine."""
    package = PACKAGES.get(Path(program).name)
    return install(package) if package else "'imgtool doctor' says which package has it"


def binding_fix(package: str, prefix: Path = Path("/usr")) -> str:
    """How a module that Debian has in a package is found by this Python."""
    if Path(sys.base_prefix) != prefix:
        return f"it is for /usr/bin/python3 only: {_NEW_ENVIRONMENT}"
    if not any(folder.endswith("dist-packages") for folder in sys.path):
        return f"this virtual environment does not see it: {_NEW_ENVIRONMENT}"
    return install(package)


_NEW_ENVIRONMENT = (
    "make the environment with /usr/bin/python3 -m venv --system-site-packages FOLDER, "
    "and install imgtool in it"
)
