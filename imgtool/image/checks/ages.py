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

from imgtool.formats import headers
from imgtool.image.chain.info import ImageInfo
from imgtool.image.checks.dependants import overlays_on
from imgtool.image.intent.intent_log import Record, ended, is_name
from imgtool.image.policy import name_from


def changed(link: ImageInfo) -> int:
    """When the newest of an image's files was changed, in nanoseconds; 0 for a device, which does
    not tell."""
    times = [0]
    for path in link.files:
        try:
            if path.is_file():
                times.append(path.stat().st_mtime_ns)
        except OSError:
            continue  # gone since it was opened
    return max(times)


def newer_bases(links: Sequence[ImageInfo]) -> Iterator[tuple[ImageInfo, ImageInfo]]:
    """Each overlay of a chain with its base, where that was changed after it.

    Two files that are sure to have been copied in one go are not among them.
    """
    for number, (overlay, base) in enumerate(itertools.pairwise(links)):
        if headers.is_newer(changed(base), changed(overlay)):
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
        for base, overlay in above:
            _make_younger(base, overlay)


def _make_younger(base: Path, overlay: Path) -> None:
    with contextlib.suppress(OSError):  # not this user's, or removed by the work
        before, after = overlay.stat(), base.stat().st_mtime_ns
        if headers.is_newer(after, before.st_mtime_ns):
            os.utime(overlay, ns=(before.st_atime_ns, after))


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
    for overlay in noted:
        with kept_younger(overlay, backing_dirs):
            _make_younger(image, overlay)


def younger(image: Path, backing_dirs: Sequence[str | Path] = ()) -> list[str]:
    """What a record notes before the work: the overlays that are not older than their base."""
    folder = image.resolve().parent
    return [
        name_from(folder, overlay.resolve())
        for base, overlay in _in_order(image, backing_dirs)
        if base == image
    ]


def _noted_as_younger(record: Record, image: Path) -> list[Path]:
    names, found = record.facts.get("younger"), []
    with contextlib.suppress(OSError):
        if not isinstance(names, list) or image.stat().st_mtime_ns > ended(record):
            return []
    for name in filter(is_name, names or ()):
        overlay = image.resolve().parent / name
        with contextlib.suppress(OSError, ValueError):
            header = headers.read(overlay)
            base = headers.base_of(header) if header is not None else None
            if base is not None and base.samefile(image):
                found.append(overlay)
    return found


def _in_order(
    image: Path, backing_dirs: Sequence[str | Path], seen: frozenset[Path] = frozenset()
) -> Iterator[tuple[Path, Path]]:
    for overlay in overlays_on(image, backing_dirs):
        known = overlay.resolve() in seen
        if not known and not headers.is_newer(image.stat().st_mtime_ns, overlay.stat().st_mtime_ns):
            yield image, overlay
            yield from _in_order(overlay, backing_dirs, seen | {overlay.resolve()})
