"""Writing into a guest: what an engine that writes offers, besides reading.

What is written counts once the transaction around it is committed (`imgtool.opening`): until then
nothing of the image has changed, whatever has failed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import BinaryIO

from imgtool.guest.changes import Changes, Kept
from imgtool.guest.guest import Guest


class WritableGuest(Guest):
    """A guest that is open for writing. Paths are absolute, as the guest has them."""

    @abstractmethod
    def put(
        self,
        directory: bytes,
        produce: Callable[[BinaryIO], None],
        *,
        rename: bytes | None = None,
        kept: Kept = Kept(),
    ) -> None:
        """Unpack the tar stream that `produce` writes into a directory, all or nothing.

        With `rename` the one top-level name of the stream gets that name. Files that exist are
        replaced and keep their extended attributes, but for capabilities, and what `kept` says;
        directories that exist are merged into.
        Raises `RefusedError` where a directory and something else have the same name,
        `ImgtoolError` where the filesystem is full.
        """

    @abstractmethod
    def rewrite(self, path: bytes, content: bytes) -> None:
        """Replace the content of a regular file, which keeps all else. Raises `ImgtoolError`."""

    @abstractmethod
    def copy(self, path: bytes, new: bytes) -> None:
        """Copy a file within the guest, with its attributes. Raises `EngineError`."""

    @abstractmethod
    def apply(self, changes: Changes) -> bool:
        """Write all that was planned; whether relabelling, if that was asked for, found a wrong
        label.

        Raises `RefusedError` if the guest is not any more what the plan was made for,
        `ImgtoolError` where its filesystem is full, and `HostError` where files need SELinux labels
        that cannot be given.
        """
