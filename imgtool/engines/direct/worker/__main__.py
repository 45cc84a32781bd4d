"""The start of the worker: QEMU opens the images while Python loads what reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence

from imgtool.engines.direct.wire import frames, seccomp
from imgtool.engines.direct.wire.requests import Open
from imgtool.engines.direct.worker import launcher, limits
from imgtool.engines.direct.worker.requests import Requests
from imgtool.engines.direct.worker.sources import Disk, use_scratch


def main() -> None:
    """Run as the sandbox's only program of ours; the first request has to be `open`."""
    # Whatever closes the sandbox has done so by now, and nothing of an image was looked at.
    frames.send(sys.stdout.buffer, frames.READY)
    sys.stdout.buffer.flush()
    requests = Requests(sys.stdin.fileno())
    opening = requests.next()
    if opening is None:
        return
    if not isinstance(opening, Open):
        raise frames.BadMessage("the first request does not open anything")
    use_scratch(opening.scratch)
    kept = [number for number in (opening.ring, opening.scratch) if number is not None]
    started = disks(opening.disks, kept=kept)
    from imgtool.engines.direct.worker.server import Worker

    worker = Worker(requests, sys.stdout.buffer, started)
    worker.answer(opening)
    worker.serve()


def disks(servers: Sequence[Sequence[str]], *, kept: Collection[int] = ()) -> list[Disk]:
    """Start what serves the disks, of which all has to be waited for; after that this process, and
    what was started, start nothing more. What was started gets nothing of `kept`.
    """
    for descriptor in kept:
        os.set_inheritable(descriptor, False)
    limits.limit(len(servers))
    # Before the first program: none of them learns from here how the next one is started.
    launcher.keep_to_itself()
    connections = [launcher.start_qemu_nbd(argv) for argv in servers]
    seccomp.confine(seccomp.lone_filter())
    return [Disk(connection) for connection in connections]
