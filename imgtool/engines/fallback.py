"""Two engines behind one guest: the direct one as long as it accepts, then the appliance."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, TypeVar

from imgtool.engines.direct.parent.client import WorkerFailed
from imgtool.engines.direct.wire.refusals import NoSandbox, NotInstalled, Unsupported
from imgtool.errors import (
    EngineError,
    HostError,
    ImageError,
    ImgtoolError,
    Interrupted,
    NotReadDirectly,
)
from imgtool.formats.xattrs import Xattrs
from imgtool.guest.guest import Guest, OnProblem, Stretches
from imgtool.guest.model import Device, DiskExtent, Entry, Layout, OperatingSystem, SpaceUsage
from imgtool.host import interrupt

log = logging.getLogger(__name__)

FATAL_VARIABLE = "IMGTOOL_WORKER_FAILURE_IS_FATAL"

_Answer = TypeVar("_Answer")
Opener = Callable[[], AbstractContextManager[Guest]]


class ImageNotReadDirectly(ImageError, NotReadDirectly):
    """The direct engine does not know this of the image."""


class HostCannotReadDirectly(HostError, NotReadDirectly):
    """The host lacks what the direct engine needs."""


class CutOff(EngineError, NotReadDirectly):
    """The direct engine has given a part of an answer, and the rest will not come."""


def _too_late(error: Exception) -> ImgtoolError:
    """What remains to be said if a part of the answer is out already."""
    if interrupt.pending():
        return Interrupted("interrupted")
    return CutOff(
        f"the direct engine cannot go on: {error}", hint="read it with --engine libguestfs"
    )


def _failure_is_fatal() -> bool:
    """Whether a worker that fails ends the command, as where imgtool is tested: the appliance would
    hide the defect."""
    return bool(os.environ.get(FATAL_VARIABLE))


class ChosenGuest(Guest):
    """A guest that is read directly until something needs the appliance, and by it from then on.

    Both engines give the same answers, and the direct one refuses before the first part of an
    answer, so that a caller sees no seam. Without `appliance` a refusal is a `NotReadDirectly`.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        direct: Opener,
        appliance: Opener | None,
        *,
        image: str,
    ) -> None:
        super().__init__()
        self._stack = stack
        self._appliance = appliance
        self._image = image
        self._direct: contextlib.ExitStack | None = contextlib.ExitStack()
        stack.callback(self._direct.close)
        try:
            self._guest = self._direct.enter_context(direct())
        except (Unsupported, WorkerFailed) as error:
            self._switch(error)
        else:
            log.info("engine: direct")

    @property
    def engine(self) -> str:  # type: ignore[override]
        """The engine that answers now."""
        return self._guest.engine

    @property
    def oversized_xattrs(self) -> int:
        """How many extended attributes were left out so far, being longer than Linux gives any."""
        return self._guest.oversized_xattrs

    def _switch(self, error: Exception) -> None:
        if interrupt.pending():  # no appliance is started after Ctrl-C
            raise Interrupted("interrupted") from error
        if self._direct is None or (isinstance(error, WorkerFailed) and _failure_is_fatal()):
            raise error
        self._direct.close()
        self._direct = None
        reason = error.message if isinstance(error, WorkerFailed) else str(error)
        of_host = isinstance(error, NoSandbox | NotInstalled)
        if self._appliance is None and of_host:
            raise HostCannotReadDirectly(
                reason, hint="'imgtool doctor' says what each kind needs"
            ) from error
        if self._appliance is None:
            raise ImageNotReadDirectly(
                f"the direct engine does not read this: {reason}",
                subject=self._image,
                hint="leave --engine out: the appliance reads what its kernel knows",
            ) from error
        log.info("engine: libguestfs, since the direct engine does not read this: %s", reason)
        try:
            self._guest = self._stack.enter_context(self._appliance())
        except HostError as failed:
            if of_host:
                failed.message = f"{failed.message}; and without it, {reason}"
            raise

    def _ask(self, question: Callable[[Guest], _Answer]) -> _Answer:
        try:
            return question(self._guest)
        except (Unsupported, WorkerFailed) as error:
            self._switch(error)
            return question(self._guest)

    def _list(self, question: Callable[[Guest], Iterator[Entry]]) -> Iterator[Entry]:
        begun = False
        try:
            for entry in question(self._guest):
                begun = True
                yield entry
        except (Unsupported, WorkerFailed) as error:
            if begun:
                raise _too_late(error) from error
            self._switch(error)
            yield from question(self._guest)

    @contextlib.contextmanager
    def _stream(
        self, question: Callable[[Guest], AbstractContextManager[BinaryIO]]
    ) -> Iterator[BinaryIO]:
        with contextlib.ExitStack() as stack:
            stream = self._ask(lambda guest: stack.enter_context(question(guest)))
            try:
                yield stream
            except (Unsupported, WorkerFailed) as error:
                raise _too_late(error) from error

    @property
    def layout(self) -> Layout:
        """Which filesystem is mounted where; discovered at the first use."""
        return self._ask(lambda guest: guest.layout)

    def resolve(self, path: str | bytes) -> bytes:
        """The path without symbolic links; `NotInGuestError` if it leads nowhere."""
        return self._ask(lambda guest: guest.resolve(path))

    def lstat(self, path: str | bytes) -> Entry:
        """One path as it is; a symbolic link is not followed."""
        return self._ask(lambda guest: guest.lstat(path))

    def entries(
        self, path: str | bytes, *, xattrs: bool = False, on_problem: OnProblem | None = None
    ) -> Iterator[Entry]:
        """What is in a directory, sorted by name as bytes; the links are not followed."""
        return self._list(lambda guest: guest.entries(path, xattrs=xattrs, on_problem=on_problem))

    def walk(
        self,
        path: str | bytes = "/",
        *,
        checksum: str | None = None,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> Iterator[Entry]:
        """Everything below a directory: parents first, siblings sorted by name as bytes."""
        return self._list(
            lambda guest: guest.walk(path, checksum=checksum, xattrs=xattrs, on_problem=on_problem)
        )

    def unshown(self) -> Mapping[str, str]:
        """The mount points whose filesystems could not be mounted, and why."""
        return self._guest.unshown()

    def written_stretches(self, links: Sequence[int | None]) -> Stretches:
        """Which stretches of each disk come from the topmost `links` of its chain."""
        return self._ask(lambda guest: guest.written_stretches(links))

    def walk_unshared(
        self,
        path: str | bytes,
        *,
        checksum: str,
        written: Stretches,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> Iterator[Entry]:
        """`walk` with checksums, but not of files whose data are all outside `written`."""
        return self._list(
            lambda guest: guest.walk_unshared(
                path, checksum=checksum, written=written, xattrs=xattrs, on_problem=on_problem
            )
        )

    def xattrs(self, path: str | bytes) -> Xattrs:
        """The extended attributes of one path as it is; a symbolic link is not followed."""
        return self._ask(lambda guest: guest.xattrs(path))

    def checksum(self, kind: str, path: str | bytes) -> str:
        """The md5, sha1 or sha256 of a regular file, in hexadecimal."""
        return self._ask(lambda guest: guest.checksum(kind, path))

    def open(self, path: str | bytes) -> AbstractContextManager[BinaryIO]:
        """A regular file's bytes as a stream; links are followed inside the guest."""
        return self._stream(lambda guest: guest.open(path))

    def tar(
        self,
        path: str | bytes,
        excludes: Sequence[bytes] = (),
        *,
        xattrs: bool = False,
        on_problem: OnProblem | None = None,
    ) -> AbstractContextManager[BinaryIO]:
        """A directory's content (names relative to it) as a stream in tar format."""
        return self._stream(
            lambda guest: guest.tar(path, excludes, xattrs=xattrs, on_problem=on_problem)
        )

    def data_ranges(self, path: str | bytes) -> Sequence[tuple[int, int]]:
        """Where a sparse file has data: (offset, length) in bytes, ascending."""
        return self._ask(lambda guest: guest.data_ranges(path))

    def extents(self, path: str | bytes) -> Sequence[DiskExtent] | None:
        """Where on the guest's disks a regular file lies; None where the engine cannot tell."""
        return self._ask(lambda guest: guest.extents(path))

    def open_range(
        self, path: str | bytes, offset: int, length: int
    ) -> AbstractContextManager[BinaryIO]:
        """A part of a regular file as a stream."""
        return self._stream(lambda guest: guest.open_range(path, offset, length))

    def devices(self, *, everything: bool = False) -> tuple[Device, ...]:
        """The filesystems; with `everything` also partitions, LVs, VGs, PVs and devices."""
        return self._ask(lambda guest: guest.devices(everything=everything))

    def usage(self) -> tuple[SpaceUsage, ...]:
        """The space of every filesystem, with an `error` where one cannot be mounted."""
        return self._ask(lambda guest: guest.usage())

    def operating_systems(self, *, packages: bool = False) -> tuple[OperatingSystem, ...]:
        """What is installed in the guest."""
        return self._ask(lambda guest: guest.operating_systems(packages=packages))
