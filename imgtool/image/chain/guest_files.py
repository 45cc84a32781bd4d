"""The host's files that hold a guest: what comes out of it may be written over none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import RefusedError
from imgtool.image.chain.chain import Chain
from imgtool.image.intent.intent_log import record_path
from imgtool.text import printable

Identity = tuple[int, int]


class GuestFiles:
    """All files of some chains, the links by which they are reached, and the records beside them;
    told by what they are, so under any of their names."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._known: dict[Identity, Path] = {}
        for chain in chains:
            for path in chain.files:
                self._add(path, follow=True)
                for name in (path, record_path(path), *_links(path)):
                    self._add(name, follow=False)

    def _add(self, name: Path, *, follow: bool) -> None:
        if (found := _identity(name, None, follow)) is not None:
            self._known.setdefault(found, name)

    def at(self, name: str | bytes | Path, folder: int | None = None) -> Path | None:
        """Which of them a name is, or leads to; below the folder of a descriptor, if given."""
        for follow in (False, True):
            found = _identity(name, folder, follow)
            if found is not None and found in self._known:
                return self._known[found]
        return None

    def refuse(
        self, name: str | bytes | Path, folder: int | None = None, *, shown: object = None
    ) -> None:
        """Raise `RefusedError` if a name is one of them; `shown` is what it is called then."""
        if (known := self.at(name, folder)) is not None:
            raise _refusal(known, printable(os.fsdecode(name)) if shown is None else shown)

    def refuse_output(self, stream: BinaryIO) -> None:
        """Raise `RefusedError` if what is written to a stream goes into one of them."""
        try:
            status = os.fstat(stream.fileno())
        except OSError:
            return  # no file of the host at all
        if (known := self._known.get((status.st_dev, status.st_ino))) is not None:
            raise _refusal(known, "standard output")


def _refusal(known: Path, subject: object) -> RefusedError:
    return RefusedError(
        f"it is a file that the guest is read from: {printable(known)}",
        subject=subject,
        hint="choose another destination",
    )


def _links(path: Path) -> Iterator[Path]:
    """The symbolic links among the folders that lead to a file."""
    for folder in path.absolute().parents:
        if folder.is_symlink():
            yield folder


def _identity(name: str | bytes | Path, folder: int | None, follow: bool) -> Identity | None:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=follow)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
