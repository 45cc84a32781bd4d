"""The Guest interface: what every engine can say of a guest, and the same whichever engine it is.

Paths are absolute, as `bytes` or `str` (`os.fsencode` turns the one into the other). Errors are
those of `imgtool.errors`: `NotInGuestError` for what is not there, `EngineError` for what cannot be
read.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from imgtool.errors import EngineError, NotInGuestError
from imgtool.formats.numbers import whole_number
from imgtool.formats.xattrs import Xattrs
from imgtool.guest.model import Device, DiskExtent, Entry, Layout, OperatingSystem, SpaceUsage
from imgtool.guest.paths import guest_path
from imgtool.text import typed

if TYPE_CHECKING:
    from imgtool.image.chain.chain import Chain

# Called with a path and one line about what is wrong with it.
OnProblem = Callable[[bytes, str], None]
# Called with bytes done and bytes in all (0 where it is not known).
OnProgress = Callable[[int, int], None]

# Of each disk the stretches (start, end) in bytes, ascending; None where nothing is known.
Stretches = Sequence[Sequence[tuple[int, int]] | None]


@dataclass(frozen=True)
class Owners:
    """Names of users and groups in the guest's own passwd and group."""

    users: dict[int, str]
    groups: dict[int, str]

    def user_number(self, name: str) -> int:
        """The number of a user that is named, or is a number. Raises `NotInGuestError`."""
        return _number_of(name, self.users, "user")

    def group_number(self, name: str) -> int:
        """The number of a group that is named, or is a number. Raises `NotInGuestError`."""
        return _number_of(name, self.groups, "group")


_NO_ID = 0xFFFFFFFF  # chown(2): the owner stays


def _number_of(name: str, names: Mapping[int, str], what: str) -> int:
    for number, known in names.items():
        if known == name:
            return number
    wanted = whole_number(name)
    if wanted is not None and wanted < _NO_ID:
        return wanted
    import difflib  # most commands name nobody

    near = difflib.get_close_matches(name, names.values(), 3)
    raise NotInGuestError(
        f"the guest has no {what} of this name",
        subject=name,
        hint=f"did you mean {' or '.join(near)}?" if near else f"a number will do: a {what}'s id",
    )


def user_names(content: bytes | None) -> dict[int, str]:
    """The names of a passwd or group by their numbers."""
    names: dict[int, str] = {}
    for line in (content or b"").decode("utf-8", "replace").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and (number := whole_number(fields[2])) is not None:
            names.setdefault(number, fields[0])
    return names


