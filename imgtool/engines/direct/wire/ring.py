"""Memory that the worker and its parent share, for the bytes of large files: slots that the worker
fills, tells of, and fills again when the parent has said that it is done with them.

The worker may write into it whatever and whenever it likes: what is in there is the content of a
guest's file, no more. It can neither shrink nor grow, so that no page that the parent looks at can
go away.
"""

from __future__ import annotations

import fcntl
import struct

SLOT = 2 << 20
SLOTS = 8
SIZE = SLOT * SLOTS
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PLACE = struct.Struct(">II")
