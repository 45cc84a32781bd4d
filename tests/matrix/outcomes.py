"""What must come of each kind of qcow2 under each operation: done, or refused with one status."""

from __future__ import annotations

from collections.abc import Mapping

# Kinds that are refused for one reason.
GROUPS: Mapping[str, str] = {
    "no-snapshots": "plain compat-0.10 bitmaps zlib zstd refcounts-1 preallocated overlay"
    " overlay-absolute overlay-larger overlay-bitmaps",
    "no-overlays": "plain compat-0.10 compat-0.10-snapshots snapshots memory other-sizes bitmaps"
    " bitmaps-snapshots bitmaps-in-use lazy dirty extended-l2 zlib zstd clusters-512 clusters-2m"
    " refcounts-64 refcounts-1 preallocated data-file data-file-raw encrypted encrypted-aes",
    # QEMU would need a key.
    "locked": "encrypted encrypted-aes",
    # A part of the image is in a file that is not worked on.
    "two-files": "data-file data-file-raw",
}

# One line an operation: the kinds, or groups of them, that are refused, and the exit status after
# them. All else is done, status 0. `dirty` is refused where only a repair of all may write; QEMU
# reverts nothing beside a bitmap; snapshots would not survive a flatten or rebase.
REFUSED = """
check:           dirty locked 3
chain-check:     locked 3
info:
recover:
repair-leaks:    locked 3, dirty 4
repair-all:      locked 3
snapshot-create: locked two-files refcounts-1 3, dirty 4
snapshot-delete: locked two-files 3, dirty 4, no-snapshots 5
revert:          locked two-files 3, dirty bitmaps-snapshots bitmaps-in-use overlay-bitmaps-snapshots 4, no-snapshots 5
revert-saving:   locked two-files 3, dirty bitmaps-snapshots bitmaps-in-use overlay-bitmaps-snapshots 4, no-snapshots 5
resize:          locked 3, dirty compat-0.10-snapshots bitmaps-in-use 4
compact:         locked two-files 3, dirty 4
overlay:         locked 3
commit-into:     locked two-files 3, dirty 4
commit-removing: locked two-files 3, dirty 4
flatten:         no-overlays 3, overlay-snapshots overlay-bitmaps-snapshots 4
rebase:          no-overlays 3, overlay-snapshots overlay-bitmaps-snapshots 4
convert:         locked 3
write:           dirty locked 4
"""  # noqa: E501


def read_refused(text: str) -> dict[str, dict[str, int]]:
    """By operation: the kinds that are refused, each with its exit status.

    Raises `ValueError` for an operation with two lines, a kind with two statuses in one, or kinds
    without a status.
    """
    refused: dict[str, dict[str, int]] = {}
    for line in text.strip().splitlines():
        operation, _, parts = line.partition(":")
        if operation in refused:
            raise ValueError(f"{operation} has two lines")
        statuses: dict[str, int] = {}
        for part in filter(None, map(str.strip, parts.split(","))):
            *names, last = part.split()
            status = int(last)
            for kind in " ".join(GROUPS.get(name, name) for name in names).split():
                if kind in statuses:
                    raise ValueError(f"{operation} has two statuses for {kind}")
                statuses[kind] = status
        refused[operation] = statuses
    return refused


_REFUSED = read_refused(REFUSED)


def outcome(kind: str, operation: str) -> int:
    """The exit status that there must be."""
    return _REFUSED[operation].get(kind, 0)
