"""The start of the worker: QEMU opens the images while Python loads what reads them."""

from __future__ import annotations

import os
import resource
import sys

from imgtool.engines.direct import protocol, seccomp
from imgtool.engines.direct.requests import Requests
from imgtool.engines.direct.sources import Disk


def main() -> None:
    """Run as the sandbox's only program of ours; the first request has to be `open`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests = Requests(sys.stdin.fileno())
    body = requests.next()
    if body is None:
        return
    opening = protocol.parsed(body)
    if opening.get("ring") is not None:
        os.set_inheritable(opening["ring"], False)
    with seccomp.last_programs(len(opening["disks"])):
        opening["disks"] = [Disk(argv) for argv in opening["disks"]]
    from imgtool.engines.direct.worker import Worker

    worker = Worker(requests, sys.stdout.buffer)
    worker.answer(opening)
    worker.serve()
