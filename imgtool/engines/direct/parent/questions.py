"""What the parent asks a worker, and what the answer may be: one function for each request.

The worker has the requests, and not this: nothing in the sandbox decodes an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from imgtool.engines.direct.parent.devices import Devices, devices
from imgtool.engines.direct.wire import frames, messages, requests
from imgtool.engines.direct.wire.extents import Extent
from imgtool.engines.direct.wire.messages import Data, Problem, Space
from imgtool.formats.xattrs import Xattrs
from imgtool.guest.guest import Stretches
from imgtool.guest.model import Entry, OperatingSystem

Answer_co = TypeVar("Answer_co", covariant=True)


class Question(NamedTuple, Generic[Answer_co]):
    """A request, and what decodes its answer, or each part of one that has several.

    `decode` takes a value of JSON, bytes, or None where there is no answer. It looks at each value
    before it uses it, and raises `BadMessage` for what is not an answer.
    """

    request: requests.Request
    decode: Callable[[object], Answer_co]


# Disks and filesystems


def opening(
    disks: Sequence[Sequence[str]],
    lost: Sequence[Sequence[tuple[int, int]]],
    unreplayed: Sequence[str],
    *,
    ring: int | None,
    scratch: int | None,
) -> Question[Devices]:
    """What is on the disks, which are opened."""
    request = requests.Open(disks, lost, unreplayed, ring, scratch)
    return Question(request, partial(devices, disks=len(disks)))


def journals() -> Question[list[tuple[str, list[tuple[int, int, int]]]]]:
    """Devices whose journal has to be replayed, and its parts: disk, offset, length in bytes."""
    return Question(requests.Journals(), messages.journals)


def written(links: Sequence[int | None]) -> Question[Stretches]:
    """Which stretches of the disks come from the topmost `links` of their chains."""
    return Question(requests.Written(links), partial(messages.stretches, count=len(links)))


def look(device: str) -> Question[None]:
    """That one filesystem is mounted alone."""
    return Question(requests.Look(device), messages.nothing)


def mount(mounts: Sequence[tuple[str, str]]) -> Question[list[str | None]]:
    """For each device and its mount point None, or why it is not there."""
    return Question(requests.Mount(mounts), partial(messages.reasons, count=len(mounts)))


def usage(device: str) -> Question[Space]:
    """The space of one filesystem."""
    return Question(requests.Usage(device), messages.space)


def inspect(root: str, mountpoints: Mapping[str, str], packages: bool) -> Question[OperatingSystem]:
    """The operating system in the mounted tree."""
    return Question(requests.Inspect(root, mountpoints, packages), messages.operating_system)


# Names


def resolve(path: str) -> Question[bytes]:
    """The path without symbolic links."""
    return Question(requests.Resolve(path), messages.real_path)


def spelling(path: str) -> Question[bytes]:
    """The path in the case of the names on disk."""
    return Question(requests.Spelling(path), partial(messages.spelling, typed=path))


def lstat(path: str) -> Question[Entry]:
    """The entry at this path."""
    return Question(requests.Lstat(path), partial(messages.entry_at, frames.name(path)))


def is_dir(path: str, any_case: bool) -> Question[bool]:
    """Whether a path leads to a directory."""
    return Question(requests.IsDir(path, any_case), messages.truth)


def xattrs(path: str) -> Question[tuple[Xattrs, int]]:
    """The extended attributes of a path, and how many others are too large to be given."""
    return Question(requests.Xattrs(path), messages.xattrs_of_one)


def walk(
    path: str, deep: bool, checksum: str | None, xattrs: bool, written: Stretches | None
) -> Question[Iterator[Entry | Problem]]:
    """What is in a directory, or below it; the answer has several parts."""
    request = requests.Walk(path, deep, checksum, xattrs, written)
    return Question(request, partial(messages.rows_below, frames.name(path), deep))


# Contents


def checksum(path: str, kind: str) -> Question[str]:
    """The checksum of a regular file, in hexadecimal."""
    return Question(requests.Checksum(path, kind), messages.digest)


def read(path: str, offset: int, length: int) -> Question[Data]:
    """Bytes of a regular file; the answer has several parts."""
    return Question(requests.Read(path, offset, length), messages.data)


def small(path: str, limit: int) -> Question[bytes | None]:
    """The first `limit` bytes of a regular file; None if there is none."""
    return Question(requests.Small(path, limit), partial(messages.small, limit=limit))


def runs(
    path: str, offset: int, length: int, disk_sizes: Sequence[int]
) -> Question[list[Extent] | None]:
    """Where a part of a regular file lies on disks of these sizes; None where nobody knows."""
    request = requests.Runs(path, offset, length)
    return Question(request, partial(messages.runs, sizes=disk_sizes))


def ranges(path: str, size: int) -> Question[list[tuple[int, int]]]:
    """Where a regular file of this size has data: offsets and lengths."""
    return Question(requests.Ranges(path), partial(messages.ranges, size=size))


def tar(
    path: str, excluded: Sequence[str], xattrs: bool, passes_over: bool
) -> Question[Data | Problem]:
    """A tar stream, with problems in it where it `passes_over` them, in several parts."""
    request = requests.Tar(path, excluded, xattrs, passes_over)
    if not passes_over:
        return Question(request, messages.data)
    return Question(request, partial(messages.data_or_problem, frames.name(path)))
