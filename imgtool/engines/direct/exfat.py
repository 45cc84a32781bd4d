"""exFAT: left to the appliance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from imgtool.engines.direct.filesystem import Filesystem, NeedsAppliance, Node, Source, Usage


class ExfatFilesystem(Filesystem):
    """Never opens: nothing here has been compared with the kernel's exfat."""

    type = "exfat"
    ignores_case = True

    @classmethod
    def open(cls, source: Source) -> ExfatFilesystem:
        """Always `NeedsAppliance`."""
        raise NeedsAppliance("exFAT is read by the appliance alone")

    def stat(self, inode: int) -> Node:
        raise NotImplementedError

    def names(self, inode: int) -> Iterator[tuple[bytes, int]]:
        raise NotImplementedError

    def target(self, inode: int) -> bytes:
        raise NotImplementedError

    def read(self, inode: int, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def ranges(self, inode: int) -> Sequence[tuple[int, int]]:
        raise NotImplementedError

    def usage(self) -> Usage:
        raise NotImplementedError
