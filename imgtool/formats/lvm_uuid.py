"""UUIDs of LVM, which are 32 letters and digits."""

from __future__ import annotations

import itertools

_CUTS = (0, 6, 10, 14, 18, 22, 26, 32)


def with_dashes(uuid: str) -> str:
    """A UUID as LVM's commands write it: 6-4-4-4-4-4-6."""
    plain = uuid.replace("-", "")
    return "-".join(plain[a:b] for a, b in itertools.pairwise(_CUTS))
