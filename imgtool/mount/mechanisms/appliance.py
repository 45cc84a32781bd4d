"""A host mount through libguestfs: the process that serves it, and what starts and ends that.

The guest's filesystems are read by the appliance's kernel, not by the host's. No root is needed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from imgtool.errors import ExitStatus, HostError, ImgtoolError, Reason, RefusedError, join_names
from imgtool.host import interrupt
from imgtool.host.process import ProgramFailed, command_of, leave_running, parent_of, run
from imgtool.mount import kernel

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest

_READY, _FAILED = "ready", "failed.json"
_NOTICE = "notice: "
_WRITING = 600.0  # seconds that an emulated appliance may take to write what it holds


class MountFields(TypedDict):
    """The fields of a `Mount`."""

    source: str
    mountpoint: str
    options: str
    fstype: str | None


class Request(TypedDict):
    """What the serving process is asked for; all paths are absolute."""

    image: str
    add: list[str]
    format: str | None
    snapshot: str | None
    mounts: list[MountFields]
    root: str | None
    keys: list[str]
    backing_dirs: list[str]
    target: str
    writable: bool
    force: list[str]
    executable: bool


class _Failure(TypedDict):
    message: str
    hint: str | None
    status: int


class ApplianceFailed(ImgtoolError):
    """The serving process gave up; the error is the one that it met."""

    def __init__(self, known: _Failure) -> None:
        super().__init__(known["message"], hint=known["hint"])
        self.status = ExitStatus(known["status"])


def start(folder: Path, request: Request) -> None:
    """Start the process that serves `request`, and wait until the mount is there."""
    argv = [sys.executable, "-m", "imgtool.mount.mechanisms.appliance", str(folder)]
    # Keys may be in it: it has no name, and is gone with the processes that have it open.
    descriptor = os.memfd_create("request", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "w", closefd=False) as file:
            json.dump(request, file)
        os.lseek(descriptor, 0, os.SEEK_SET)
        # It is imgtool itself, for which the user may have set more than other programs get to see.
        env = dict(os.environ)
        process = leave_running(argv, folder / "appliance.log", env=env, stdin=descriptor)
    finally:
        os.close(descriptor)
    ready, failed = folder / _READY, folder / _FAILED
    while not ready.exists():
        if process.poll() is not None:
            if failed.exists():
                raise ApplianceFailed(json.loads(failed.read_text()))
            said = (folder / "appliance.log").read_text(errors="replace").strip().splitlines()
            raise HostError(f"the appliance ended: {said[-1] if said else 'no reason given'}")
        time.sleep(0.02)


def notices(folder: Path) -> list[str]:
    """What the process has had to say to the user so far."""
    try:
        said = (folder / "appliance.log").read_text(errors="replace")
    except OSError:
        return []
    return [x.removeprefix(_NOTICE) for x in said.splitlines() if x.startswith(_NOTICE)]


def lost_helper(folder: Path) -> str | None:
    """What is wrong where a program is gone without which the process cannot serve; else None."""
    try:
        helpers = json.loads((folder / _READY).read_text() or "[]")
    except (OSError, ValueError):
        return None
    for pid, name in helpers:
        if not _is_program(pid, name):
            return f"{name}, which served the image to it, is gone"
    return None


def _is_program(pid: int, name: str) -> bool:
    words = command_of(pid)  # none of a process that has ended
    return bool(words) and Path(words[0]).name == name


def stop(folder: Path, target: str, *, writable: bool, servers: Callable[[], list[int]]) -> None:
    """Unmount it, or end the launch, and wait until the appliance has closed the image.

    Raises `RefusedError` if the mount is in use, `HostError` if the appliance does not end while it
    may have something to write, `ApplianceFailed` if it could not write it.
    """
    served = (folder / _READY).exists()
    if not served:
        for pid in servers():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:  # not its child that ends QEMU should it be killed
                    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + (_WRITING if served and writable else kernel.PATIENCE)
    while (running := servers()) and time.monotonic() < deadline:
        # A launch that was about to end mounts it all the same.
        if is_mounted(target):
            unmount(target)
        time.sleep(0.02)
    if running and served and writable:
        raise HostError(
            f"the appliance is still writing after {_WRITING} s", hint="wait, then try again"
        )
    for pid in running:
        kernel.end_process(pid)
    if is_mounted(target):  # its process was killed
        unmount(target)
    failed = folder / _FAILED
    if served and writable and failed.exists():
        error = ApplianceFailed(json.loads(failed.read_text()))
        failed.unlink()  # said once
        error.hint = "what was written last may be missing; imgtool cleanup ends the mount"
        raise error


def is_mounted(target: str) -> bool:
    """Whether a FUSE filesystem is mounted at this directory."""
    found = kernel.mounted_at(target)
    return found is not None and found.fstype.startswith("fuse")


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
                "it is in use" + (" by " + join_names(users) if users else ""),
                subject=target,
                hint="leave the directory or end the process, then try again",
            ) from error
        raise HostError(f"it cannot be unmounted: {error.strerror}", subject=target) from error


# In the process


def _serve(request: Request, ready: Path) -> None:
    from imgtool.guest.guest_options import GuestOptions
    from imgtool.guest.hidden import refuse_hidden
    from imgtool.guest.model import Mount
    from imgtool.opening import open_guest, open_guest_in_place

    options = GuestOptions(
        add=request["add"],
        format=request["format"],
        snapshot=request["snapshot"],
        mounts=[Mount(**mount) for mount in request["mounts"]],
        root=request["root"],
        keys=request["keys"],
        engine="libguestfs",
        backing_dirs=request["backing_dirs"],
    )

    def notice(line: str) -> None:
        print(f"{_NOTICE}{line}", flush=True)

    def serve(guest: LibguestfsGuest) -> None:
        guest.mount_layout()
        if request["writable"] and Reason.HIDDEN_MOUNT not in request["force"]:
            refuse_hidden(guest.unshown(), guest.layout.optional, notice)
        words = [
            *([] if request["writable"] else ["ro"]),
            *([] if request["executable"] else ["noexec"]),
        ]
        guest.handle.mount_local(
            request["target"], readonly=not request["writable"], options=",".join(words)
        )
        _say_ready(ready)
        guest.handle.mount_local_run()

    if request["writable"]:
        force = [Reason(name) for name in request["force"]]
        with open_guest_in_place(
            request["image"], **options.keywords(), force=force, notice=notice
        ) as guest:
            serve(guest)
    else:
        with open_guest(request["image"], **options.keywords(), notice=notice) as opened:
            serve(cast("LibguestfsGuest", opened))


def _say_ready(ready: Path) -> None:
    """Write down that it serves, and which programs that needs."""
    helpers = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and parent_of(int(entry.name)) == os.getpid():
            helpers += [(int(entry.name), "qemu-nbd")] * _is_program(int(entry.name), "qemu-nbd")
    draft = ready.with_suffix(".draft")
    draft.write_text(json.dumps(helpers))
    draft.replace(ready)


def main() -> None:
    """Serve the request on standard input, with this folder, until somebody unmounts it; SIGTERM
    ends a launch."""
    folder = Path(sys.argv[1])
    request: Request = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())  # nobody else gets to see the keys
    os.close(nothing)
    try:
        with interrupt.watch():
            _serve(request, folder / _READY)
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
