"""Values with a form, as the worker tells of them.

Each is looked at before it is used: whatever is not what was asked for raises `BadMessage`, and
nothing else does. So an exception of another type is a defect of imgtool, and is told as one.
"""

from __future__ import annotations

import base64
import dataclasses
import re
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from imgtool.engines.direct.wire import frames
from imgtool.engines.direct.wire.extents import Extent
from imgtool.errors import shorten
from imgtool.formats.application import Application
from imgtool.formats.xattrs import Xattrs, order_xattrs
from imgtool.guest.blocks import Block
from imgtool.guest.model import FILE_TYPES, Entry, OperatingSystem
from imgtool.text import printable

LONGEST_LINE = 4096
_LARGEST = (1 << 63) - 1
_LONGEST_BELOW = 20 << 10  # of a path, more than a walk goes down
_WITHOUT_XATTRS = 14  # what a row has that has none
_LONGEST_ATTRIBUTE = 255 + 32  # of a name, with its prefix
# What is in no path: a NUL, and components that are empty, `.` or `..`
_ODD = re.compile(rb"\0|/(?:\.\.?)?(?:/|\Z)")
# What an entry is made of
_SCALARS = frozenset((int, str, type(None)))
# What is told of an operating system in a line each
_LINES_OF_SYSTEM = frozenset(one.name for one in dataclasses.fields(OperatingSystem)) - {
    "mountpoints",
    "kernels",
    "applications",
}

# Bytes of an answer; a memoryview is good until the next part of it.
Data: TypeAlias = bytes | memoryview


class Problem(NamedTuple):
    """A path of which something cannot be given, and why: in words, or how many of its extended
    attributes are too large.
    """

    path: bytes
    reason: str | int


class Space(NamedTuple):
    """What statvfs(3) says of a filesystem, in bytes and inodes."""

    size: int
    used: int
    available: int
    inodes: int
    inodes_used: int


def items(value: object, count: int | None = None) -> list[object]:
    """A list, of so many values where that is known."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise frames.BadMessage("no list, or one of another length")
    return value


def mapping(value: object, names: frozenset[str] | None = None) -> dict[str, object]:
    """A mapping, with these names and no others where they are known."""
    if not isinstance(value, dict) or (names is not None and value.keys() != names):
        raise frames.BadMessage("no mapping, or one of other things")
    return value


def numbers(row: object, count: int) -> list[int]:
    """So many whole numbers."""
    return [whole(number) for number in items(row, count)]


def nothing(answer: object) -> None:
    """No answer."""
    if answer is not None:
        raise frames.BadMessage("an answer where there is none")


def truth(value: object) -> bool:
    """Yes or no."""
    if not isinstance(value, bool):
        raise frames.BadMessage("neither yes nor no")
    return value


def data(value: object) -> Data:
    """Bytes that came as such."""
    if isinstance(value, (bytes, memoryview)):
        return value
    if isinstance(value, bytearray):
        return memoryview(value)
    raise frames.BadMessage("no data")


def small(answer: object, limit: int) -> bytes | None:
    """Up to `limit` bytes of a file, in one piece that was not lent; None for no file."""
    if answer is None:
        return None
    if answer == "":
        return b""
    if not isinstance(answer, (bytes, bytearray)) or len(answer) > limit:
        raise frames.BadMessage("more than was asked for")
    return bytes(answer)


def space(answer: object) -> Space:
    """The space of a filesystem."""
    return Space(*numbers(answer, len(Space._fields)))


def binary(value: object) -> bytes:
    """Bytes that came in base64."""
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except ValueError as error:
            raise frames.BadMessage("no base64") from error
    raise frames.BadMessage("no base64")


def whole(value: object, least: int = 0, most: int = _LARGEST) -> int:
    """A whole number within limits."""
    if type(value) is not int or not least <= value <= most:
        raise frames.BadMessage("a number out of its limits")
    return value


def digest(value: object) -> str:
    """A checksum in hexadecimal."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{32,64}", value):
        raise frames.BadMessage("no checksum")
    return value


def string(value: object) -> str:
    """A string of reasonable length."""
    if not isinstance(value, str) or len(value) > LONGEST_LINE:
        raise frames.BadMessage("no string")
    return value.encode("utf-8", "replace").decode()


