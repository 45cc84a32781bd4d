"""All images below some folders, and what stands on what: told by headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgtool.errors import ImageError
from imgtool.image import headers
from imgtool.image.checks.dependants import Identity, OnError, files_below
from imgtool.image.headers import Header
from imgtool.image.locking.attached import looped_inodes
from imgtool.image.locking.locks import holders, locked_inodes
from imgtool.image.policy import AllowedDirs
from imgtool.text import printable, typed

_RAW_SUFFIXES = (".raw", ".img")


@dataclass(frozen=True, eq=False)
class Tree:
    """One image and the overlays that stand on it. `base` is where the image that it stands on is,
    or should be, None for one that stands on none; `problem` is what is wrong in one line."""

    header: Header
    base: Path | None = None
    problem: str | None = None
    overlays: tuple[Tree, ...] = field(default=(), repr=False)

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


def users(trees: Sequence[Tree]) -> dict[Path, tuple[str, ...]]:
    """Who has which of the images open: through QEMU or as a device, writers first; those in use
    alone."""
    chosen = locked_inodes() | looped_inodes()
    found = {}
    for root in trees:
        for _, tree in root.walk():
            if tree.header.identity[1] not in chosen:
                continue
            try:
                open_by = holders(tree.path)
            except OSError:
                continue  # gone since it was listed
            if open_by:
                found[tree.path] = tuple(str(holder) for holder in open_by)
    return found


def _ignore(path: Path, error: OSError) -> None:
    """Nobody wants to know."""


def _folder(named: str | Path) -> Path:
    folder = Path(named)
    try:
        is_folder = folder.is_dir()
        there = is_folder or folder.exists()
    except OSError as error:
        raise ImageError(
            (error.strerror or "cannot be looked at").lower(), subject=printable(folder)
        ) from error
    if is_folder:
        return folder.absolute()
    if there:
        raise ImageError(
            "not a folder",
            subject=printable(folder),
            hint=f"what it stands on: imgtool chain show {typed(folder)}; and what stands on it:"
            f" imgtool chain tree {typed(folder.absolute().parent)}",
        )
    raise ImageError("no such folder", subject=printable(folder))


def _read(folders: Sequence[Path], on_error: OnError) -> dict[Identity, Header]:
    found: dict[Identity, Header] = {}
    for folder in folders:
        for path in files_below(folder, on_error):
            try:
                header = headers.read(path)
            except FileNotFoundError:
                continue  # gone since it was listed
            except OSError as error:
                on_error(path, error)
                continue
            if header is None:
                continue
            known = found.get(header.identity)
            # The names in a header start where the file itself is, not a symlink to it.
            if known is None or (known.path.is_symlink() and not path.is_symlink()):
                found[header.identity] = header
    return found


@dataclass(frozen=True)
class _Links:
    """For each image the one that it stands on, and why one that it names is not there."""

    below: dict[Identity, Identity]
    missing: dict[Identity, str]


def _links(found: dict[Identity, Header], allowed: Sequence[str | Path]) -> _Links:
    """What stands on what; bases outside of the folders looked at are added to `found`."""
    below: dict[Identity, Identity] = {}
    missing: dict[Identity, str] = {}
    around: dict[Path, AllowedDirs] = {}
    ids = {header.id: identity for identity, header in found.items() if header.id is not None}
    pending = list(found.values())
    while pending:
        header = pending.pop()
        if header.parent_id is not None and not _is_there(header):
            if header.parent_id in ids:
                below[header.identity] = ids[header.parent_id]
                continue
            if header.backing is None:
                missing[header.identity] = f"its parent {header.parent_id} is missing"
        if header.backing is None:
            continue
        path = headers.base_of(header)
        named = f"its backing file {printable(header.backing)}"
        if path is None:
            missing[header.identity] = f"{named} is not a local file"
            continue
        folder = header.path.parent
        if folder not in around:
            around[folder] = AllowedDirs.around(header.path, allowed)
        try:
            if not around[folder].hold(path.resolve()):
                missing[header.identity] = f"{named} is outside the folders that a chain may use"
                continue
            base = headers.read(path)
        except PermissionError:
            missing[header.identity] = f"{named} may not be read"
            continue
        except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of symlinks
            missing[header.identity] = f"{named} is missing"
            continue
        if base is None:
            missing[header.identity] = f"{named} is neither a file nor a block device"
            continue
        if base.identity not in found:
            found[base.identity] = base
            pending.append(base)
        below[header.identity] = base.identity
    return _Links(below, missing)


def _is_there(header: Header) -> bool:
    """Whether there is something by the name of what an image stands on."""
    try:
        base = headers.base_of(header)
        return base is not None and base.exists()
    except (OSError, ValueError):
        return False


def _problem(header: Header, base: Header | None, missing: str | None) -> str | None:
    if header.damaged:
        return "its header is damaged"
    if missing is not None:
        return missing
    if header.differencing:
        return "differencing: QEMU does not read it with its parent"
    if header.corrupt:
        return "marked corrupt by QEMU"
    if header.dirty:
        return "not closed properly, or in use"
    if base is None:
        return None
    named = header.backing_format
    if named is not None and headers.contradicts(base, named):
        return f"it takes its base as {named}, which is {base.format or 'raw'}"
    if headers.is_newer(base.modified, header.modified):
        return "its base is newer than itself"
    if named is None:
        return "the format of its backing file is not written in it"
    return None


def _in_loops(below: Mapping[Identity, Identity]) -> dict[Identity, Identity]:
    """The images whose chain never ends, each with the same one of the loop that it leads to."""
    ends: dict[Identity, Identity | None] = {}
    for start in below:
        way: dict[Identity, None] = {}
        current = start
        while current in below and current not in way and current not in ends:
            way[current] = None
            current = below[current]
        end = ends.get(current)
        if current in way:  # a loop that was not met before
            round_ = list(way)[list(way).index(current) :]
            end = min(round_)
        ends.update(dict.fromkeys(way, end))
    return {identity: end for identity, end in ends.items() if end is not None}


def forest(
    folders: Sequence[str | Path],
    *,
    backing_dirs: Sequence[str | Path] = (),
    on_error: OnError = _ignore,
) -> tuple[Tree, ...]:
    """The images below the folders as trees: bases without overlays, and bases with theirs.

    Files of no known format count as raw images if an overlay stands on them, or by their name.
    A base elsewhere is looked at where `AllowedDirs.around` the overlay, with `folders` and
    `backing_dirs`, allows it. `on_error` is told of what cannot be read. Raises `ImageError` for
    what is no folder. Of a loop, one image stands in for the base.
    """
    roots = [_folder(folder) for folder in folders]
    found = _read(roots, on_error)
    links = _links(found, [*roots, *backing_dirs])
    loops = _in_loops(links.below)
    above: dict[Identity, list[Identity]] = {}
    for overlay, base in links.below.items():
        if loops.get(overlay) != overlay:  # there the loop is cut open
            above.setdefault(base, []).append(overlay)

    def built(root: Identity) -> Tree:
        """The tree on one image, from its tops down: a chain can be longer than Python's stack."""
        order = [root]
        for current in order:
            order.extend(above.get(current, ()))
        done: dict[Identity, Tree] = {}
        for current in reversed(order):
            header, base = found[current], found.get(links.below.get(current, (-1, -1)))
            problem = _problem(header, base, links.missing.get(current))
            done[current] = Tree(
                header,
                base.path if base else headers.base_of(header),
                "its chain is a loop" if current in loops else problem,
                tuple(sorted((done[i] for i in above.get(current, ())), key=_by_path)),
            )
        return done[root]

    trees = []
    for identity, header in found.items():
        known = header.format is not None or header.path.suffix.lower() in _RAW_SUFFIXES
        if identity in links.below:
            if loops.get(identity) == identity:
                trees.append(built(identity))
        elif known or identity in above:
            trees.append(built(identity))
    return tuple(sorted(trees, key=_by_path))


def _by_path(tree: Tree) -> bytes:
    return os.fsencode(tree.path)
