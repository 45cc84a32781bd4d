"""What `chain check` finds, without the command."""

from __future__ import annotations

from pathlib import Path

from imgtool.image.checks.checking import ChainCheck
from imgtool.image.checks.findings import Finding


def check_chain(path: Path, *, metadata: bool = True) -> tuple[Finding, ...]:
    """What there is to say of the chain that starts at `path`; nothing if all is well."""
    return tuple(ChainCheck(metadata=metadata).chain(path))
