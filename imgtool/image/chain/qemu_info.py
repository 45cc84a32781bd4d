"""What `qemu-img info` says of an image, under limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from imgtool.errors import ImageError
from imgtool.host import program_messages
from imgtool.host.process import Limits, ProgramFailed, TimedOut, run
from imgtool.text import printable, typed

PROBE_LIMITS = Limits(memory=1 << 30, cpu=8, wall=8)

SnapshotAnswer = TypedDict(
    "SnapshotAnswer",
    {
        "id": str,
        "name": str,
        "date-sec": int,
        "date-nsec": int,
        "vm-state-size": int,
        "vm-clock-sec": int,
        "vm-clock-nsec": int,
    },
)
Details = TypedDict(
    "Details",
    {
        "compat": str,
        "corrupt": bool,
        "refcount-bits": int,
        "lazy-refcounts": bool,
        "compression-type": str,
        "extended-l2": bool,
    },
    total=False,
)


class _Specific(TypedDict, total=False):
    data: Details


Answer = TypedDict(
    "Answer",
    {
        "format": str,
        "virtual-size": int,
        "actual-size": NotRequired[int],
        "cluster-size": NotRequired[int],
        "dirty-flag": NotRequired[bool],
        "encrypted": NotRequired[bool],
        "backing-filename": NotRequired[str],
        "backing-filename-format": NotRequired[str],
        "snapshots": NotRequired[list[SnapshotAnswer]],
        "format-specific": NotRequired[_Specific],
    },
)


def ask_qemu(path: Path, description: str, format: str | None) -> Answer:
    """What `qemu-img info` says of the image at `path`, which is described to it as `description`.

    Raises `ImageError` where it cannot open it.
    """
    argv = ["qemu-img", "info", "--force-share", "--output=json"]
    if format is not None:
        argv += ["-f", format]
    try:
        done = run([*argv, description], limits=PROBE_LIMITS)
    except TimedOut as error:
        raise ImageError(
            f"QEMU could not make sense of its header in {PROBE_LIMITS.wall:g} s",
            subject=printable(path),
        ) from error
    except ProgramFailed as error:
        if error.returncode < 0:
            reason = f"QEMU died of its header (signal {-error.returncode})"
            raise ImageError(reason, subject=printable(path)) from error
        told = program_messages.by_qemu(error.stderr, typed(path))
        raise ImageError(told.means, subject=printable(path), hint=told.step) from error
    answer: Answer = json.loads(done.stdout)
    return answer


def details_of(answer: Answer) -> Details:
    """What qemu-img says of an image that only images of its format have."""
    return answer.get("format-specific", {}).get("data", {})
