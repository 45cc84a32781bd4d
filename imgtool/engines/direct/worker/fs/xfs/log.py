"""Whether an XFS log is clean: its last record says that the filesystem was unmounted.

Source: "XFS Algorithms & Data Structures", and Linux 6.1, fs/xfs/xfs_log_recover.c
(xlog_find_head, xlog_check_unmount_rec).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import Source
from imgtool.engines.direct.worker.fs.xfs.superblock import Superblock

_LOG_BLOCK = 512
_LOG_MAGIC = 0xFEEDBABE
_LOG_SCAN_BLOCKS = 4096  # eight records of 256 KiB can be in flight when a machine stops
_LOG_CYCLE_BYTES = 32 << 10
_LOG_CLIENT, _LOG_UNMOUNT = 0xAA, 0x20


def require_clean_log(source: Source, superblock: Superblock) -> None:
    """Raise `Unsupported` unless the last record of the log is an unmount record.

    As xlog_find_tail does: the first word of every log block is the cycle in which it was written,
    so the head is where the cycle drops by one (or to zero, in a log that was never full). With one
    cycle throughout, the last record ends where the log does, and the next begins at its start.
    A last record that goes on at the start of the log is not followed: it is refused.
    """
    start = superblock.block_offset(superblock.log_start, superblock.log_blocks)
    total = superblock.log_blocks * superblock.block_size // _LOG_BLOCK
    if start is None or not 256 <= total <= (2 << 30) // _LOG_BLOCK:
        raise Unsupported("the XFS log lies outside the filesystem")

    def cycle(block: int) -> int:
        # The first word of a record's header is a magic number; its cycle is the second.
        magic, number = struct.unpack(">II", source.read(start + block * _LOG_BLOCK, 8))
        return int(number if magic == _LOG_MAGIC else magic)

    first, last = cycle(0), cycle(total - 1)
    if not first or last not in (0, first - 1, first):
        raise Unsupported("the head of the XFS log was not found")
    head = total if last == first else _find_drop(cycle, total, first, last)

    # Blocks that were in flight when the machine stopped leave holes before or after the head.
    _require_cycle(source, start, max(0, head - _LOG_SCAN_BLOCKS), head, first)
    after = head % total
    _require_cycle(source, start, after, min(total, after + _LOG_SCAN_BLOCKS), last)
    _require_unmount_record(source, start, head, first)


def _find_drop(cycle: Callable[[int], int], total: int, first: int, last: int) -> int:
    """The block at which the cycle falls from that of the first block to that of the last."""
    low, head = 0, total - 1
    while head - low > 1:
        middle = (low + head) // 2
        number = cycle(middle)
        if number not in (first, last):
            raise Unsupported("the XFS log has blocks of three cycles")
        low, head = (middle, head) if number == first else (low, middle)
    return head


def _require_cycle(source: Source, start: int, begin: int, end: int, cycle: int) -> None:
    data = source.read(start + begin * _LOG_BLOCK, (end - begin) * _LOG_BLOCK)
    for magic, number in struct.iter_unpack(">II504x", data):
        if (number if magic == _LOG_MAGIC else magic) != cycle:
            raise Unsupported("the XFS log has holes: it was not unmounted")


def _require_unmount_record(source: Source, start: int, head: int, cycle: int) -> None:
    begin = max(0, head - _LOG_SCAN_BLOCKS)
    data = source.read(start + begin * _LOG_BLOCK, (head - begin) * _LOG_BLOCK)
    at = len(data) - _LOG_BLOCK
    while at >= 0 and data[at : at + 4] != b"\xfe\xed\xba\xbe":
        at -= _LOG_BLOCK
    if at < 0:
        raise Unsupported("the last record of the XFS log was not found")
    number, version, length = struct.unpack_from(">III", data, at + 4)
    operations, size = (
        int.from_bytes(data[at + where : at + where + 4], "big") for where in (40, 320)
    )
    headers = 1
    if version & 2 and size > _LOG_CYCLE_BYTES:
        headers = min(-(-size // _LOG_CYCLE_BYTES), 8)
    body = at + headers * _LOG_BLOCK
    end = body + -(-length // _LOG_BLOCK) * _LOG_BLOCK
    if number != cycle or version not in (1, 2) or end != len(data) or body >= end:
        raise Unsupported("the XFS log ends in a record of another length: not unmounted")
    if operations != 1 or data[body + 8] != _LOG_CLIENT or not data[body + 9] & _LOG_UNMOUNT:
        raise Unsupported("the XFS log is dirty: it was not unmounted")
