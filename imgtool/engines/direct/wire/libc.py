"""The C library of a process that confines itself. Both sides of the sandbox import `wire`, which
imports nothing of the host's: hence not `host/libc.py`."""

from __future__ import annotations

import ctypes

libc = ctypes.CDLL(None, use_errno=True)
