"""Replaying the journal of a crashed ext3 or ext4: e2fsck on a throw-away overlay, in a sandbox.

This module is the program in that sandbox, and `recovered` what starts it. The image is not
written: QEMU puts an overlay on it, exports the volume in it as a file through FUSE, and e2fsck,
without any capability, does to that file what the kernel would do at mount: it replays the journal
and releases orphaned inodes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imgtool.engines.direct import sandbox, seccomp
from imgtool.engines.direct.filesystem import NeedsAppliance
from imgtool.image.chain import Chain
from imgtool.process import Limits, ProgramFailed, TimedOut, run

_LIMITS = Limits(memory=4 << 30, cpu=120, wall=120, file_size=4 << 30)
_PR_CAPBSET_DROP, _CAP_SETPCAP, _CAP_SYS_ADMIN = 24, 8, 21
_CLEAN = ": clean,"
# What e2fsck says of what the kernel does too at mount. Anything else it repaired is damage, which
# the kernel would show, or refuse.
_KERNEL_DOES = re.compile(
    r"/tmp/volume: (recovering journal$|(Clearing|Truncating) orphaned inode \d+ |clean, )"
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
        "backing": chain.blockdev(names=images.names),
    }


@contextlib.contextmanager
def recovered(
    chains: Sequence[Chain], images: sandbox.Images, sizes: Sequence[int], places: Sequence[Place]
) -> Iterator[dict[int, Path]]:
    """Overlays by the number of their disk, with the journals at `places` replayed.

    They are gone with the block. Raises `NeedsAppliance` where e2fsck is not content.
    """
    with tempfile.TemporaryDirectory(prefix="imgtool-replay-") as folder:
        if images.owner is not None:
            os.chown(folder, *images.owner)
        disks = sorted({disk for disk, _, _ in places})
        request = {
            "overlays": [
                [disk, sizes[disk], overlay_node(f"/work/{disk}", chains[disk], images)]
                for disk in disks
            ],
            "places": [list(place) for place in places],
        }
        with sandbox.program_filter(mounts=True) as descriptor:
            argv = sandbox.arguments(
                images,
                descriptor,
                _START,
                programs=_PROGRAMS,
                options=(
                    *("--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"),
                    *("--dev-bind", "/dev/fuse", "/dev/fuse", "--bind", folder, "/work"),
                ),
                user=0,  # FUSE lets nobody else mount
            )
            try:
                done = run(
                    argv,
                    limits=_LIMITS,
                    input=json.dumps(request).encode("ascii"),
                    pass_fds=[*images.descriptors.values(), descriptor],
                    owner=images.owner,
                )
            except (ProgramFailed, TimedOut) as error:
                raise NeedsAppliance(f"its journal cannot be replayed here: {error}") from error
        if done.stdout != b"clean":
            raise NeedsAppliance("its journal was replayed, and it is not clean")
        yield {disk: Path(folder, str(disk)) for disk in disks}


# Inside


def _confine() -> None:
    """No capability, and the strict filter, for the program that looks at the hostile journal."""
    libc = ctypes.CDLL(None, use_errno=True)
    # What is not in the bounding set is not there after the next exec.
    for capability in (_CAP_SYS_ADMIN, _CAP_SETPCAP):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            os._exit(126)
    seccomp.confine(seccomp.tree_filter())


def _replay(overlay: str, node: dict[str, Any], place: Place) -> bool:
    _, offset, size = place
    volume = {"driver": "raw", "node-name": "volume", "offset": offset, "size": size}
    at, pid = Path("/tmp/volume"), Path("/tmp/pid")
    at.touch()
    argv = ["qemu-storage-daemon", "--daemonize", "--pidfile", str(pid)]
    argv += ["--blockdev", json.dumps({**node, "node-name": "overlay"})]
    argv += ["--blockdev", json.dumps({**volume, "file": "overlay"})]
    argv += ["--export", f"type=fuse,id=e,node-name=volume,mountpoint={at},writable=on"]
    run(argv)
    try:
        done = run(["e2fsck", "-p", at], ok=(0, 1), before=_confine)
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while pid.exists() and time.monotonic() < deadline:
            time.sleep(0.002)  # it removes the file when all is written
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return all(_KERNEL_DOES.match(line) for line in lines) and _CLEAN in lines[-1]


def main() -> None:
    """Make the overlays, replay each journal, and say `clean` if all are."""
    request = json.load(sys.stdin)
    os.environ["PATH"] = "/usr/bin"
    nodes = {}
    for disk, size, node in request["overlays"]:
        nodes[disk] = node
        # The size is known; nothing has to be opened to make an overlay.
        run(["qemu-img", "create", "-q", "-f", "qcow2", f"/work/{disk}", str(size)])
    places = [tuple(place) for place in request["places"]]
    if all(_replay(f"/work/{place[0]}", nodes[place[0]], place) for place in places):
        sys.stdout.write("clean")
