"""What asks libparted, inside the sandbox: table sectors come in, rows go out.

libparted wants a path, and gets one of a sparse file that has the disk's size, in which there is
nothing but the sectors that it was given. It is the only module that imports libparted's binding,
which is under the GPL. What libparted asks is answered such that it reads on: nothing is written.

pyparted's `_ped` is libparted itself; its package `parted` adds names and nothing that is needed.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from imgtool.engines.direct.wire import frames, seccomp

_DISK = "/tmp/disk"
_AT = 8  # bytes of an offset, before the sectors that lie there
_MOST_SAID = 16
_REFUSED = os.strerror(errno.EPERM)
# Of a partition, _ped.PARTITION_*: of no number, and free
_LOGICAL, _EXTENDED, _FREE, _METADATA = 1, 2, 4, 8
_HAS_NAMES = 2  # _ped.DISK_TYPE_PARTITION_NAME


def main() -> None:
    """Answer one question, on standard streams."""
    stream = sys.stdout.buffer
    # Whatever closes the sandbox has done so by now, and nothing of an image was looked at.
    frames.send(stream, frames.READY)
    stream.flush()
    import _ped

    seccomp.confine(seccomp.worker_filter())
    _, body = frames.receive(sys.stdin.buffer)
    asked = frames.parse_json(body)
    if not isinstance(asked, dict):
        raise frames.BadMessage("no question")
    path = asked["path"] or _write_disk(asked["size"])
    os.environ["PARTED_SECTOR_SIZE"] = str(asked["sector_size"])
    frames.send_json(stream, frames.JSON, _answer(_ped, path))
    frames.send(stream, frames.END)
    stream.flush()


def _write_disk(size: int) -> str:
    """The path of a file of this size, with the sectors that come in."""
    disk = os.open(_DISK, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(disk, size)
    while True:
        kind, body = frames.receive(sys.stdin.buffer)
        if kind != frames.DATA:
            break
        os.pwrite(disk, body[_AT:], int.from_bytes(body[:_AT], "big"))
    os.close(disk)
    return _DISK


def _answer(ped: Any, path: str) -> dict[str, object]:
    said: list[str] = []

    def resolve(kind: int, options: int, message: str) -> int:
        # The filter has no fsync(2), which libparted calls though nothing was written.
        if _REFUSED not in message and len(said) < _MOST_SAID:
            said.append(message.replace(path, "the disk"))
        for choice in (ped.EXCEPTION_RESOLVE_IGNORE, ped.EXCEPTION_RESOLVE_OK):
            if options & choice:
                return int(choice)
        return int(ped.EXCEPTION_RESOLVE_UNHANDLED)

    ped.register_exn_handler(resolve)
    try:
        disk = ped.disk_new(ped.device_get(path))
    except (
        *(ped.PartedException, ped.DeviceException, ped.DiskException, ped.DiskLabelException),
        *(ped.IOException, ped.PartitionException, ped.UnknownTypeException),
    ) as error:
        if not said:
            said.append(str(error).replace(path, "the disk"))
        return {"label": None, "rows": [], "said": said}
    rows = []
    part = disk.next_partition()
    while part is not None:
        if part.num > 0 and not part.type & (_FREE | _METADATA):
            rows.append(_row(ped, disk, part))
        part = disk.next_partition(part)
    return {"label": disk.type.name, "rows": rows, "said": said}


def _row(ped: Any, disk: Any, part: Any) -> list[object]:
    """A partition: number, kind, first sector, sectors, name, flags."""
    kind = {_LOGICAL: "logical", _EXTENDED: "extended"}.get(part.type & 3, "primary")
    name = None
    if disk.type.features & _HAS_NAMES:
        try:
            name = part.get_name()
        except (ValueError, ped.PartitionException):
            name = None  # not UTF-8
    flags, flag = [], ped.partition_flag_next(0)
    while flag:
        if part.is_flag_available(flag) and part.get_flag(flag):
            flags.append(ped.partition_flag_get_name(flag))
        flag = ped.partition_flag_next(flag)
    return [part.num, kind, part.geom.start, part.geom.length, name, flags]
