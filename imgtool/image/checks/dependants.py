"""Which overlays stand on an image: to write to it would make garbage of them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from imgtool.errors import Force, Reason, RefusedError, join_names
from imgtool.image import headers
from imgtool.image.chain.chain import Chain
from imgtool.image.headers import Header
from imgtool.image.intent.intent_log import is_ours
from imgtool.image.locking.held import is_one_file, way_to
from imgtool.image.policy import AllowedDirs, folders_of
from imgtool.text import printable, typed

log = logging.getLogger(__name__)

IMAGE_DIRS_VARIABLE = "IMGTOOL_IMAGE_DIRS"
_MOST_FILES = 100_000

Identity = tuple[int, int]
OnError = Callable[[Path, OSError], None]


def _passed_over(path: Path, error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # libvirt's pool, where there is no libvirt
        log.info("%s: not looked at for images: %s", path, error)


def files_below(folder: Path, on_error: OnError = _passed_over) -> Iterator[Path]:
    """Every regular file in a folder and the folders below it; links to folders are not followed.

    A folder that cannot be read is passed over, after `on_error` was told.
    """
    pending = [folder]
    while pending:
        yield from _files_in(pending.pop(), pending, on_error)


def _files_in(
    folder: Path, below: list[Path] | None = None, on_error: OnError = _passed_over
) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # a symlink that leads in a circle, or astray
                    if below is not None and entry.is_dir(follow_symlinks=False):
                        below.append(Path(entry.path))
                    elif entry.is_file() and not is_ours(entry.name):
                        yield Path(entry.path)
    except OSError as error:
        on_error(folder, error)


class Overlays:
    """Which overlays stand on which images; each folder and each file is read once."""

    def __init__(self, backing_dirs: Sequence[str | Path] = ()) -> None:
        self._backing_dirs = backing_dirs
        self._folders: set[Path] = set()
        self._files = 0
        self._above: dict[Identity, dict[Identity, Path]] = {}
        self._above_id: dict[str, dict[Identity, Path]] = {}

    def add(self, header: Header) -> None:
        """Take note of what an image stands on."""
        there = False
        for below in headers.bases_of(header):
            with contextlib.suppress(OSError, ValueError):  # it stands on nothing that is there
                named = way_to(below).stat()
                above = self._above.setdefault((named.st_dev, named.st_ino), {})
                above.setdefault(header.identity, header.path)
                there = True
        if header.parent_id is not None and not there:  # it may be there under another name
            self._above_id.setdefault(header.parent_id, {})[header.identity] = header.path

    def on(self, path: Path, beside: Sequence[Path] = ()) -> list[Path]:
        """The images that name `path` as their backing file, or as their parent by its id: those
        of `overlays_on`, and those that were added."""
        return sorted(self.seen_on(path, beside))

    def seen_on(self, path: Path, beside: Sequence[Path] = ()) -> dict[Path, Identity]:
        """`on`, with which files they were when they were looked at."""
        base = way_to(path).stat()
        folders = [*AllowedDirs.around(path, self._backing_dirs).folders]
        folders += [folder for name in (path, *beside) for folder in folders_of(name)]
        self._look_in(folders, _files_in)
        named = os.environ.get(IMAGE_DIRS_VARIABLE, "").split(":")
        self._look_in([Path(folder) for folder in named if folder], files_below)
        above = {**self._above.get((base.st_dev, base.st_ino), {})}
        own = headers.read(path) if self._above_id else None
        if own is not None and own.id is not None:
            above |= self._above_id.get(own.id, {})
        return {overlay: identity for identity, overlay in above.items()}

    def _look_in(self, folders: Sequence[Path], files: Callable[[Path], Iterator[Path]]) -> None:
        for folder in folders:
            if folder in self._folders:
                continue
            self._folders.add(folder)
            for file in files(folder):
                self._files += 1
                if self._files > _MOST_FILES:
                    log.warning("more than %d files to look for overlays in", _MOST_FILES)
                    return
                with contextlib.suppress(OSError):  # gone, or unreadable
                    if (header := headers.read(file)) is not None:
                        self.add(header)


def overlays_on(
    path: Path, backing_dirs: Sequence[str | Path] = (), *, beside: Sequence[Path] = ()
) -> list[Path]:
    """The images that name `path` as their backing file.

    Looked at are the folders that a chain may use, those of the links that lead to `path`, and
    those of what is `beside` it, all without what is below them, and those of IMGTOOL_IMAGE_DIRS
    with all that is below: an overlay in another folder is not found.
    """
    return Overlays(backing_dirs).on(path, beside)


def refuse_if_base(
    chain: Chain,
    backing_dirs: Sequence[str | Path] = (),
    *,
    but_for: Path | None = None,
    force: Force = (),
) -> None:
    """Raise `RefusedError` if an overlay stands on the active image, other than `but_for`."""
    if Reason.IS_BASE in force:
        return
    path = chain.active.path
    overlays = [
        overlay
        for overlay in overlays_on(path, backing_dirs, beside=[but_for] if but_for else [])
        if but_for is None or not is_one_file(overlay, but_for)
    ]
    if overlays:
        names = join_names(printable(overlay) for overlay in overlays)
        freed = f"imgtool overlay flatten {typed(overlays[0])}"
        if len(overlays) > 1:
            freed += ", and each of the others"
        raise RefusedError(
            f"it is the base of {'an overlay' if len(overlays) == 1 else 'overlays'}: {names}",
            subject=printable(path),
            # Of another overlay's base only the first half helps.
            hint=f"let {'it' if len(overlays) == 1 else 'them'} stand alone first: {freed}"
            + ("" if but_for else "; or write to the overlay; what is written to a base ruins it"),
            reason=Reason.IS_BASE,
        )
