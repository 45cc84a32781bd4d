"""What looking at a guest's operating system needs: its files, and a way to say "not certain"."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

# What libguestfs calls a small file; it reads no configuration file beyond it.
SMALL_FILE = 2 * 1048 * 1024


class Undetermined(Exception):
    """It is not certain what libguestfs would say. The message is the reason."""


class Files(Protocol):
    """The files of a guest whose layout is mounted."""

    def read(self, path: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a regular file, links followed; None if there is none."""

    def is_dir(self, path: str) -> bool:
        """Whether the path is a directory, links followed."""

    def names(self, path: str) -> list[bytes]:
        """The names in a directory; none if there is no such directory."""

    def file_header(self, path: str, length: int) -> bytes | None:
        """The first `length` bytes of a regular file, links followed; None if there is none."""

    def open(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A regular file as a stream, links followed."""


def small(files: Files, path: str) -> bytes | None:
    """A configuration file, cut one byte past `SMALL_FILE`; None if there is none."""
    content = files.read(path, SMALL_FILE + 1)
    if content is not None and b"\0" in content:
        raise Undetermined(f"{path} has a NUL byte")
    return content


def text(value: bytes) -> str:
    """Text of a guest; what is not UTF-8 becomes U+FFFD."""
    return value.decode("utf-8", "replace")
