"""All images below some folders, and what stands on what: told by headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgtool.errors import ImageError
from imgtool.image import headers
from imgtool.image.dependants import files_below
from imgtool.image.headers import Header
from imgtool.image.locks import holders, locked_inodes
from imgtool.image.places import printable

_RAW_SUFFIXES = (".raw", ".img")

Identity = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tree:
    """One image and the overlays that stand on it. `base` is where the image that it stands on is,
    None for one that stands on none; `problem` is what is wrong in one line."""

    header: Header
    base: Path | None = None
    problem: str | None = None
    overlays: tuple[Tree, ...] = field(default=())

    @property
    def path(self) -> Path:
        """Where the image is."""
        return self.header.path

    @property
    def format(self) -> str:
        """The image's format; raw where nothing else is known."""
        return self.header.format or "raw"

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Tree]]:
        """This image and all above it, each with its depth, a base before its overlays."""
        pending = [(depth, self)]
        while pending:
            level, tree = pending.pop()
            yield level, tree
            pending.extend((level + 1, overlay) for overlay in reversed(tree.overlays))


def users(trees: Sequence[Tree]) -> dict[Path, str]:
    """Who has which of the images open through QEMU, writers first; those in use alone."""
    locked = locked_inodes()
    found = {}
    for root in trees:
        for _, tree in root.walk():
            if tree.header.identity[1] in locked and (open_by := holders(tree.path)):
                found[tree.path] = str(open_by[0])
    return found


def _read(folders: Sequence[Path]) -> dict[Identity, Header]:
    found: dict[Identity, Header] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ImageError(
                "no such folder" if not folder.exists() else "not a folder",
                subject=printable(folder),
                hint="'imgtool chain show' shows the chain of one image",
            )
        for path in files_below(folder.absolute()):
            try:
                header = headers.read(path)
            except OSError:
                continue  # gone, or not to be read by this user: not known to be an image
            if header is not None:
                found.setdefault(header.identity, header)
    return found


def _bases(found: dict[Identity, Header]) -> dict[Identity, Identity]:
    """For each image the one that it stands on; those outside of the folders are added."""
    below = {}
    pending = list(found.values())
    while pending:
        header = pending.pop()
        try:
            path = headers.base_of(header)
            base = headers.read(path) if path else None
        except (OSError, ValueError):
            continue
        if base is None:
            continue
        if base.identity not in found:
            found[base.identity] = base
            pending.append(base)
        below[header.identity] = base.identity
    return below


def _problem(header: Header, base: Header | None) -> str | None:
    if header.backing is not None and base is None:
        return f"its backing file {printable(header.backing)} is missing"
    if header.corrupt:
        return "marked corrupt by QEMU"
    if base is None:
        return None
    if base.modified > header.modified:
        return "its base is newer than itself"
    if header.backing_format is None:
        return "the format of its backing file is not written in it"
    return None


def forest(folders: Sequence[str | Path]) -> tuple[Tree, ...]:
    """The images below the folders as trees: bases without overlays, and bases with theirs.

    Files of no known format count as raw images if an overlay stands on them, or by their name.
    Raises `ImageError` for what is no folder.
    """
    found = _read([Path(folder) for folder in folders])
    below = _bases(found)
    above: dict[Identity, list[Identity]] = {}
    for overlay, base in below.items():
        above.setdefault(base, []).append(overlay)

    def built(identity: Identity, looping: bool = False) -> Tree:
        """The tree on one image, from its tops down: a chain can be longer than Python's stack."""
        order, pending, seen = [], [identity], {identity}
        while pending:
            current = pending.pop()
            order.append(current)
            fresh = [overlay for overlay in above.get(current, ()) if overlay not in seen]
            seen.update(fresh)
            pending.extend(fresh)
        done: dict[Identity, Tree] = {}
        for current in reversed(order):
            header, base = found[current], found.get(below.get(current, (-1, -1)))
            overlays = [done[i] for i in above.get(current, ()) if i in done]
            done[current] = Tree(
                header,
                base.path if base else headers.base_of(header),
                "its chain is a loop" if looping else _problem(header, base),
                tuple(sorted(overlays, key=lambda tree: os.fsencode(tree.path))),
            )
        visited.update(order)
        return done[identity]

    visited: set[Identity] = set()
    trees = []
    for identity, header in found.items():
        known = header.format is not None or header.path.suffix in _RAW_SUFFIXES
        if identity not in below and (known or identity in above):
            trees.append(built(identity))
    for identity in sorted(set(below) - visited):  # what stands on itself has no base
        if identity not in visited:
            trees.append(built(identity, looping=True))
    return tuple(sorted(trees, key=lambda tree: os.fsencode(tree.path)))
