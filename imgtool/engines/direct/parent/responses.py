"""Long answers of the worker: rows that wait in a temporary file, and bytes as a stream."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imgtool.engines.direct.parent.client import Client
from imgtool.engines.direct.parent.questions import Question
from imgtool.engines.direct.wire import frames as wire_frames
from imgtool.engines.direct.wire.messages import Data, Problem
from imgtool.errors import EngineError
from imgtool.guest.guest import Guest, OnProblem
from imgtool.guest.model import Entry
from imgtool.host.scratch import large_files
from imgtool.text import printable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER = 2 << 20
_MOST_ROWS = 8 << 30  # bytes: some fifty million entries


class AnswerStream(io.RawIOBase):
    """Bytes of an answer as a file, no more than `most` if that is known. Problems among them are
    told to `on_problem`.
    """

    def __init__(
        self,
        client: Client,
        parts: Iterator[Data | Problem],
        most: int | None = None,
        on_problem: OnProblem | None = None,
    ) -> None:
        self._client = client
        self._on_problem = on_problem
        self._parts = parts
        self._most = most
        self._held = memoryview(b"")

    def readable(self) -> bool:
        """It is for reading alone."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Bytes of the part at hand, or of the next one; 0 at the end."""
        while not self._held:
            part = next(self._parts, None)
            if part is None:
                return 0
            if isinstance(part, Problem):
                if self._on_problem is not None:
                    self._on_problem(part.path, str(part.reason))
                continue
            if self._most is not None:
                self._most -= len(part)
                if self._most < 0:
                    raise self._client.failure("more than was asked for")
            self._held = memoryview(part)
        view = memoryview(buffer)
        count = min(len(view), len(self._held))
        view[:count] = self._held[:count]
        self._held = self._held[count:]
        return count


class Contents(io.BufferedReader):
    """A file's bytes. Those before an error are given, and the error to who reads on."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, _BUFFER)
        self._error: EngineError | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes, fewer before the end or an error; without a size the error comes
        before any of them.
        """
        if self._error is not None:
            raise self._error
        if size is None or size < 0:
            return super().read()
        parts: list[bytes] = []
        while size:
            try:
                part = self.read1(size)
            except EngineError as error:
                if not parts:
                    raise
                self._error = error
                break
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextlib.contextmanager
def spool_rows(
    client: Client, walk: Question[Iterator[Entry | Problem]]
) -> Iterator[Iterator[Entry | Problem]]:
    """All the rows of a walk, which is read to its end before the first is given on.

    So a refusal comes before any row, and who looks at a row may ask for more meanwhile.
    """
    with tempfile.SpooledTemporaryFile(
        max_size=8 << 20, prefix="imgtool-", dir=large_files()
    ) as spool:
        for payload in client.payloads(walk.request):
            if not payload.startswith(b"[["):
                raise client.failure("no rows")
            spool.write(len(payload).to_bytes(4, "big") + payload)
            if spool.tell() > _MOST_ROWS:
                raise client.failure("an answer that does not end")
        spool.seek(0)

        def rows() -> Iterator[Entry | Problem]:
            while head := spool.read(4):
                payload = spool.read(int.from_bytes(head, "big"))
                with client.decoding():
                    yield from walk.decode(wire_frames.parse_json(payload))

        yield rows()


def survey_for_tar(guest: Guest, top: str, xattrs: bool, on_problem: OnProblem | None) -> None:
    """Look at all that a tar stream of a directory will hold, so that what has to be refused is
    refused before it begins, and say whose attributes will be missing in it.
    """
    last = (b"", "")

    def keep(path: bytes, reason: str) -> None:
        nonlocal last
        last = path, reason

    first = [guest.with_xattrs(guest.lstat(top), keep)] if xattrs else []
    for entry in itertools.chain(first, guest.walk(top, xattrs=xattrs, on_problem=keep)):
        if not xattrs or last[0] != entry.path:
            continue  # what else cannot be read, the stream says
        if on_problem is None:
            raise EngineError(last[1], subject=printable(wire_frames.text(entry.path)))
        on_problem(*last)


def exclusion_path(top: str, pattern: bytes) -> bytes:
    """The path that an exclusion of `tar` means: a literal name, its wildcards escaped."""
    relative = re.sub(rb"\\(.)", rb"\1", pattern.removeprefix(b"./"), flags=re.DOTALL)
    return wire_frames.name(top).rstrip(b"/") + b"/" + relative
