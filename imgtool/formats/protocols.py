"""What QEMU takes for a protocol in the name of a file."""

from __future__ import annotations


def protocol_of(name: str) -> str | None:
    """The protocol of a file name, by QEMU's rule: what stands before a colon before any slash."""
    head, colon, _ = name.partition("/")[0].partition(":")
    return head if colon else None
