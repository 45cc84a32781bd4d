"""What a worker is asked: one type for each request, and what its answer is.

A path is a name as JSON carries it (see `frames.text`), offsets and sizes are in bytes. On its way
a request is the JSON of its fields, and of its name as `do`. The worker decodes it: a field too
many, one too few or one of another type raises `BadMessage`, which ends the worker.
"""

# The types of the fields are looked at as a request is decoded: they are no strings.

import json
from collections.abc import Mapping, Sequence
from types import GenericAlias, NoneType, UnionType
from typing import NamedTuple

from imgtool.engines.direct.wire import frames


class Open(NamedTuple):
    """Start a program for each disk, of these words, wait for them, and find the volumes: once, and
    before all else. The answer: block devices, and volume groups.

    `lost` are the parts (start, end) of each disk that are not there. The journals of the devices
    in `unreplayed` are left alone. `ring` and `scratch` are descriptors of the parent's memory:
    that of contents on their way, and that of a worker without a folder.
    """

    disks: Sequence[Sequence[str]]
    lost: Sequence[Sequence[tuple[int, int]]]
    unreplayed: Sequence[str]
    ring: int | None
    scratch: int | None


class Journals(NamedTuple):
    """Where the journals are that have to be replayed: device, and its stretches of disks."""


class Written(NamedTuple):
    """Which stretches of the disks come from the topmost `links` of their chains."""

    links: Sequence[int | None]


class Look(NamedTuple):
    """Mount one filesystem alone, to be looked into. No answer."""

    device: str


class Mount(NamedTuple):
    """Mount a layout, each device at its mount point, the root first; for each None, or why it is
    not there.
    """

    mounts: Sequence[tuple[str, str]]


class Usage(NamedTuple):
    """The numbers of statvfs for one filesystem."""

    device: str


class Resolve(NamedTuple):
    """The path without symbolic links."""

    path: str


class Spelling(NamedTuple):
    """The path in the case of the names on disk."""

    path: str


class Lstat(NamedTuple):
    """What lstat says of a path: a row."""

    path: str


class Walk(NamedTuple):
    """What is in a directory, or with `deep` everything below it: batches of rows and problems.

    With the kind of a `checksum` rows of regular files have it; but those that have nothing in the
    `written` stretches of the disks have their place, and none.
    """

    path: str
    deep: bool
    checksum: str | None
    xattrs: bool
    written: Sequence[Sequence[tuple[int, int]] | None] | None


class Xattrs(NamedTuple):
    """The extended attributes of a path, and how many others are too large to be given; a symbolic
    link is not followed.
    """

    path: str


class Checksum(NamedTuple):
    """The checksum of a regular file."""

    path: str
    kind: str


class Read(NamedTuple):
    """Bytes of a regular file, in frames of data."""

    path: str
    offset: int
    length: int


class Runs(NamedTuple):
    """Where a part of a regular file lies, as `Extent`; None where nobody knows."""

    path: str
    offset: int
    length: int


class Small(NamedTuple):
    """The first bytes of a regular file, whole in one frame of data; no answer if there is no file,
    and a string if there is nothing in it.
    """

    path: str
    limit: int


class IsDir(NamedTuple):
    """Whether a path leads to a directory."""

    path: str
    any_case: bool


class Ranges(NamedTuple):
    """Where a regular file has data: offsets and lengths."""

    path: str


class Inspect(NamedTuple):
    """What the operating system in the mounted tree is, and its packages if asked for.

    It tells of its `root` and of its `mountpoints` (path: device) as the parent knows them.
    """

    root: str
    mountpoints: Mapping[str, str]
    packages: bool


class Tar(NamedTuple):
    """A directory's content as a tar stream in frames of data, names relative to it; the paths in
    `excluded` are left out.

    What cannot be read ends the stream with an error, or is not in it, and told as a problem, where
    that `passes_over` it; attributes that cannot be read are not in it.
    """

    path: str
    excluded: Sequence[str]
    xattrs: bool
    passes_over: bool


Request = (
    Open
    | Journals
    | Written
    | Look
    | Mount
    | Usage
    | Resolve
    | Spelling
    | Lstat
    | Walk
    | Xattrs
    | Checksum
    | Read
    | Runs
    | Small
    | IsDir
    | Ranges
    | Inspect
    | Tar
)

# What each is called on its way.
KINDS: dict[str, type[Request]] = {
    "open": Open,
    "journals": Journals,
    "written": Written,
    "look": Look,
    "mount": Mount,
    "usage": Usage,
    "resolve": Resolve,
    "spelling": Spelling,
    "lstat": Lstat,
    "walk": Walk,
    "xattrs": Xattrs,
    "checksum": Checksum,
    "read": Read,
    "runs": Runs,
    "small": Small,
    "is_dir": IsDir,
    "ranges": Ranges,
    "inspect": Inspect,
    "tar": Tar,
}
_NAMES = {kind: name for name, kind in KINDS.items()}


def name_of(request: Request) -> str:
    """What a request is called."""
    return _NAMES[type(request)]


def encode(request: Request) -> bytes:
    """A request on its way: JSON in ASCII."""
    return json.dumps({"do": name_of(request), **request._asdict()}).encode("ascii")


def decode(body: bytes) -> Request:
    """The request that `encode` made; `BadMessage` for all else."""
    fields = frames.parse_json(body)
    if not isinstance(fields, dict):
        raise frames.BadMessage("no request")
    name = fields.pop("do", None)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise frames.BadMessage("a request of no known kind")
    kinds = kind.__annotations__
    if fields.keys() != kinds.keys():
        raise frames.BadMessage("a request of other fields")
    return kind._make([_take(fields[name], kinds[name]) for name in kind._fields])


def _take(value: object, kind: object) -> object:
    """A value of JSON that is of this kind, with lists of known length as tuples."""
    if isinstance(kind, UnionType):  # with None
        kind = NoneType if value is None else kind.__args__[0]
    if isinstance(kind, GenericAlias):
        parts = kind.__args__
        if kind.__origin__ is Mapping and type(value) is dict:
            return {name: _take(part, parts[1]) for name, part in value.items()}
        if kind.__origin__ is Sequence and type(value) is list:
            return [_take(part, parts[0]) for part in value]
        if kind.__origin__ is tuple and type(value) is list and len(value) == len(parts):
            return tuple(map(_take, value, parts))
    elif type(value) is kind:
        return value
    raise frames.BadMessage("a request with a field of another type")
