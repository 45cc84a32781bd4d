"""The start of the worker: QEMU opens the images while Python loads what reads them."""

from __future__ import annotations

import os
import sys

from imgtool.engines.direct import program, protocol, seccomp
from imgtool.engines.direct.requests import Requests
from imgtool.engines.direct.sources import Disk


def main() -> None:
    """Run as the sandbox's only program of ours; the first request has to be `open`."""
    requests = Requests(sys.stdin.fileno())
    body = requests.next()
    if body is None:
        return
    opening = protocol.parsed(body)
    opening["disks"] = disks(opening["disks"], ring=opening.get("ring"))
    from imgtool.engines.direct.worker import Worker

    worker = Worker(requests, sys.stdout.buffer)
    worker.answer(opening)
    worker.serve()


def disks(servers: list[list[str]], *, ring: int | None = None) -> list[Disk]:
    """Start what serves the disks, of which all has to be waited for; after that this process, and
    what was started, start nothing more.
    """
    program.close_inherited(*([] if ring is None else [ring]))
    if ring is not None:
        os.set_inheritable(ring, False)
    program.limit(len(servers))
    # Before the first program: none of them learns from here how the next one is started.
    program.keep_to_itself()
    connections = [program.served(argv) for argv in servers]
    seccomp.confine(seccomp.lone_filter())
    return [Disk(connection) for connection in connections]
