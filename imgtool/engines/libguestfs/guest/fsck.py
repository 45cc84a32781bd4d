"""Whether filesystems are sound: before they are written to, and before what was written counts.

The checkers are those of the filesystems' own authors (e2fsck, xfs_repair, fsck.fat), in the
appliance and without changing anything.
"""

from __future__ import annotations

import logging
import re
import secrets
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from imgtool.engines.libguestfs.guest.volumes import ApplianceVolumes, reason
from imgtool.errors import (
    EngineError,
    Force,
    Reason,
)
from imgtool.formats.numbers import whole_number
from imgtool.guest.mending import has_errors, refuse_only_read
from imgtool.guest.model import Mount

log = logging.getLogger(__name__)

_CHECKS = {
    "ext2": "e2fsck -fn",
    "ext3": "e2fsck -fn",
    "ext4": "e2fsck -fn",
    "xfs": "xfs_repair -n",
    "vfat": "fsck.fat -n",
}
# What e2fsck ends with where it found no fault, or only such as it would have put right.
_EXT_SOUND = (0, 1, 2, 3)
# What a checker says that is about no fault, and the numbers in a line that every write changes.
_NO_FAULT = re.compile(
    r"e2fsck \d|fsck\.fat |Pass |Phase |\s+- |Warning|No modify flag set|Leaving filesystem|"
    r"\S+: \*+ WARNING|\S+: \d+/\d+ files|\S+: \d+ files, |[A-Z][\w ]*\? no$"
)
_COUNTS = re.compile(r"\(\d+, counted=\d+\)")
# More than this of what one checker says is not kept: then old and new faults cannot be told apart.
_MOST_SAID = 256 * 1024
# Beyond this many inodes in use a check takes minutes under emulation: then it is left out.
_MOST_INODES = 500_000


@dataclass(frozen=True)
class Filesystem:
    """A filesystem to look at: libguestfs's name of its device, the node that the appliance's own
    kernel has for it (which may be called otherwise), and its type."""

    device: str
    node: str
    type: str

    @property
    def is_ext(self) -> bool:
        """Whether it is an ext2, ext3 or ext4."""
        return self.type in ("ext2", "ext3", "ext4")


@dataclass(frozen=True)
class FsckFailure:
    """A filesystem that its checker finds fault with, or cannot check to the end.

    `faults` are its words, line by line; `all_told` if these are all.
    """

    device: str
    faults: tuple[str, ...]
    all_told: bool = True

    @property
    def said(self) -> str:
        """The first of the faults."""
        return self.faults[0] if self.faults else "no reason given"


def filesystems(volumes: ApplianceVolumes, devices: Iterable[str]) -> tuple[Filesystem, ...]:
    """Those of the devices that are block devices with a known filesystem."""
    found = []
    for device in devices:
        block = volumes.block(device)
        if block is not None and block.type is not None:
            found.append(Filesystem(device, f"/dev/{block.kernel}", block.type))
    return tuple(found)


def _mark() -> str:
    """What stands between answers; nothing that a guest has in them can look like it."""
    return f"--imgtool-{secrets.token_hex(8)}-"


def _shell(handle: Any, script: str) -> str:
    try:
        return str(handle.debug("sh", [script]))
    except RuntimeError as error:
        raise EngineError(f"the filesystems cannot be checked: {reason(error)}") from error


def _ext_headers(
    handle: Any, filesystems: Iterable[Filesystem]
) -> dict[Filesystem, dict[str, str]]:
    """What dumpe2fs says of each ext filesystem, by its own words."""
    exts = [one for one in filesystems if one.is_ext]
    if not exts:
        return {}
    mark = _mark()
    script = [
        f"echo {mark}{number}; dumpe2fs -h {shlex.quote(one.node)} 2>/dev/null"
        for number, one in enumerate(exts)
    ]
    headers = {}
    for section in _shell(handle, "\n".join(script)).split(mark)[1:]:
        which, _, text = section.partition("\n")
        pairs = (row.partition(":") for row in text.splitlines())
        headers[exts[int(which)]] = {key: value.strip() for key, _, value in pairs}
    return headers


def _few_inodes(header: dict[str, str]) -> bool:
    count = whole_number(header.get("Inode count", ""))
    free = whole_number(header.get("Free inodes", ""))
    return count is not None and free is not None and count - free <= _MOST_INODES


