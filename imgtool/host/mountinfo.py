"""What is mounted: /proc/PID/mountinfo (proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MountInfo:
    """A line of it. `device` is `MAJOR:MINOR`, for btrfs that of no block device; `read_only` is
    the filesystem's, whatever this mount of it says."""

    target: str
    fstype: str
    source: str
    device: str
    read_only: bool


def _unescape(text: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def mounts(process: int | str = "self") -> list[MountInfo]:
    """What is mounted where this process is, in the order in which it was."""
    found = []
    # Not splitlines(): the kernel escapes the line feed in a name, and no other line separator.
    for line in os.fsdecode(Path(f"/proc/{process}/mountinfo").read_bytes()).split("\n")[:-1]:
        words = line.split(" ")
        after = words[words.index("-") + 1 :]
        found.append(
            MountInfo(
                target=_unescape(words[4]),
                fstype=after[0],
                source=_unescape(after[1]),
                device=words[2],
                read_only="ro" in after[2].split(","),
            )
        )
    return found