def reasons(rows: object, count: int) -> list[str | None]:
    """For each of so many things why it is not there, on one line of usual length; None if it is.

    A reason may name what the guest wrote, of any length.
    """
    return [None if row is None else _reason(row) for row in items(rows, count)]


def _reason(row: object) -> str:
    if not isinstance(row, str):
        raise frames.BadMessage("no reason")
    return shorten(printable(row[:LONGEST_LINE]))


def _optional(value: object) -> str | None:
    return None if value is None else string(value)


def block(row: object) -> Block:
    """A block device as the worker tells of it."""
    device, kind, size, *texts, parents = items(row, len(frames.BLOCK))
    type, label, uuid, partuuid, partlabel, parttype, dm_uuid = texts
    if kind not in ("device", "partition", "lv") or not string(device).startswith("/dev/"):
        raise frames.BadMessage("no block device")
    return Block(
        device=string(device),
        kind=kind,
        size=whole(size),
        type=_optional(type),
        label=_optional(label),
        uuid=_optional(uuid),
        partuuid=_optional(partuuid),
        partlabel=_optional(partlabel),
        parttype=string(parttype),
        dm_uuid=string(dm_uuid),
        parents=tuple(string(parent) for parent in items(parents)),
    )


def real_path(value: object) -> bytes:
    """An absolute path without odd components."""
    raw = frames.name(value)
    if not raw.startswith(b"/") or (raw != b"/" and _ODD.search(raw)):
        raise frames.BadMessage("no path")
    return raw


def entry(row: object) -> Entry:
    """An entry as the worker tells of it; one object for rows that are equal, one soon after the
    other, as in two guests that are compared.
    """
    told = items(row)
    *values, attributes = told if len(told) > _WITHOUT_XATTRS else (*told, None)
    if len(values) != _WITHOUT_XATTRS or not _SCALARS.issuperset(map(type, values)):
        raise frames.BadMessage("no entry")
    found = _entry(*values)
    return found if attributes is None else dataclasses.replace(found, xattrs=xattrs(attributes))


def xattrs_of_one(answer: object) -> tuple[Xattrs, int]:
    """Extended attributes, and how many others are too large to be given."""
    rows, oversized = items(answer, 2)
    return xattrs(rows), whole(oversized)


def xattrs(rows: object) -> Xattrs:
    """Extended attributes as the worker tells of them."""
    found = []
    for key, value in (items(row, 2) for row in items(rows)):
        named = frames.name(key)
        if not named or b"\0" in named or len(named) > _LONGEST_ATTRIBUTE:
            raise frames.BadMessage("no name of an attribute")
        found.append((named, binary(value)))
    if order_xattrs(found) != tuple(found):
        raise frames.BadMessage("attributes that are not in order")
    return tuple(found)


def spelling(value: object, typed: str) -> bytes:
    """A path that differs from the one that was typed in the case of its letters alone."""
    found = real_path(value)
    if frames.text(found).upper() != typed.upper():
        raise frames.BadMessage("another path")
    return found


def entry_at(path: bytes, row: object) -> Entry:
    """An entry that is the one at this path: its name may become one of the host's."""
    found = entry(row)
    if found.path != path:
        raise frames.BadMessage("a name that is elsewhere")
    return found


def _check_below(directory: bytes, deep: bool, path: bytes) -> None:
    start = len(directory) if directory.endswith(b"/") else len(directory) + 1
    if (
        not path.startswith(directory)
        or path[start - 1 : start] != b"/"
        or not start < len(path) <= start + _LONGEST_BELOW
        or (not deep and path.find(b"/", start) >= 0)
    ):
        raise frames.BadMessage("a name that is elsewhere")


def entry_below(directory: bytes, deep: bool, row: object) -> Entry:
    """An entry of a directory, or with `deep` of anywhere below it."""
    found = entry(row)
    _check_below(directory, deep, found.path)
    return found


def problem_below(directory: bytes, deep: bool, row: object) -> Problem:
    """A path that cannot be read, as `entry_below` or the directory itself, and why."""
    path, reason = items(row, 2)
    found = real_path(path)
    if found != directory:
        _check_below(directory, deep, found)
    return Problem(found, whole(reason) if isinstance(reason, int) else printable(string(reason)))


