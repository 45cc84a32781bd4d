"""The end of a mount that a test has made: over only when whoever served it has written it all."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from pathlib import Path

from imgtool.host.process import processes_naming
from imgtool.mount.kernel import users_of

LIMIT = 60.0


def unmount(place: Path, *, limit: float = LIMIT) -> None:
    """Unmount it, once nobody uses it any more, and wait for the end of the program behind it.

    Past the limit it is taken away all the same, so that it is in no other test's way, and the
    test fails.
    """
    deadline = time.monotonic() + limit
    served = []
    for pid in processes_naming(str(place)):
        with contextlib.suppress(ProcessLookupError):
            served.append(os.pidfd_open(pid))
    try:
        while (
            done := subprocess.run(["umount", place], capture_output=True, text=True)
        ).returncode:
            if "busy" not in done.stderr or time.monotonic() > deadline:
                users = users_of(str(place))
                subprocess.run(["umount", "-l", place], check=False)
                raise AssertionError(f"not unmounted, in use by {users}: {done.stderr}")
            time.sleep(0.05)
        for process in served:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([process], [], [], left)[0], f"{place}: its program goes on"
    finally:
        for process in served:
            os.close(process)
