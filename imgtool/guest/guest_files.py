"""The files of an open guest, for whoever only looks into a few of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import BinaryIO

from imgtool.errors import EngineError, NotInGuestError
from imgtool.guest.guest import Guest


class GuestFiles:
    """`imgtool.formats.files.Files` on a guest; what cannot be read is not there."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def read(self, path: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a regular file, links followed; None if there is none."""
        try:
            with self._guest.open_range(path, 0, limit) as stream:
                return stream.read()
        except (EngineError, NotInGuestError):
            return None

    def file_header(self, path: str, length: int) -> bytes | None:
        """The first `length` bytes of a regular file, links followed; None if there is none."""
        return self.read(path, length)

    def is_dir(self, path: str) -> bool:
        """Whether the path is a directory, links followed."""
        try:
            return self._guest.lstat(self._guest.resolve(path)).type == "directory"
        except (EngineError, NotInGuestError):
            return False

    def names(self, path: str) -> list[bytes]:
        """The names in a directory, as far as it can be read; none if there is no such."""
        if not self.is_dir(path):
            return []
        found = self._guest.entries(self._guest.resolve(path), on_problem=lambda path, line: None)
        return [entry.name for entry in found]

    def open(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A regular file as a stream, links followed."""
        return self._guest.open(path)
