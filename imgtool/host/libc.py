"""The C library of this process, for calls that Python has not. What runs confined has its own, in
`engines/direct/wire/libc.py`: of the host's modules it may import none but those that start a
program."""

from __future__ import annotations

import ctypes

libc = ctypes.CDLL(None, use_errno=True)
libc.free.argtypes = [ctypes.c_void_p]  # an int would lose half of a pointer
