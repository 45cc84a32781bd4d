"""What must come of some of the images, where it is known without imgtool.

By the end of an image's path, then by command: see `tests.corpus.look.look`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPECTED: Mapping[str, Mapping[str, Any]] = {
    # fsck.fat: a chain of clusters that runs in a circle, after 3 clusters of 4096 bytes.
    "dosfstools/tests-check-circular_chain.fsck": {
        "ls": {"status": 1},
        "copy-out": {"status": 1},
    },
}
