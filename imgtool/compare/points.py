"""What is compared: two points, each an image as it is now or as it was at a snapshot."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from imgtool.errors import UsageError
from imgtool.guest.guest_options import GuestOptions
from imgtool.image.chain.chain import Chain
from imgtool.opening import open_images
from imgtool.text import printable


@dataclass(frozen=True)
class Point(GuestOptions):
    """One side: the disks of a guest, at a `snapshot` or now."""

    image: Path

    def __str__(self) -> str:
        name = printable(self.image)
        return name if self.snapshot is None else f"{name} at {printable(self.snapshot)}"

    def chains(self) -> tuple[Chain, ...]:
        """The chains of the disks."""
        return open_images(
            [self.image, *self.add], format=self.format, backing_dirs=self.backing_dirs
        )


def two_points(
    before: Point, after: Point | None, *, snapshot_after: str | None
) -> tuple[Point, Point]:
    """The points that two images, or one and its snapshots, stand for.

    `before` may carry a snapshot; `snapshot_after` is that of the other side. Raises `UsageError`
    where only one point is named.
    """
    if after is not None:
        return before, replace(after, snapshot=snapshot_after)
    if before.snapshot == snapshot_after:
        raise UsageError(
            "there is nothing to compare it with"
            if snapshot_after is None
            else "both sides are the same snapshot",
            subject=printable(before.image),
            hint="name a second image, another snapshot, or give --against-base",
        )
    return before, replace(before, snapshot=snapshot_after)


def against_base(overlay: Point) -> tuple[Point, Point]:
    """An overlay and what it stands on, as before and after.

    A further disk that stands on nothing is the same on both sides. Raises `UsageError` where the
    first one does not.
    """
    chains = overlay.chains()
    active = chains[0]
    if len(active.links) == 1:
        raise UsageError(
            "it has no backing image",
            subject=printable(overlay.image),
            hint="name the image to compare it with: imgtool diff BEFORE AFTER",
        )
    below = [chain.links[min(1, len(chain.links) - 1)] for chain in chains]
    if len({link.format for link in below}) > 1:
        raise UsageError(
            "its disks stand on images of different formats, and one is taken for all",
            subject=printable(overlay.image),
            hint="leave -A out, and compare the first disk alone",
        )
    # The chain rule was kept from the overlay on: where its images are, the base's may be too.
    folders = (link.path.parent for chain in chains for link in chain.links)
    base = replace(
        overlay,
        image=below[0].path,
        add=[link.path for link in below[1:]],
        format=below[0].format,
        snapshot=None,
        backing_dirs=list(dict.fromkeys((*overlay.backing_dirs, *folders))),
    )
    return base, overlay


def links_apart(before: Point, after: Point) -> tuple[list[int | None], list[int | None]]:
    """Of each disk, for each side, how many links of its chain the other one has not.

    None where the sides have no link in common, or where that is not known: QEMU keeps no map of
    what an internal snapshot and the present have in common.
    """
    chains, others = before.chains(), after.chains()
    pairs = [
        _apart(one, other) if before.snapshot is None and after.snapshot is None else (None, None)
        for one, other in itertools.zip_longest(chains, others)
    ]
    return (
        [mine for mine, _ in pairs[: len(chains)]],
        [theirs for _, theirs in pairs[: len(others)]],
    )


def _apart(one: Chain | None, other: Chain | None) -> tuple[int | None, int | None]:
    if one is None or other is None:
        return None, None
    common = 0
    for mine, theirs in zip(reversed(one.links), reversed(other.links), strict=False):
        if mine.format != theirs.format or not mine.path.samefile(theirs.path):
            break
        common += 1
    if not common:
        return None, None
    return len(one.links) - common, len(other.links) - common
