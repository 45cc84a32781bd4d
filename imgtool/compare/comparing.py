"""`compared()`: from two points to the differences between their guests."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

from imgtool.compare.differences import (
    ADDED,
    CHANGED,
    REMOVED,
    Difference,
    Walk,
    below,
    changed_fields,
    merge_walks,
)
from imgtool.errors import EngineError, NotInGuestError
from imgtool.guest.guest import Guest, OnProblem, Stretches
from imgtool.guest.model import Entry

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
Opener = Callable[[], AbstractContextManager[Guest]]
Links = tuple[Sequence[int | None], Sequence[int | None]]


class Pair:
    """Two guests that are asked at the same time, each in a thread of its own.

    The threads live as long as the guests: a program that was started dies with its thread.
    """

    def __init__(self, pools: Sequence[ThreadPoolExecutor]) -> None:
        self._pools = pools
        self.before: Guest
        self.after: Guest

    def both(
        self, first: Callable[[], _Answer], second: Callable[[], _Answer]
    ) -> tuple[_Answer, _Answer]:
        """Two answers; the error of the first one that failed, once neither is under way."""
        futures = [pool.submit(ask) for pool, ask in zip(self._pools, (first, second), strict=True)]
        try:
            return futures[0].result(), futures[1].result()
        finally:
            wait(futures)


@contextlib.contextmanager
def open_pair(before: Opener, after: Opener) -> Iterator[Pair]:
    """Both guests, open; each opener is called in the thread of its side."""
    with (
        ThreadPoolExecutor(1) as first,
        ThreadPoolExecutor(1) as second,
        ExitStack() as one,
        ExitStack() as other,
    ):
        pair = Pair((first, second))
        pair.before, pair.after = pair.both(
            lambda: one.enter_context(before()), lambda: other.enter_context(after())
        )
        yield pair


def compare_trees(
    pair: Pair,
    path: str | bytes = "/",
    *,
    checksum: str | None = None,
    xattrs: bool = False,
    everything: bool = False,
    links: Links | None = None,
    on_problem: tuple[OnProblem, OnProblem],
) -> Iterator[Difference]:
    """The differences at a path and below it, in the order of a walk.

    Files of one size and time are taken for the same unless a `checksum` (md5, sha1, sha256) is
    to be compared too; extended attributes are compared with `xattrs`. `links` are those of each
    side's chains that the other one has not (see
    `points.links_apart`): what comes from the others is not read. `on_problem` gets, for each
    side, the paths that cannot be read: these are compared no further and in no difference.

    Raises `NotInGuestError` if neither side has the path.
    """
    before, after = pair.before, pair.after
    hidden = _mounted_on_one_side(pair, path)
    places = pair.both(lambda: _resolve(before, path), lambda: _resolve(after, path))
    if places[0] is not None and places[0] == places[1]:
        path = places[0]
    walks = Walk(on_problem[0]), Walk(on_problem[1])
    for walk, lines in zip(walks, hidden, strict=True):
        for mountpoint, line in lines.items():
            walk.hide(mountpoint, line)
    if any(walk.hides(os.fsencode(path)) for walk in walks):
        return
    tops = pair.both(lambda: _top(before, path), lambda: _top(after, path))
    if tops[0] is None and tops[1] is None:
        before.lstat(path)  # raises
    written = None if checksum is None else _written_stretches(pair, links)
    started = time.monotonic()

    def begin(guest: Guest, walk: Walk, top: Entry | None) -> None:
        walk.start(_entries(guest, walk.problem, top, checksum, xattrs, written))

    pair.both(
        lambda: begin(before, walks[0], tops[0]),
        lambda: begin(after, walks[1], tops[1]),
    )
    log.info("compared: both sides walked in %.3f s", time.monotonic() - started)
    contents = _Contents(before, checksum, walks[0])
    for one, other in merge_walks(*walks):
        if one is None or other is None:
            yield Difference(
                ADDED if one is None else REMOVED,
                (),
                one and contents.with_checksum(before, one, walks[0]),
                other and contents.with_checksum(after, other, walks[1]),
            )
            continue
        fields = changed_fields(one, other, everything=everything)
        if contents.spares(one, other):
            if fields:
                yield Difference(CHANGED, fields, *contents.summed_once(one, other))
            continue
        one = contents.with_checksum(before, one, walks[0])
        other = contents.with_checksum(after, other, walks[1])
        if contents.differ(one, other):
            fields += ("content",)
        if fields:
            yield Difference(CHANGED, fields, one, other)
    if checksum is not None:
        log.info("content: %d files not read: both sides share their blocks", contents.spared)


def _mounted_on_one_side(pair: Pair, path: str | bytes) -> list[dict[bytes, str]]:
    """For each side the mount points, at or below a path or above it, where it does not show what
    the other one does, with a line on each: nothing there was removed or added.

    Where neither shows what is missing, that was said, and what is there is compared.
    """
    sides = (pair.before, pair.after)
    # Only then is it known which filesystems can be mounted.
    pair.both(lambda: sides[0].lstat(b"/"), lambda: sides[1].lstat(b"/"))
    mounted = [{mount.mountpoint for mount in side.layout.mounts} for side in sides]
    missed = [side.unshown() for side in sides]
    absent = [set(side.layout.missed) for side in sides]
    raw = os.fsencode(path)
    found: list[dict[bytes, str]] = [{}, {}]
    for number in (0, 1):
        elsewhere = mounted[1 - number] - mounted[number] - set(missed[1 - number])
        lines = dict.fromkeys(elsewhere, "a filesystem is mounted there on the other side alone")
        lines |= {p: why for p, why in missed[number].items() if p not in absent[1 - number]}
        for place, why in lines.items():
            at = place.encode()
            if below(at, raw) or below(raw, at):
                found[number][at] = f"not compared: {why}"
    return found


def _top(guest: Guest, path: str | bytes) -> Entry | None:
    try:
        return guest.lstat(path)
    except NotInGuestError:
        return None


def _resolve(guest: Guest, path: str | bytes) -> bytes | None:
    try:
        return guest.resolve(path)
    except NotInGuestError:
        return None


def _entries(
    guest: Guest,
    problem: OnProblem,
    top: Entry | None,
    checksum: str | None,
    xattrs: bool,
    written: Stretches | None,
) -> Iterator[Entry]:
    if top is None:
        return iter(())
    if xattrs:
        top = guest.with_xattrs(top, problem)
    if top.type != "directory":
        summed = checksum is not None and top.type == "file"
        return iter([guest.with_checksum(top, str(checksum), problem) if summed else top])
    if checksum is not None and written is not None:
        below = guest.walk_unshared(
            top.path, checksum=checksum, written=written, xattrs=xattrs, on_problem=problem
        )
    else:
        below = guest.walk(top.path, checksum=checksum, xattrs=xattrs, on_problem=problem)
    # Its answer is begun here, in the thread of its side.
    return itertools.chain([top], list(itertools.islice(below, 1)), below)


def _written_stretches(pair: Pair, links: Links | None) -> Stretches | None:
    """What either side has written above the links in common; None if they have nothing."""
    if links is None or len(links[0]) != len(links[1]):
        return None
    if all(number is None for number in links[0]):
        return None
    started = time.monotonic()
    one, other = pair.both(
        lambda: pair.before.written_stretches(links[0]),
        lambda: pair.after.written_stretches(links[1]),
    )
    found: list[Sequence[tuple[int, int]] | None] = []
    for mine, theirs in zip(one, other, strict=True):
        found.append(None if mine is None or theirs is None else _join_stretches([*mine, *theirs]))
    log.info(
        "map: %d bytes differ in the chains, asked in %.3f s",
        sum(end - start for row in found for start, end in row or ()),
        time.monotonic() - started,
    )
    return None if all(row is None for row in found) else found


def _join_stretches(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(stretches):
        if joined and joined[-1][1] >= start:
            start, last = joined.pop()
            end = max(end, last)
        joined.append((start, end))
    return joined


class _Contents:
    """What is known of the contents of files, from the walks and asked for besides."""

    def __init__(self, before: Guest, kind: str | None, walk: Walk) -> None:
        self._before = before
        self._kind = kind
        self._walk = walk
        self.spared = 0

    def spares(self, one: Entry, other: Entry) -> bool:
        """Whether both sides have the same content without a look at it: in the same blocks."""
        shared = (
            one.extent_digest is not None
            and one.extent_digest == other.extent_digest
            and one.size == other.size
        )
        self.spared += shared
        return shared

    def summed_once(self, one: Entry, other: Entry) -> tuple[Entry, Entry]:
        """Both entries of a file whose blocks they share, with its checksum."""
        one = self.with_checksum(self._before, one, self._walk)
        return one, dataclasses.replace(other, checksum=one.checksum)

    def differ(self, one: Entry, other: Entry) -> bool:
        """Whether the contents differ, as far as they are to be compared and could be read."""
        if self._kind is None or one.type != "file" or other.type != "file":
            return False
        if one.checksum is None or other.checksum is None:
            return one.size != other.size
        return one.checksum != other.checksum

    def with_checksum(self, guest: Guest, entry: Entry, walk: Walk) -> Entry:
        """The entry with its checksum, if one is asked for and was not tried already."""
        if self._kind is None or entry.extent_digest is None:
            return entry
        try:
            return dataclasses.replace(entry, checksum=guest.checksum(self._kind, entry.path))
        except EngineError as error:
            walk.say(entry.path, error.message)
            return entry
