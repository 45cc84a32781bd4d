"""Hashing passwords with the host's libcrypt (libxcrypt), as passwd and PAM do: crypt(5).

Python's own `crypt` is gone from 3.13 on, and takes no yescrypt salt.
"""

from __future__ import annotations

import ctypes
import hmac
import re
from ctypes import POINTER, byref, c_char_p, c_int, c_ulong, c_void_p
from functools import cache

from imgtool.errors import HostError
from imgtool.host.libc import libc

YESCRYPT, SHA512 = "$y$", "$6$"
# Hashes that are computed anew to compare: a guest could ask for hours or all memory with others.
# Of yescrypt only libxcrypt's own cost factor, 16 MiB and some 50 ms.
_HARMLESS = re.compile(rb"\$(6|5)\$(rounds=\d{4,6}\$)?[^$:\s]{0,16}\$[^$:\s]+|\$y\$j9T\$[^:\s]+")


@cache
def _library() -> ctypes.CDLL:
    for name in ("libcrypt.so.1", "libcrypt.so.2"):
        try:
            library = ctypes.CDLL(name)
            library.crypt_ra.restype = c_void_p
            library.crypt_ra.argtypes = [c_char_p, c_char_p, POINTER(c_void_p), POINTER(c_int)]
            library.crypt_gensalt_ra.restype = c_void_p
            library.crypt_gensalt_ra.argtypes = [c_char_p, c_ulong, c_char_p, c_int]
        except (OSError, AttributeError):
            continue
        return library
    raise HostError(
        "libxcrypt is not installed, and passwords are hashed with it",
        subject="libcrypt.so.1",
        hint="install libcrypt1 (Debian) or libxcrypt",
    )


def _crypt(password: bytes, setting: bytes) -> bytes | None:
    data, size = c_void_p(), c_int()
    try:
        found = _library().crypt_ra(password, setting, byref(data), byref(size))
        hashed = ctypes.string_at(found) if found else b"*0"
    finally:
        libc.free(data)
    return None if hashed.startswith(b"*") else hashed


def hash_password(password: bytes, method: str) -> str:
    """A new hash, with a salt of the host's random numbers; `method` is `YESCRYPT` or `SHA512`."""
    salt = _library().crypt_gensalt_ra(method.encode(), 0, None, 0)
    try:
        setting = ctypes.string_at(salt) if salt else b"*0"
    finally:
        libc.free(salt)
    found = _crypt(password, setting)
    if found is None:
        raise HostError("the host's libcrypt cannot make such a hash", subject=method)
    return found.decode("ascii")


def verifies(password: bytes, stored: str) -> bool:
    """Whether a hash from a guest is one of this password.

    Hashes that are unusual, or costly to look at, count as another password's.
    """
    raw = stored.encode("utf-8", "surrogateescape")
    if not _HARMLESS.fullmatch(raw):
        return False
    found = _crypt(password, raw)
    return found is not None and hmac.compare_digest(found, raw)
