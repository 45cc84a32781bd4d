"""Which overlays stand on an image: to write to it would make garbage of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.errors import RefusedError
from imgtool.image import headers
from imgtool.image.chain import Chain
from imgtool.image.places import Places, printable

log = logging.getLogger(__name__)

IMAGE_DIRS_VARIABLE = "IMGTOOL_IMAGE_DIRS"
_MOST_FILES = 100_000


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file in a folder and the folders below it; links to folders are not followed.

    A folder that cannot be read is passed over.
    """
    pending = [folder]
    while pending:
        yield from _files_in(pending.pop(), pending)


def _files_in(folder: Path, below: list[Path] | None = None) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if below is not None and entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))
                elif entry.is_file():
                    yield Path(entry.path)
    except OSError as error:
        log.info("%s: not looked at for images: %s", folder, error)


def _candidates(path: Path, backing_dirs: Sequence[str | Path]) -> Iterator[Path]:
    for folder in Places.around(path, backing_dirs).folders:
        yield from _files_in(folder)
    for named in os.environ.get(IMAGE_DIRS_VARIABLE, "").split(":"):
        if named:
            yield from files_below(Path(named))


def overlays_on(path: Path, backing_dirs: Sequence[str | Path] = ()) -> list[Path]:
    """The images that name `path` as their backing file.

    Looked at are the folders that a chain may use, without what is below them, and those of
    IMGTOOL_IMAGE_DIRS with all that is below: an overlay in another folder is not found.
    """
    base = path.stat()
    found = {}
    for number, file in enumerate(_candidates(path, backing_dirs)):
        if number == _MOST_FILES:
            log.warning("%s: more than %d files to look for overlays in", path, _MOST_FILES)
            break
        try:
            header = headers.read(file)
            below = headers.base_of(header) if header else None
            named = below.stat() if below else None
        except (OSError, ValueError):
            continue  # gone, unreadable, or it stands on nothing that is there
        if header and named and (named.st_dev, named.st_ino) == (base.st_dev, base.st_ino):
            found[header.identity] = file
    return sorted(found.values())


def refuse_if_base(
    chain: Chain, backing_dirs: Sequence[str | Path] = (), *, but_for: Path | None = None
) -> None:
    """Raise `RefusedError` if an overlay stands on the active image, other than `but_for`."""
    path = chain.active.path
    overlays = [
        overlay
        for overlay in overlays_on(path, backing_dirs)
        if but_for is None or not overlay.samefile(but_for)
    ]
    if overlays:
        names = ", ".join(printable(overlay) for overlay in overlays[:5])
        more = f" and {len(overlays) - 5} more" if len(overlays) > 5 else ""
        raise RefusedError(
            f"it is the base of {'an overlay' if len(overlays) == 1 else 'overlays'}:"
            f" {names}{more}",
            subject=printable(path),
            hint="write to the overlay; what is written to its base would make garbage of it",
        )
