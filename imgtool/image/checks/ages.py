"""Whether a base is older than its overlay, as it has to be, by the times of their files.

Nothing in an overlay tells what was in its base. So its times are all that tell of a base that was
changed or replaced, and work that changes neither for a guest keeps them in order.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import ImgtoolError
from imgtool.image import headers
from imgtool.image.chain.info import ImageInfo
from imgtool.image.chain.steady import is_out_of_reach
from imgtool.image.checks.dependants import Overlays
from imgtool.image.intent.intent_log import Record, is_name, last_write_time
from imgtool.image.locking.held import is_one_file, real_path, way_to
from imgtool.image.locking.host_file import Identity, open_host_file
from imgtool.image.policy import name_from


def change_time(link: ImageInfo) -> int:
    """When the newest of an image's files was changed, in nanoseconds; 0 for a device, which does
    not tell."""
    times = [0]
    for path in link.files:
        try:
            if way_to(path).is_file():
                times.append(way_to(path).stat().st_mtime_ns)
        except OSError:
            continue  # gone since it was opened
    return max(times)


def newer_bases(links: Sequence[ImageInfo]) -> Iterator[tuple[ImageInfo, ImageInfo]]:
    """Each overlay of a chain with its base, where that was changed after it.

    Two files that are sure to have been copied in one go are not among them.
    """
    for number, (overlay, base) in enumerate(itertools.pairwise(links)):
        if headers.is_newer(change_time(base), change_time(overlay)):
            from imgtool.image.checks.copied import copied_together

            if not copied_together(links[number:]):
                yield overlay, base


@contextlib.contextmanager
def kept_younger(image: Path, backing_dirs: Sequence[str | Path] = ()) -> Iterator[None]:
    """What is done to an image in the block changes nothing that a guest sees in it: overlays that
    are not older than it before are not so after, nor what stands on them.

    Where this user may not set the time of an overlay, `chain check` takes its base for changed.
    """
    above = list(_in_order(image, backing_dirs))
    try:
        yield
    finally:
        for base, overlay, identity in above:
            _make_younger(base, overlay, identity)


def _make_younger(base: Path, overlay: Path, identity: Identity) -> None:
    with contextlib.suppress(OSError, ImgtoolError):  # not this user's, or removed by the work
        after = way_to(base).stat().st_mtime_ns
        # Not by its name: where another user may write, that can lead to any file by now.
        with open_host_file(overlay, noted=identity) as file:
            before = os.fstat(file.fileno())
            if headers.is_newer(after, before.st_mtime_ns) and _goes_with(base, overlay, file):
                os.utime(file.fileno(), ns=(before.st_atime_ns, after))


def _goes_with(base: Path, overlay: Path, file: BinaryIO) -> bool:
    """Whether an overlay is of the owner of its base, or in the base's folder: where another user
    may write, an overlay can have been a link to any file already when it was found."""
    if is_out_of_reach(overlay):
        return True
    below, folder = way_to(base), Path(f"/proc/self/fd/{file.fileno()}").resolve().parent
    return os.fstat(file.fileno()).st_uid == below.stat().st_uid or folder == below.resolve().parent


@contextlib.contextmanager
def kept_as_noted(
    record: Record, image: Path, backing_dirs: Sequence[str | Path] = ()
) -> Iterator[None]:
    """As `kept_younger`, for work on an image that may have been cut off before: overlays that its
    record notes as younger are so after it, where nobody but the work has written to the image.

    Where the block raises, those stay as they are for whoever settles it.
    """
    noted = _noted_as_younger(record, image)
    with kept_younger(image, backing_dirs):
        yield
    for overlay, identity in noted:
        with kept_younger(overlay, backing_dirs):
            _make_younger(image, overlay, identity)


def younger(image: Path, backing_dirs: Sequence[str | Path] = ()) -> list[str]:
    """What a record notes before the work: the overlays that are not older than their base."""
    folder = real_path(image).parent
    return [
        name_from(folder, overlay.resolve())
        for base, overlay, _ in _in_order(image, backing_dirs)
        if base == image
    ]


def _noted_as_younger(record: Record, image: Path) -> list[tuple[Path, Identity]]:
    names, found = record.facts.get("younger"), []
    with contextlib.suppress(OSError):
        changed = way_to(image).stat().st_mtime_ns
        if changed > last_write_time(record):
            return []
    for name in filter(is_name, names if isinstance(names, list) else ()):
        overlay = real_path(image).parent / name
        with contextlib.suppress(OSError, ValueError):
            header = headers.read(overlay)
            base = headers.base_of(header) if header is not None else None
            if header is not None and base is not None and is_one_file(base, image):
                found.append((overlay, header.identity))
    return found


def _in_order(
    image: Path, backing_dirs: Sequence[str | Path], seen: frozenset[Path] = frozenset()
) -> Iterator[tuple[Path, Path, Identity]]:
    for overlay, identity in sorted(Overlays(backing_dirs).seen_on(image).items()):
        known = overlay.resolve() in seen
        times = (way_to(path).stat().st_mtime_ns for path in (image, overlay))
        if not known and not headers.is_newer(*times):
            yield image, overlay, identity
            yield from _in_order(overlay, backing_dirs, seen | {overlay.resolve()})
