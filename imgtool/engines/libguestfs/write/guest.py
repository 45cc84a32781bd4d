"""The guest as the appliance sees it: reading and writing."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest
from imgtool.engines.libguestfs.write import apply, changing, writing
from imgtool.guest.changes import Changes, Kept
from imgtool.guest.writable import WritableGuest


class LibguestfsWritableGuest(LibguestfsGuest, WritableGuest):
    """A guest on overlays that the appliance writes to."""

    def put(
        self,
        directory: bytes,
        produce: Callable[[BinaryIO], None],
        *,
        rename: bytes | None = None,
        kept: Kept = Kept(),
    ) -> None:
        writing.put(self, directory, produce, rename=rename, kept=kept)

    def rewrite(self, path: bytes, content: bytes) -> None:
        changing.rewrite(self, path, content)

    def copy(self, path: bytes, new: bytes) -> None:
        self.calls.copy(path, new)

    def apply(self, changes: Changes) -> bool:
        return apply.apply_changes(self, changes)