def rows_below(directory: bytes, deep: bool, batch: object) -> Iterator[Entry | Problem]:
    """The rows of a part of a walk, each looked at when its turn comes."""
    for row in items(batch):
        if isinstance(row, list) and len(row) == 2:
            yield problem_below(directory, deep, row)
        else:
            yield entry_below(directory, deep, row)


def data_or_problem(directory: bytes, part: object) -> Data | Problem:
    """A part of a tar stream: bytes, or what is not in it of what is below the directory."""
    return problem_below(directory, True, part) if isinstance(part, list) else data(part)


@lru_cache(16)
def _entry(*row: object) -> Entry:
    path, mount, inode, mode, uid, gid, size, mtime, *others = row
    blocks, nlink, rdev, target, checksum, place = others
    link = None if target is None else frames.name(target)
    if link is not None and b"\0" in link:
        raise frames.BadMessage("no target")
    bits = whole(mode, most=0o177777)
    if stat.S_IFMT(bits) not in FILE_TYPES:
        raise frames.BadMessage("of no known type")
    return Entry(
        path=real_path(path),
        mode=bits,
        uid=whole(uid, most=0xFFFFFFFF),
        gid=whole(gid, most=0xFFFFFFFF),
        size=whole(size),
        mtime_ns=whole(mtime, -_LARGEST * 1000, _LARGEST * 1000),
        blocks=whole(blocks),
        nlink=whole(nlink),
        inode=whole(inode, most=(1 << 64) - 1),
        device=whole(mount),
        rdev=whole(rdev, most=(1 << 64) - 1),
        target=link,
        checksum=None if checksum is None else digest(checksum),
        extent_digest=None if place is None else digest(place),
    )


def operating_system(answer: object) -> OperatingSystem:
    """An operating system as the worker tells of it."""
    told = mapping(answer, _LINES_OF_SYSTEM | {"mountpoints", "kernels", "applications"})
    rows = told["applications"]
    return OperatingSystem(
        **{name: _optional(told[name]) for name in _LINES_OF_SYSTEM},  # type: ignore[arg-type]
        mountpoints={
            string(path): string(device) for path, device in mapping(told["mountpoints"]).items()
        },
        kernels=tuple(string(kernel) for kernel in items(told["kernels"])),
        applications=None if rows is None else tuple(_application(row) for row in items(rows)),
    )


def _application(row: object) -> Application:
    name, version, release, epoch, arch = items(row, 5)
    return Application(string(name), string(version), string(release), whole(epoch), string(arch))


def journals(rows: object) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """Devices, and where the parts of their journals are: disk, offset, length."""
    return [_places_of_journal(row) for row in items(rows)]


def _places_of_journal(row: object) -> tuple[str, list[tuple[int, int, int]]]:
    device, places = items(row, 2)
    found = []
    for place in items(places):
        disk, offset, length = numbers(place, 3)
        found.append((disk, offset, length))
    return string(device), found


def runs(rows: object, sizes: Sequence[int]) -> list[Extent] | None:
    """Where a file lies, on disks of these sizes; None where nobody knows."""
    if rows is None:
        return None
    found: list[Extent] = []
    least = 0
    for row in items(rows):
        start, end, disk, at = numbers(row, 4)
        if not least <= start < end or disk >= len(sizes) or at + end - start > sizes[disk]:
            raise frames.BadMessage("a file that lies nowhere")
        found.append(Extent(start, end, disk, at))
        least = end
    return found


def ranges(rows: object, size: int) -> list[tuple[int, int]]:
    """Where a file of this size has data."""
    found: list[tuple[int, int]] = []
    end = 0
    for start, length in (numbers(row, 2) for row in items(rows)):
        end = whole(start, least=end, most=size) + whole(length, most=size - start)
        found.append((start, length))
    return found


def stretches(rows: object, count: int) -> list[list[tuple[int, int]] | None]:
    """Of so many disks which stretches are meant; None for all of one."""
    return [None if row is None else _ascending(row) for row in items(rows, count)]


def _ascending(row: object) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for start, end in (numbers(pair, 2) for pair in items(row)):
        pairs.append((whole(start, least=pairs[-1][1] if pairs else 0, most=end), end))
    return pairs
