"""A host mount through libguestfs: the process that serves it, and what starts and ends that.

The guest's filesystems are read by the appliance's kernel, not by the host's. No root is needed.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from imgtool.errors import ExitStatus, HostError, ImgtoolError, RefusedError
from imgtool.mount import kernel
from imgtool.process import ProgramFailed, leave_running, run

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest import LibguestfsGuest

_READY, _FAILED, _REQUEST = "ready", "failed.json", "request.json"


class ApplianceFailed(ImgtoolError):
    """The serving process gave up; the error is the one that it met."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__(known["message"], hint=known["hint"])
        self.status = ExitStatus(known["status"])


def start(folder: Path, request: dict[str, Any]) -> None:
    """Start the process that serves `request`, and wait until the mount is there."""
    (folder / _REQUEST).write_text(json.dumps(request))
    argv = [sys.executable, "-m", "imgtool.mount.appliance", str(folder)]
    process = leave_running(argv, folder / "appliance.log")
    ready, failed = folder / _READY, folder / _FAILED
    while not ready.exists():
        if process.poll() is not None:
            if failed.exists():
                raise ApplianceFailed(json.loads(failed.read_text()))
            said = (folder / "appliance.log").read_text(errors="replace").strip().splitlines()
            raise HostError(f"the appliance ended: {said[-1] if said else 'no reason given'}")
        time.sleep(0.02)


def unmount(target: str) -> None:
    """Unmount the FUSE mount; its process then ends by itself. Raises `RefusedError` if busy."""
    try:
        if os.geteuid() == 0:
            kernel.unmount(target)
        else:
            run(["fusermount", "-u", target])
    except (OSError, ProgramFailed) as error:
        users = kernel.users_of(target)
        if isinstance(error, ProgramFailed) or error.errno == errno.EBUSY or users:
            raise RefusedError(
                "it is in use" + (" by " + ", ".join(users[:10]) if users else ""),
                subject=target,
                hint="leave the directory or end the process, then try again",
            ) from error
        raise HostError(f"it cannot be unmounted: {error.strerror}", subject=target) from error


# In the process


def _serve(request: dict[str, Any], ready: Path) -> None:
    from imgtool.guest.model import Mount
    from imgtool.opening import open_guest, open_guest_to_write

    common: dict[str, Any] = {
        "add": request["add"],
        "format": request["format"],
        "mounts": [Mount(**mount) for mount in request["mounts"]],
        "root": request["root"],
        "keys": request["keys"],
        "backing_dirs": request["backing_dirs"],
        "notice": lambda line: print(f"notice: {line}", flush=True),
    }

    def serve(guest: LibguestfsGuest) -> None:
        guest.mount_layout()
        guest.handle.mount_local(request["target"], readonly=not request["writable"])
        ready.touch()
        guest.handle.mount_local_run()

    if request["writable"]:
        with open_guest_to_write(request["image"], **common) as guest:
            serve(guest)
    else:
        with open_guest(request["image"], engine="libguestfs", **common) as opened:
            serve(cast("LibguestfsGuest", opened))


def main() -> None:
    """Serve the request in the folder until somebody unmounts it."""
    folder = Path(sys.argv[1])
    try:
        _serve(json.loads((folder / _REQUEST).read_text()), folder / _READY)
    except (ImgtoolError, RuntimeError) as error:
        known = {
            "message": str(error),
            "hint": getattr(error, "hint", None),
            "status": int(getattr(error, "status", ExitStatus.FAILED)),
        }
        draft = folder / "failed.draft"
        draft.write_text(json.dumps(known))
        draft.replace(folder / _FAILED)
        sys.exit(1)


if __name__ == "__main__":
    main()
