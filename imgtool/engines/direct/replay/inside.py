"""Replaying a journal, inside the sandbox: QEMU puts an overlay on the image, e2fsck replays.

This module is the program in that sandbox, which `imgtool.engines.direct.replay.host` starts.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from imgtool.engines.direct.wire import seccomp
from imgtool.engines.direct.wire.libc import libc
from imgtool.engines.direct.worker import confinement, launcher, limits
from imgtool.host.process import run

_OVERLAYS = 4 << 30  # bytes, all of them together
_SAID = 1 << 20
_MS_NOSUID, _MS_NODEV = 2, 4
_CLEAN = ": clean,"
# What e2fsck says of what the kernel does too at mount. Anything else it repaired is damage, which
# the kernel would show, or refuse.
_KERNEL_DOES = re.compile(
    r"/tmp/volume\d+: (recovering journal$|(Clearing|Truncating) orphaned inode \d+ |clean, )"
)
DiskRange = tuple[int, int, int]


def _mount_file(at: str, user: int) -> int:
    """Mount a file of `user` at `at`; gives the connection that whoever serves it needs."""
    Path(at).touch()
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={connection},rootmode=100000,user_id={user},group_id={user}"
    options += ",default_permissions"
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    if libc.mount(b"volume", at.encode(), b"fuse", flags, options.encode()):
        raise OSError(ctypes.get_errno(), "FUSE cannot be mounted")
    return connection


def _confine(user: int | None) -> None:
    """Become `user`, and give up all capabilities but that, for good, and mount(2)."""
    if user is None:
        confinement.drop_capabilities()
    else:
        confinement.become(user)
        confinement.end_with_parent()
    seccomp.confine(seccomp.replay_filter())
    launcher.keep_to_itself()


def _wait_for(pid: int) -> int:
    """Wait for a program; gives its status. If it fills the overlays instead, all ends at once: the
    limit for a file's size has to let e2fsck write at the end of a volume.
    """
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if sum(path.stat().st_blocks for path in Path("/work").iterdir()) * 512 > _OVERLAYS:
            sys.exit("the overlay takes too much room")
        time.sleep(0.002)


def _lines(descriptor: int) -> list[str]:
    return os.pread(descriptor, _SAID, 0).decode("utf-8", "replace").strip().splitlines()


def _replay(overlay: dict[str, object], place: DiskRange, at: str, connection: int) -> bool:
    _, offset, size = place
    volume = {"driver": "raw", "node-name": "volume", "offset": offset, "size": size}
    Path(f"/tmp/{connection}").touch()  # what QEMU sees as /dev/fd
    argv = ["/usr/bin/qemu-storage-daemon"]
    argv += ["--blockdev", json.dumps({**overlay, "node-name": "overlay"})]
    argv += ["--blockdev", json.dumps({**volume, "file": "overlay"})]
    argv += ["--export", f"type=fuse,id=e,node-name=volume,mountpoint=/dev/fd/{connection}"]
    argv[-1] += ",writable=on"
    nothing = os.open(os.devnull, os.O_RDWR)
    # In files, in a place of limited size: who has started this sandbox keeps all that it says.
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    said, errors = os.open("/tmp/said", flags, 0o600), os.open("/tmp/errors", flags, 0o600)
    server = launcher.start(
        argv,
        {0: nothing, 1: nothing, 2: errors, connection: connection},
        file_size=_OVERLAYS,
    )
    # e2fsck waits for the server to begin; only the server has the connection, so not for one that
    # has ended.
    os.close(connection)
    checker = launcher.start(
        ["/usr/bin/e2fsck", "-p", at], {0: nothing, 1: said, 2: errors}, file_size=size
    )
    checked = _wait_for(checker)
    os.kill(server, signal.SIGTERM)
    served = _wait_for(server)  # with 0, all is written
    if checked not in (0, 1) or served:
        last = _lines(errors)[-1:]
        sys.exit(ascii(last[0][:200]) if last else "e2fsck is not content")
    lines = _lines(said)
    for descriptor in (nothing, said, errors):
        os.close(descriptor)
    return bool(lines) and all(map(_KERNEL_DOES.match, lines)) and _CLEAN in lines[-1]


def main() -> None:
    """Make the overlays, replay each journal, and say `clean` if all are."""
    request = json.load(sys.stdin)
    user = request["user"]
    os.environ["PATH"] = "/usr/bin"
    places: list[DiskRange] = [tuple(place) for place in request["places"]]
    mounts = [f"/tmp/volume{number}" for number in range(len(places))]
    connections = [_mount_file(at, user or 0) for at in mounts]
    _confine(user)
    limits.limit(1)
    nodes = {}
    for disk, size, node in request["overlays"]:
        nodes[disk] = node
        # The size is known; nothing has to be opened to make an overlay.
        run(["qemu-img", "create", "-q", "-f", "qcow2", f"/work/{disk}", str(size)])
    if all(
        _replay(nodes[place[0]], place, at, connection)
        for place, at, connection in zip(places, mounts, connections, strict=True)
    ):
        sys.stdout.write("clean")
