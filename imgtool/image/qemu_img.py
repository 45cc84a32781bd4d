"""qemu-img as a worker: run with progress, its failures told in imgtool's words."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from imgtool.errors import ImgtoolError
from imgtool.image.places import printable
from imgtool.process import PIPE, Limits, ProgramFailed, run, spawn

# Called with the part that is done, between 0 and 1.
OnPart = Callable[[float], None]

_LIMITS = Limits(memory=8 << 30)
_PART = re.compile(rb"\(\s*([0-9.]+)/100%\)")
_DIFFERENT = 1


def qemu_img(words: Sequence[str | Path], *, image: Path, on_part: OnPart | None = None) -> None:
    """Run a sub-command that works on `image`, with its progress where `on_part` asks for it.

    Raises `ImgtoolError` with QEMU's own reason.
    """
    if on_part is None:
        try:
            run(["qemu-img", *words], limits=_LIMITS)
        except ProgramFailed as error:
            raise _failed(error.stderr, image) from error
        return
    command = ["qemu-img", words[0], "-p", *words[1:]]
    with (
        tempfile.TemporaryFile() as said,
        spawn(command, limits=_LIMITS, stdout=PIPE, stderr=said.fileno()) as process,
    ):
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 4096):
            if found := _PART.findall(piece):
                on_part(float(found[-1]) / 100)
        if process.wait() != 0:
            said.seek(0)
            raise _failed(said.read().decode(errors="replace"), image)


def _failed(stderr: str, image: Path) -> ImgtoolError:
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    reason = lines[-1].removeprefix("qemu-img: ") if lines else "no reason given"
    full = "No space left on device" in stderr
    return ImgtoolError(
        f"QEMU could not do it: {printable(reason)}",
        subject=printable(image),
        hint="make room on the file system of the image, then repeat the command" if full else None,
    )


def same_content(first: str, second: str) -> bool:
    """Whether a guest sees the same in two images, described as qemu-img takes them.

    One may be longer if the rest of it reads as zeros. Raises `ImgtoolError` if one cannot be read.
    """
    try:
        done = run(
            ["qemu-img", "compare", "-q", "-U", first, second], limits=_LIMITS, ok=(0, _DIFFERENT)
        )
    except ProgramFailed as error:
        raise ImgtoolError(f"the images cannot be compared: {error.message}") from error
    return done.returncode == 0
