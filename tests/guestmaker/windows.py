"""A phony Windows: what inspection looks at, and a letter."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgtool.host.process import run
from tests.guestmaker import facts
from tests.guestmaker.disks import MIB, SECTOR, Slice, blank, pack, partition, place, write_files
from tests.guestmaker.hive import write_hive
from tests.guestmaker.recipe import Recipe

_PARTITION = Slice(1, 126, "ntfs")


def _program() -> bytes:
    """The headers of an x86_64 console program: enough to tell the architecture."""
    dos = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 0, 0, 0, 0, 240, 0x22)
    optional = struct.pack("<H", 0x20B).ljust(68, b"\0") + struct.pack("<H", 3)
    return (dos + coff + optional.ljust(240, b"\0")).ljust(1024, b"\0")


def _prepare(work: Path) -> None:
    major, minor = facts.WINDOWS_VERSION
    write_hive(
        work / "SOFTWARE",
        {
            "Microsoft\\Windows NT\\CurrentVersion": {
                "ProductName": facts.WINDOWS_PRODUCT,
                "CurrentVersion": "6.3",
                "CurrentMajorVersionNumber": major,
                "CurrentMinorVersionNumber": minor,
                "CurrentBuild": "19045",
                "InstallationType": "Client",
                "SystemRoot": "C:\\Windows",
            },
            "Microsoft\\Windows\\CurrentVersion": {"ProgramFilesDir": "C:\\Program Files"},
            "Microsoft\\Windows\\CurrentVersion\\Uninstall\\Solitaire": {
                "DisplayName": "Solitaire",
                "DisplayVersion": "1.2.3",
            },
        },
    )
    write_hive(
        work / "SYSTEM",
        {
            "Select": {"Current": 1, "Default": 1, "Failed": 0, "LastKnownGood": 1},
            "ControlSet001\\Control\\ComputerName\\ComputerName": {
                "ComputerName": facts.WINDOWS_HOSTNAME
            },
            "ControlSet001\\Services\\Tcpip\\Parameters": {
                "Hostname": facts.WINDOWS_HOSTNAME,
                "NV Hostname": facts.WINDOWS_HOSTNAME,
            },
            "MountedDevices": {},
        },
    )
    config = "Windows/System32/config"
    tree = write_files(
        work / "tree",
        {
            "bootmgr": b"not a boot manager\n",
            f"{config}/SOFTWARE": (work / "SOFTWARE").read_bytes(),
            f"{config}/SYSTEM": (work / "SYSTEM").read_bytes(),
            "Windows/System32/cmd.exe": _program(),
            "Windows/explorer.exe": _program(),
            "Windows/System32/drivers/etc/hosts": b"127.0.0.1 localhost\r\n",
            "Program Files/Solitaire/solitaire.exe": _program(),
            "Users/Alice/Documents/letter.txt": facts.WINDOWS_LETTER,
            "Users/Alice/Documents/żółw.txt": b"turtle\r\n",
        },
    )
    pack(tree, work / "tree.tar")
    disk = blank(work / "windows.raw", 128 * MIB)
    partition(disk, "dos", [_PARTITION])
    volume = blank(work / "volume", _PARTITION.size * MIB)
    start = str(_PARTITION.start * MIB // SECTOR)
    run(["mkntfs", "-q", "-Q", "-F", "-L", "Windows", "-p", start, "-H", "255", "-S", "63", volume])
    place(volume, disk, _PARTITION.start * MIB)


def _fill(g: Any, devices: Sequence[str], work: Path) -> None:
    g.mount(f"{devices[0]}1", "/")
    g.tar_in(str(work / "tree.tar"), "/")
    g.umount("/")


RECIPES = (Recipe("windows", ("windows.qcow2",), _prepare, _fill),)