def check(handle: Any, filesystems: Iterable[Filesystem]) -> tuple[FsckFailure, ...]:
    """Check filesystems that are not mounted; those at fault.

    Those without a checker, and those that are too large, are passed over.
    """
    wanted = [one for one in filesystems if one.type in _CHECKS]
    headers = _ext_headers(handle, wanted)
    large = [one for one, header in headers.items() if not _few_inodes(header)]
    for one in large:
        log.info("%s: not checked, since it is large", one.device)
    wanted = [one for one in wanted if one not in large]
    if not wanted:
        return ()
    parts, answers, mark = [], [], _mark()
    for number, one in enumerate(wanted):
        output = f"/run/imgtool-check-{number}"
        command = f"{_CHECKS[one.type]} {shlex.quote(one.node)}"
        parts.append(f"( {command} >{output} 2>&1; echo $? >{output}.status ) &")
        size = f"$(stat -c %s {output})"
        answers.append(f"echo {mark}{number} $(cat {output}.status) {size}")
        answers.append(f"head -c {_MOST_SAID} {output}; echo")
    found = []
    for section in _shell(handle, "\n".join([*parts, "wait", *answers])).split(mark)[1:]:
        head, _, text = section.partition("\n")
        which, *numbers = head.split()
        one = wanted[int(which)]
        unsound = parse_fsck(one, numbers, text)
        if unsound is not None:
            found.append(unsound)
    return tuple(found)


def parse_fsck(one: Filesystem, numbers: Sequence[str], text: str) -> FsckFailure | None:
    """What a checker's status, and how many bytes it said, mean; None for a sound filesystem.

    One that could not do its work (8 of e2fsck, 137 if it was killed) has found nothing sound.
    """
    known = [whole_number(number) for number in numbers]
    if len(known) != 2 or known[0] is None or known[1] is None:
        return FsckFailure(one.device, ("its checker did not end",))
    status, size = known[0], known[1]
    if status == 0 or (one.is_ext and status in _EXT_SOUND):
        return None
    # The kernel's name of a disk may be another one the next time.
    faults = list(_faults(text.replace(one.node, one.device)))
    if status >= 8 or (status > 1 and not one.is_ext):
        faults.append(f"its checker could not do its work: status {status}")
    return FsckFailure(one.device, tuple(faults), all_told=size <= _MOST_SAID)


def _faults(text: str) -> Iterable[str]:
    for line in text.splitlines():
        if line.strip() and not _NO_FAULT.match(line):
            said = re.sub(r"\s*\b[A-Z]\w*\? no$", "", line.strip())
            yield _COUNTS.sub("", said).rstrip(" .")


def new_faults(before: FsckFailure | None, now: FsckFailure) -> tuple[str, ...]:
    """The faults that were not there before, of a filesystem that was checked twice.

    Where not all can be compared, and so none can be called old, all of them.
    """
    if before is None or not (before.all_told and now.all_told):
        return now.faults or (now.said,)
    return tuple((Counter(now.faults) - Counter(before.faults)).elements())


def refuse_unless_writable(
    handle: Any,
    mounts: Sequence[Mount],
    filesystems: Iterable[Filesystem],
    force: Force = (),
) -> None:
    """Raise `RefusedError` for a mounted filesystem that should not be written to.

    That is one that the kernel, or ntfs-3g, mounted for reading only though it was to be written
    to (hibernated, or damaged, but not for it is of such a kind), and an ext that says of itself
    that it has errors, which `force` overrides.
    """
    modes: dict[str, tuple[str, list[str]]] = {}
    for row in _shell(handle, "cat /proc/mounts").splitlines():
        words = row.split()
        if len(words) > 3 and words[1].startswith("/sysroot"):
            modes[words[1].removeprefix("/sysroot") or "/"] = (words[2], words[3].split(","))
    for mount in mounts:
        type, options = modes.get(mount.mountpoint, ("", []))
        if "ro" in options and "ro" not in mount.options.split(","):
            refuse_only_read(mount.source, mount.mountpoint, type)
    headers = {} if Reason.DAMAGED in force else _ext_headers(handle, filesystems)
    for one, header in headers.items():
        if "errors" in header.get("Filesystem state", ""):
            raise has_errors(one.device)
