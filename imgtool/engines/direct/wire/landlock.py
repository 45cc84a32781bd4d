"""Landlock: a process gives up all files but some, for good, without a namespace and any right.

What a file's rule says holds for the file itself, whatever leads to it: a name that leads elsewhere
by now opens nothing. Version 1 sees files that are opened, made and removed, and programs that are
started. It does not see stat(2), chmod(2), truncate(2), O_TRUNC and ioctl(2); that is left to the
filter for system calls. Later versions see more, and get it.

Source: landlock(7), linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from imgtool.engines.direct.wire.libc import libc
from imgtool.engines.direct.wire.syscalls import number

_VERSION = 1  # flag of landlock_create_ruleset(2)
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

RUN, WRITE, READ, LIST = 1, 1 << 1, 1 << 2, 1 << 3
# How many rights to files each version knows: 13, moving into other folders, O_TRUNC, ioctl(2).
_RIGHTS = (13, 14, 15, 15, 16)
_TCP = 0b11  # bind and connect, from version 4
_SCOPES = 0b11  # abstract sockets and signals, from version 6

# What may be done to the file (or to all in the folder) of a descriptor.
Rule = tuple[int, int]


def _call(name: str, *arguments: object) -> int:
    done: int = libc.syscall(ctypes.c_long(number(name) or -1), *arguments)
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def version() -> int:
    """The version that this kernel has; 0 for none, or none that may be used."""
    try:
        return _call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    except OSError:
        return 0


def restrict(rules: Iterable[Rule], *, newest: int = 1 << 30) -> None:
    """Give up all files but those of `rules`; of Landlock no version after `newest` is used.

    Raises `OSError` where the kernel has none.
    """
    known = min(version(), newest)
    rights = (1 << _RIGHTS[min(max(known, 1), len(_RIGHTS)) - 1]) - 1
    attributes = struct.pack("=Q", rights)
    if known >= 4:
        attributes += struct.pack("=Q", _TCP)
    if known >= 6:
        attributes += struct.pack("=Q", _SCOPES)
    ruleset = _call(
        "landlock_create_ruleset",
        attributes,
        ctypes.c_size_t(len(attributes)),
        ctypes.c_uint32(0),
    )
    for descriptor, allowed in rules:
        rule = struct.pack("=Qi", allowed, descriptor)
        _call("landlock_add_rule", ruleset, ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "new privileges cannot be given up")
    _call("landlock_restrict_self", ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
