"""Replaying the journal of a crashed ext3 or ext4: e2fsck on a throw-away overlay, in a sandbox.

This module is the program in that sandbox, and `recovered` what starts it. The image is not
written: QEMU puts an overlay on it, exports the volume in it as a file through FUSE, and e2fsck
does to that file what the kernel would do at mount: it replays the journal and releases orphaned
inodes.

The file is mounted before anything looks at the image, and all rights are given up then: neither
QEMU nor e2fsck has any, and both start nothing themselves. QEMU is given the connection to the
kernel's FUSE that belongs to the mount, by the name that libfuse has for such a connection
(fuse_session_mount() in libfuse 3.3 and newer): /dev/fd/N.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imgtool.engines.direct import confinement, limits, program, sandbox, seccomp
from imgtool.engines.direct.filesystem import NeedsAppliance
from imgtool.image.chain import Chain
from imgtool.process import Limits, ProgramFailed, TimedOut, run
from imgtool.scratch import scratch_folder

_LIMITS = Limits(memory=4 << 30, cpu=120, wall=120)
_OVERLAYS = 4 << 30  # bytes, all of them together
_SAID = 1 << 20
_MS_NOSUID, _MS_NODEV = 2, 4
_CLEAN = ": clean,"
# What e2fsck says of what the kernel does too at mount. Anything else it repaired is damage, which
# the kernel would show, or refuse.
_KERNEL_DOES = re.compile(
    r"/tmp/volume\d+: (recovering journal$|(Clearing|Truncating) orphaned inode \d+ |clean, )"
)
_ENTER = (
    "import sys; sys.path[:0] = {paths!r}; "
    "from imgtool.engines.direct.confinement import enter_to_mount; enter_to_mount()\n"
)
_START = (
    "import sys; sys.path[:0] = {paths!r}; from imgtool.engines.direct.replay import main; main()"
)
_PROGRAMS = ("qemu-img", "qemu-storage-daemon", "e2fsck")

# A stretch of a disk: its number, offset and size in bytes.
Place = tuple[int, int, int]


def overlay_node(name: str, chain: Chain, images: sandbox.Images) -> dict[str, Any]:
    """The overlay `name` on a chain, as QEMU's -blockdev takes it, without a look at its header."""
    return {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": name},
        "backing": chain.blockdev(names=images.names()),
    }


@contextlib.contextmanager
def recovered(
    chains: Sequence[Chain], images: sandbox.Images, sizes: Sequence[int], places: Sequence[Place]
) -> Iterator[dict[int, Path]]:
    """Overlays by the number of their disk, with the journals at `places` replayed.

    They are gone with the block. Raises `NeedsAppliance` where e2fsck is not content.
    """
    with scratch_folder("replay") as folder:
        disks = sorted({disk for disk, _, _ in places})
        files = [folder / str(disk) for disk in disks]
        for path in files:
            path.touch()
        if images.user is not None:
            for path in (folder, *files):
                os.chown(path, images.user, images.user)
        request = {
            "overlays": [
                [disk, sizes[disk], overlay_node(f"/work/{disk}", chains[disk], images)]
                for disk in disks
            ],
            "places": [list(place) for place in places],
            "user": images.user,
        }
        with sandbox.in_namespaces(
            images,
            programs=_PROGRAMS,
            options=(
                # Here /dev/fd is a folder of plain files: QEMU wants to see one at the place that
                # it is told, before libfuse takes the name for a connection.
                *("--dir", "/dev/shm", "--symlink", "/tmp", "/dev/fd"),
                *("--dev-bind", "/dev/fuse", "/dev/fuse"),
                # The files, not their folder: no others can be made.
                *(w for path in files for w in ("--bind", str(path), f"/work/{path.name}")),
            ),
            rights=("CAP_SYS_ADMIN",),
            user=0,  # FUSE lets nobody else mount
        ) as (words, folders, taken):
            code = _ENTER.format(paths=folders) + _START.format(paths=folders)
            try:
                done = run(
                    [*words, "-I", "-S", "-B", "-c", code],
                    limits=_LIMITS,
                    input=json.dumps(request).encode("ascii"),
                    pass_fds=taken,
                )
            except (ProgramFailed, TimedOut) as error:
                raise NeedsAppliance(f"its journal cannot be replayed here: {error}") from error
        if done.stdout != b"clean":
            raise NeedsAppliance("its journal was replayed, and it is not clean")
        yield dict(zip(disks, files, strict=True))


# Inside


def _mounted(at: str, user: int) -> int:
    """Mount a file of `user` at `at`; gives the connection that whoever serves it needs."""
    Path(at).touch()
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={connection},rootmode=100000,user_id={user},group_id={user}"
    options += ",default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
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
    program.keep_to_itself()


def _ended(pid: int) -> int:
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


def _replay(overlay: dict[str, Any], place: Place, at: str, connection: int) -> bool:
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
    server = program.start(
        argv,
        {0: nothing, 1: nothing, 2: errors, connection: connection},
        file_size=_OVERLAYS,
    )
    # e2fsck waits for the server to begin; only the server has the connection, so not for one that
    # has ended.
    os.close(connection)
    checker = program.start(
        ["/usr/bin/e2fsck", "-p", at], {0: nothing, 1: said, 2: errors}, file_size=size
    )
    checked = _ended(checker)
    os.kill(server, signal.SIGTERM)
    served = _ended(server)  # with 0, all is written
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
    places: list[Place] = [tuple(place) for place in request["places"]]
    mounts = [f"/tmp/volume{number}" for number in range(len(places))]
    connections = [_mounted(at, user or 0) for at in mounts]
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
