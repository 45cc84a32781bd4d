"""What mechanisms need of this machine: each `Need` gives why it cannot be had, in one line, or
None if it can.

With `load` the kernel's module is loaded where it is not; without it, it only has to be there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from imgtool.errors import HostError
from imgtool.host.process import Limits, find, run
from imgtool.host.system_packages import binding_fix, install_program


class Need(Protocol):
    """One thing that a mechanism needs."""

    def __call__(self, *, load: bool) -> str | None:
        """Why it cannot be had; None if it can."""


def _modprobe(module: str, *options: str) -> bool:
    try:
        run(["modprobe", "--quiet", *options, module], limits=Limits(wall=30))
    except HostError:
        return False
    return True


def _no_module(module: str, what: str, there: Callable[[], bool], load: bool) -> str | None:
    if there():
        return None
    if _modprobe(module) and there() if load else _modprobe(module, "--dry-run"):
        return None
    return f"the kernel has no {what} (modprobe {module})"


def no_loop(*, load: bool) -> str | None:
    """Loop devices."""
    return _no_module("loop", "loop devices", Path("/dev/loop-control").exists, load)


def no_fuse(*, load: bool) -> str | None:
    """FUSE."""
    return _no_module("fuse", "FUSE", Path("/dev/fuse").exists, load)


def no_device_mapper(*, load: bool = True) -> str | None:
    """Device-mapper, and the program that controls it."""

    def there() -> bool:
        lines = Path("/proc/misc").read_text().splitlines()
        return any(line.split()[-1] == "device-mapper" for line in lines)

    return _no_module("dm-mod", "device-mapper", there, load) or no_program("dmsetup")


def no_nbd(*, load: bool = True) -> str | None:
    """The kernel's nbd devices, whose module the mount itself loads."""
    there = Path("/sys/block/nbd0").exists() or any(
        Path("/lib/modules", os.uname().release).glob("kernel/drivers/block/nbd.ko*")
    )
    return None if there else "the kernel has no nbd (modprobe nbd)"


def no_program(program: str, *, load: bool = True) -> str | None:
    """A program."""
    if find(program) is not None:
        return None
    return f"{program} is not installed ({install_program(program)})"


def not_root(*, load: bool = True) -> str | None:
    """The right to mount block devices."""
    return None if os.geteuid() == 0 else "only root can mount block devices"


def no_appliance(*, load: bool) -> str | None:
    """Libguestfs's appliance, and FUSE for this user."""
    if reason := no_fuse(load=load):
        return reason
    try:
        import guestfs  # noqa: F401
    except ImportError:
        return f"libguestfs's Python bindings are not installed ({binding_fix('python3-guestfs')})"
    if os.geteuid() != 0 and (reason := no_program("fusermount")):
        return reason
    if not any(os.access(kernel, os.R_OK) for kernel in Path("/boot").glob("vmlinu*")):
        return "no kernel for the appliance can be read in /boot"
    return None
