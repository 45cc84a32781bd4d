"""qemu-img as a worker: run with progress, its failures told in imgtool's words."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from imgtool.errors import NO_ROOM, HostError, ImgtoolError
from imgtool.host import program_messages
from imgtool.host.process import PIPE, Limits, ProgramFailed, run, spawn
from imgtool.image.locking.held import descriptors
from imgtool.text import printable, typed

# Called with the part that is done, between 0 and 1.
OnPart = Callable[[float], None]

_LIMITS = Limits(memory=8 << 30)
_PART = re.compile(rb"\(\s*([0-9.]+)/100%\)")
_DIFFERENT = 1
_HOST_FULL = tuple(map(os.strerror, NO_ROOM))
_WITH_PROGRESS = ("commit", "compare", "convert", "rebase")  # it is silent where it is quiet


class Locked(ImgtoolError):
    """QEMU could not work on an image since another process holds its locks on it."""


def qemu_img(
    words: Sequence[str | Path],
    *,
    image: Path,
    on_part: OnPart | None = None,
    new_group: bool = False,
) -> None:
    """Run a sub-command that works on `image`, with its progress where `on_part` asks for it.

    It is quiet otherwise: no word has to say so. `new_group`, Ctrl-C does not reach it. Raises
    `Locked`, or `ImgtoolError` with QEMU's own reason.
    """
    status, output = _run(words, on_part, new_group=new_group)
    if status != 0:
        raise _explain(output, image)


def _run(
    words: Sequence[str | Path], on_part: OnPart | None, *, new_group: bool = False
) -> tuple[int, str]:
    """The exit status and what was said on standard error."""
    if on_part is None or words[0] not in _WITH_PROGRESS:
        try:
            command = ["qemu-img", words[0], "-q", *words[1:]]
            run(command, limits=_LIMITS, pass_fds=descriptors(), new_group=new_group)
        except ProgramFailed as error:
            return error.returncode, error.stderr
        return 0, ""
    command = ["qemu-img", words[0], "-p", *words[1:]]
    with (
        tempfile.TemporaryFile() as output,
        spawn(
            command,
            limits=_LIMITS,
            pass_fds=descriptors(),
            stdout=PIPE,
            stderr=output.fileno(),
        ) as process,
    ):
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 4096):
            if found := _PART.findall(piece):
                on_part(float(found[-1]) / 100)
        status = process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _explain(stderr: str, image: Path) -> ImgtoolError:
    kind: type[ImgtoolError] = Locked if 'Failed to get "' in stderr else ImgtoolError
    if any(full in stderr for full in _HOST_FULL):
        kind = HostError
    told = program_messages.by_qemu(stderr, typed(image))
    return kind(f"QEMU could not do it: {told.means}", subject=printable(image), hint=told.step)


def same_content(first: str, second: str, on_part: OnPart | None = None) -> bool:
    """Whether a guest sees the same in two images, described as qemu-img takes them.

    One may be longer if the rest of it reads as zeros. Raises `ImgtoolError` if one cannot be read.
    """
    status, output = _run(["compare", "-U", first, second], on_part)
    if status not in (0, _DIFFERENT):
        told = program_messages.by_qemu(output)
        raise ImgtoolError(f"the images cannot be compared: {told.means}")
    return status == 0


def size_needed(filename: str, format: str, options: str = "") -> int:
    """How many bytes a copy of an image can take at most, in a file of this format.

    For raw and qcow2, which QEMU can tell it of.
    """
    words = ["qemu-img", "measure", "-U", "--output=json", "-O", format]
    if options:
        words += ["-o", options]
    try:
        done = run([*words, filename], limits=_LIMITS)
    except ProgramFailed as error:
        told = program_messages.by_qemu(error.stderr)
        raise ImgtoolError(f"the size of a copy cannot be told: {told.means}") from error
    return int(json.loads(done.stdout)["required"])