class Guest(ABC):
    """An open guest. Use `imgtool.open_guest()` to get one; `chains` are those of its disks."""

    engine: str
    _notice: Callable[[str], None]

    def __init__(self) -> None:
        self.chains: Sequence[Chain] = ()
        self._owners: Owners | None = None
        # Mount points whose filesystems are not there though they should be, and why.
        self._unshown: dict[str, str] = {}
        self._oversized_xattrs = 0

    @property
    def oversized_xattrs(self) -> int:
        """How many extended attributes were left out so far, being longer than Linux gives any."""
        return self._oversized_xattrs

    def unshown(self) -> Mapping[str, str]:
        """The mount points whose filesystems are not shown, and why; known once a path was looked
        up.
        """
        return self._unshown

    def _tell(self, layout: Layout) -> None:
        """Say what fstab names and nobody finds."""
        self._unshown = layout.missed
        for problem in layout.problems:
            self._notice(problem)

    def _hidden_at(self, path: bytes) -> str | None:
        """The mount point, above a path, where something else belongs than what is there."""
        if not self._unshown:
            return None
        known = {mount.mountpoint for mount in self.layout.mounts} | set(self._unshown)
        places = [p for p in known if (path + b"/").startswith(p.rstrip("/").encode() + b"/")]
        place = max(places, key=len, default="/")
        return place if place in self._unshown else None

    def _hidden(self, path: bytes) -> NotInGuestError | None:
        """What to say of a path where something else belongs than what is there."""
        place = self._hidden_at(path)
        if place is None:
            return None
        return NotInGuestError(
            f"its filesystem is not shown: {self._unshown[place]}",
            subject=place,
            hint=f"what lies in the folder itself: -m {typed(self.layout.mounts[0].source)}",
        )

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Which filesystem is mounted where; discovered at the first use."""

    @abstractmethod
    def resolve(self, path: str | bytes) -> bytes:
        """The path without symbolic links; `NotInGuestError` if it leads nowhere."""

    @abstractmethod
    def lstat(self, path: str | bytes) -> Entry:
        """One path as it is; a symbolic link is not followed."""

    @abstractmethod
    def entries(
        self, path: str | bytes, *, xattrs: bool = False, on_problem: OnProblem | None = None
    ) -> Iterator[Entry]:
        """What is in a directory, sorted by name as bytes; the links are not followed.

        With `xattrs` the entries have their extended attributes. Without `on_problem` the first
        unreadable entry raises.
        """

    @abstractmethod
    def walk(
        self,
        path: str | bytes = "/",
        *,
        checksum: str | None = None,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> Iterator[Entry]:
        """Everything below a directory: parents first, siblings sorted by name as bytes.

        Without `on_problem` the first unreadable entry raises; with it the walk goes on.
        """

    def written_stretches(self, links: Sequence[int | None]) -> Stretches:
        """Which stretches of each disk come from the topmost `links` of its chain.

        None stands for all of a disk: for `links` of None, or where the engine cannot tell.
        """
        return [None for _ in links]

    def walk_unshared(
        self,
        path: str | bytes,
        *,
        checksum: str,
        written: Stretches,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> Iterator[Entry]:
        """`walk` with checksums, but not of files whose data are all outside `written`.

        As far as the engine can tell: these have a `place` instead, the same one if their data are
        the same stretches of the disks.
        """
        return self.walk(path, checksum=checksum, xattrs=xattrs, on_problem=on_problem)

    @abstractmethod
    def xattrs(self, path: str | bytes) -> Xattrs:
        """The extended attributes of one path as it is; a symbolic link is not followed."""

    @abstractmethod
    def checksum(self, kind: str, path: str | bytes) -> str:
        """The md5, sha1 or sha256 of a regular file, in hexadecimal."""

    @abstractmethod
    def open(self, path: str | bytes) -> AbstractContextManager[BinaryIO]:
        """A regular file's bytes as a stream; links are followed inside the guest."""

    @abstractmethod
    def tar(
        self,
        path: str | bytes,
        excludes: Sequence[bytes] = (),
        *,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> AbstractContextManager[BinaryIO]:
        """A directory's content (names relative to it) as a stream in tar format.

        `excludes` are patterns of tar(1), such as `./name`. With `xattrs` all extended attributes
        and ACLs are in it, as GNU tar has them; those that cannot be read are left out where
        `on_problem` is told of it, before the stream begins, and an error where there is none.
        """

    @abstractmethod
    def data_ranges(self, path: str | bytes) -> Sequence[tuple[int, int]]:
        """Where a sparse file has data: (offset, length) in bytes, ascending."""

    def extents(self, path: str | bytes) -> Sequence[DiskExtent] | None:
        """Where on the guest's disks a regular file lies, ascending in the file; None where the
        engine cannot tell, as of what is compressed."""
        return None

    @abstractmethod
    def open_range(
        self, path: str | bytes, offset: int, length: int
    ) -> AbstractContextManager[BinaryIO]:
        """A part of a regular file as a stream."""

    @abstractmethod
    def devices(self, *, everything: bool = False) -> tuple[Device, ...]:
        """The filesystems; with `everything` also partitions, LVs, VGs, PVs and devices."""

    @abstractmethod
    def usage(self) -> tuple[SpaceUsage, ...]:
        """The space of every filesystem, with an `error` where one cannot be mounted."""

    @abstractmethod
    def operating_systems(self, *, packages: bool = False) -> tuple[OperatingSystem, ...]:
        """What is installed in the guest."""

    def with_checksum(self, entry: Entry, kind: str, on_problem: OnProblem | None) -> Entry:
        """The entry of a regular file with its checksum; without if it cannot be read."""
        try:
            return dataclasses.replace(entry, checksum=self.checksum(kind, entry.path))
        except EngineError as error:
            if on_problem is None:
                raise
            on_problem(entry.path, error.message)
            return entry

    def with_xattrs(self, entry: Entry, on_problem: OnProblem | None) -> Entry:
        """The entry with its extended attributes; without if they cannot be read."""
        try:
            return dataclasses.replace(entry, xattrs=self.xattrs(entry.path))
        except EngineError as error:
            if on_problem is None:
                raise
            on_problem(entry.path, error.message)
            return entry

    @property
    def windows(self) -> bool:
        """Whether paths of the guest are Windows paths."""
        return self.layout.os_type == "windows"

    def path(self, typed: str | bytes) -> bytes:
        """The absolute guest path that was typed; `C:\\...` where the guest is Windows."""
        return guest_path(typed, windows=self.windows)

    def read_bytes(self, path: str | bytes, limit: int | None = None) -> bytes:
        """A whole small file; `EngineError` if it is longer than `limit`."""
        if limit is None:
            with self.open(path) as stream:
                return stream.read()
        # A part, since the whole may be a hole without end.
        with self.open_range(path, 0, limit + 1) as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise EngineError(f"the file is longer than {limit} bytes", subject=path)
        return content

    def owners(self) -> Owners:
        """The names of the guest's users and groups; empty where it has none."""
        if self._owners is None:
            contents: list[bytes | None] = []
            for name in (b"/etc/passwd", b"/etc/group"):
                try:
                    contents.append(self.read_bytes(name, 4 << 20))
                except (NotInGuestError, EngineError):
                    contents.append(None)
            self._owners = Owners(user_names(contents[0]), user_names(contents[1]))
        return self._owners
