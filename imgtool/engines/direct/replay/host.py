"""Replaying the journal of a crashed ext3 or ext4: e2fsck on a throw-away overlay, in a sandbox.

The program in that sandbox is `imgtool.engines.direct.replay.inside`, and `replay_journals` starts
it. The image is not written: QEMU puts an overlay on it, exports the volume in it as a file through
FUSE, and e2fsck does to that file what the kernel would do at mount: it replays the journal and
releases orphaned inodes.

The file is mounted before anything looks at the image, and all rights are given up then: neither
QEMU nor e2fsck has any, and both start nothing themselves. QEMU is given the connection to the
kernel's FUSE that belongs to the mount, by the name that libfuse has for such a connection
(fuse_session_mount() in libfuse 3.3 and newer): /dev/fd/N.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.engines.direct.parent import sandbox
from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.host.process import Limits, ProgramFailed, TimedOut, run
from imgtool.host.scratch import scratch_folder
from imgtool.image.chain.chain import Chain

_LIMITS = Limits(memory=4 << 30, cpu=120, wall=120)
_ENTER = (
    "import sys; sys.path[:0] = {paths!r}; "
    "from imgtool.engines.direct.worker.confinement import enter_to_mount; enter_to_mount()\n"
)
_START = (
    "import sys; sys.path[:0] = {paths!r}; "
    "from imgtool.engines.direct.replay.inside import main; main()"
)
_PROGRAMS = ("qemu-img", "qemu-storage-daemon", "e2fsck")

# A stretch of a disk: its number, offset and size in bytes.
DiskRange = tuple[int, int, int]


def overlay_node(name: str, chain: Chain, images: sandbox.Images) -> dict[str, object]:
    """The overlay `name` on a chain, as QEMU's -blockdev takes it, without a look at its header."""
    return {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": name},
        "backing": chain.blockdev(names=images.names()),
    }


@contextlib.contextmanager
def replay_journals(
    chains: Sequence[Chain],
    images: sandbox.Images,
    sizes: Sequence[int],
    places: Sequence[DiskRange],
) -> Iterator[dict[int, Path]]:
    """Overlays by the number of their disk, with the journals at `places` replayed.

    They are gone with the block. Raises `Unsupported` where e2fsck is not content.
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
                raise Unsupported(f"its journal cannot be replayed here: {error}") from error
        if done.stdout != b"clean":
            raise Unsupported("its journal was replayed, and it is not clean")
        yield dict(zip(disks, files, strict=True))
