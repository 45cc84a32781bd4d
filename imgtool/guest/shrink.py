"""Whether a disk can be cut: what of the guest lies beyond a place on it."""

from __future__ import annotations

import json

from imgtool.errors import Force, Reason, RefusedError
from imgtool.guest.partitions import partitions_of
from imgtool.host.process import Limits, run
from imgtool.image.chain.chain import Chain
from imgtool.image.qemu.nbd import serve
from imgtool.text import printable

_PIECE = 1 << 20


def require_empty_tail(chain: Chain, size: int, force: Force = ()) -> None:
    """Raise `RefusedError` unless a disk of `size` bytes holds all that is on it.

    That is proved where every partition ends before, and all that lies beyond reads as zeros; of a
    disk without partitions it cannot be. `force` names what is given up.
    """
    name = printable(chain.active.path)
    rows = [row for row in partitions_of(chain).partitions if row.number is not None]
    if not rows and Reason.SHRINK not in force and _holds_data(chain, 0):
        raise RefusedError(
            "it has no partition table, so nothing tells where its content ends",
            subject=name,
            hint="make its filesystem smaller first",
            reason=Reason.SHRINK,
        )
    beyond = [row for row in rows if row.start + row.size > size]
    if beyond and Reason.CUT_PARTITION not in force:
        last = max(row.start + row.size for row in rows)
        raise RefusedError(
            f"partition {beyond[0].number} would be cut: the last one ends at byte {last}",
            subject=name,
            hint=f"not below {last} bytes; or make the partition smaller in the guest first",
            reason=Reason.CUT_PARTITION,
        )
    if Reason.SHRINK not in force and _holds_data(chain, size):
        gpt = any(row.table == "gpt" for row in rows)
        raise RefusedError(
            f"beyond byte {size} lies something that is not zeros"
            + (": of a GPT, the second copy lies at the end of the disk" if gpt else ""),
            subject=name,
            hint="in the guest, 'sgdisk --move-second-header' on its disk then puts it where the"
            " disk ends"
            if gpt
            else None,
            reason=Reason.SHRINK,
        )


def _holds_data(chain: Chain, start: int) -> bool:
    """Whether anything but zeros is on the disk from `start` on."""
    done = run(
        ["qemu-img", "map", "-U", "--output=json", f"--start-offset={start}", chain.filename()],
        limits=Limits(memory=4 << 30),
    )
    extents = [row for row in json.loads(done.stdout) if not row["zero"]]
    if not extents:
        return False
    with serve(chain) as server:
        for extent in extents:
            end = extent["start"] + extent["length"]
            for at in range(max(extent["start"], start), end, _PIECE):
                if server.read(at, min(_PIECE, end - at)).strip(b"\0"):
                    return True
    return False
