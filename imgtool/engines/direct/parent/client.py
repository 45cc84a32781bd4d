"""The parent's end of the conversation with the worker: it believes nothing that it hears."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from imgtool.engines.direct.parent.pipes import Pipes, TimeBudget
from imgtool.engines.direct.parent.questions import Question
from imgtool.engines.direct.parent.ring import Ring
from imgtool.engines.direct.parent.scratch import Scratch
from imgtool.engines.direct.wire import frames as wire_frames
from imgtool.engines.direct.wire import requests
from imgtool.engines.direct.wire.messages import LONGEST_LINE, Data, string
from imgtool.engines.direct.wire.refusals import SandboxFailed, Unsupported
from imgtool.errors import EngineError, ImageError, ImgtoolError, NotInGuestError
from imgtool.host import interrupt, program_messages
from imgtool.host.libc import libc
from imgtool.text import printable, typed

if TYPE_CHECKING:
    import subprocess

_Answer = TypeVar("_Answer")
_Done = TypeVar("_Done")
_Arguments = ParamSpec("_Arguments")

SILENCE = 60.0  # seconds in which a worker that owes an answer has to be heard
# How long all answers together may be waited for (see `TimeBudget`). Names and contents: ten
# minutes, and a second more for each KiB, some ten names, and for each answer.
_PATIENCE = {"start": 600.0, "least": 1024.0, "answer": 1.0}
# All that finding the layout asks for, a few answers for each filesystem, in all.
_PATIENCE_FOR_LAYOUT = {"start": 300.0, "least": math.inf, "answer": 0.0}
# Sums, of which the parent sees nothing but that somebody is at work: a day, a minute more for each
# row and each answer, and a week in all.
_PATIENCE_FOR_SUMS = {"start": 24 * 3600.0, "least": 2.0, "answer": 60.0, "most": 7 * 24 * 3600.0}
_MOST_WORDS = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def _keep_memory() -> None:
    """Buffers of a megabyte come and go; to give each back to the kernel costs more than to fill
    it.
    """
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


def _asks_for_sums(request: requests.Request) -> bool:
    if isinstance(request, requests.Walk):
        return request.checksum is not None
    return isinstance(request, requests.Checksum)


class WorkerFailed(ImgtoolError):
    """The worker died, hung, or answered nonsense. Not an error of the guest that a caller goes on
    after: the appliance is asked instead.
    """


class Client:
    """One worker, for one guest. Not for several threads."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        image: str,
        silence: float = SILENCE,
        ring: Ring | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        assert process.stdin is not None and process.stdout is not None
        _keep_memory()
        self._pipes = Pipes(process.stdin.fileno(), process.stdout.fileno())
        self._silence = silence
        self._patience = TimeBudget(**_PATIENCE)
        self._patience_for_sums = TimeBudget(**_PATIENCE_FOR_SUMS)
        self._patience_for_layout = TimeBudget(**_PATIENCE_FOR_LAYOUT)
        self._process = process
        self._image = image
        self._ring = ring
        self._scratch = scratch
        self._begun = False
        self._busy = False
        self._broken = False

    @property
    def shared(self) -> int | None:
        """The descriptor of the memory that is shared with the worker."""
        return self._ring.descriptor if self._ring else None

    @property
    def scratch(self) -> int | None:
        """The descriptor of the memory that the worker may write to, where it has no folder."""
        return self._scratch.descriptor if self._scratch else None

    @contextlib.contextmanager
    def in_layout_time(self) -> Iterator[None]:
        """What is asked meanwhile finds the layout: nothing that is answered earns more time."""
        kept, self._patience = self._patience, self._patience_for_layout
        try:
            yield
        finally:
            self._patience = kept

    def failure(self, reason: str) -> WorkerFailed:
        """End the worker; the error that says why."""
        self._end()
        if self._scratch is not None and self._scratch.is_overfull:
            reason = "it takes too much memory"
        return WorkerFailed(
            f"the direct engine's worker failed: {reason}",
            subject=self._image,
            hint="read it through the appliance: --engine libguestfs",
        )

    def _end(self) -> None:
        self._broken = True
        self._process.kill()

    def call(self, question: Question[_Answer]) -> _Answer:
        """An answer of one part, or of none; errors as `frames`."""
        answer: object = None
        for number, part in enumerate(self._parts(question.request)):
            if number:
                raise self.failure("an answer of several parts")
            answer = part
        with self.decoding():
            return question.decode(answer)

    def stream(self, question: Question[_Answer]) -> Generator[_Answer, None, None]:
        """The parts of an answer, of which a memoryview is good until the next part; errors as
        `frames`.
        """
        with contextlib.closing(self._parts(question.request)) as parts:
            for part in parts:
                with self.decoding():
                    decoded = question.decode(part)
                yield decoded

    def _parts(self, request: requests.Request) -> Generator[object, None, None]:
        """The parts of an answer: JSON values as such, data as bytes or as a memoryview."""
        with contextlib.closing(self.frames(request)) as frames:
            for kind, payload in frames:
                if kind != wire_frames.JSON or isinstance(payload, memoryview):
                    yield payload
                else:
                    with self.decoding():
                        value = wire_frames.parse_json(payload)
                    yield value

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Nonsense in an answer that is decoded meanwhile is the worker's failure.

        What decodes looks at each value before it uses it, and says `BadMessage`: any other
        exception is a defect of imgtool, which the appliance is not to hide.
        """
        try:
            yield
        except wire_frames.BadMessage as error:
            raise self.failure("its answer makes no sense") from error

    def payloads(self, request: requests.Request) -> Generator[bytes, None, None]:
        """The parts of an answer of JSON alone, as they arrived; errors as `frames`."""
        with contextlib.closing(self.frames(request)) as frames:
            for kind, payload in frames:
                if kind != wire_frames.JSON or isinstance(payload, memoryview):
                    raise self.failure("not what was asked for")
                yield payload

    def frames(self, request: requests.Request) -> Generator[tuple[bytes, Data], None, None]:
        """The frames of an answer, their kinds (JSON or DATA) and payloads.

        Raises `Unsupported`, `NotInGuestError`, `EngineError` or `ImageError` as the worker
        says, `WorkerFailed` for a worker that dies, hangs or answers nonsense, and `SandboxFailed`
        if it does before anything of the image was looked at. An answer that is not read to its end
        is stopped.
        """
        if self._broken or self._busy:
            raise self.failure("it is not ready")
        self._busy = True
        body = requests.encode(request)
        sums = _asks_for_sums(request)
        patience = self._patience_for_sums if sums else self._patience
        try:
            self._pipes.allow(self._silence)
            self._guard_io(self._pipes.write, len(body).to_bytes(4, "big") + body)
            while True:
                kind, payload = self._guard_io(self._next, patience)
                if kind == wire_frames.ALIVE:
                    if not sums:
                        raise self.failure("it has nothing to work at")
                    continue
                if kind in (wire_frames.END, wire_frames.ERROR):
                    self._busy = False
                    patience.credit_answer()
                    break
                if kind == wire_frames.GRANT:
                    lent = self._guard_io(self._lent, payload)
                    patience.credit(len(lent))
                    yield wire_frames.DATA, lent
                    self._guard_io(self._release)
                    continue
                yield kind, payload
        except GeneratorExit:
            if not (self._broken or interrupt.pending()):
                self._stop()
            raise
        finally:
            if self._busy and not self._broken:
                self.failure("interrupted")  # perhaps within a frame: nothing more is heard
        if kind == wire_frames.ERROR:
            with self.decoding():
                told = self._decode_error(wire_frames.parse_json(payload))
            raise told

    def _next(self, patience: TimeBudget) -> tuple[bytes, bytes]:
        self._pipes.allow(self._silence)
        kind, payload = wire_frames.receive(self._pipes)
        begun, self._begun = self._begun, True
        if kind == wire_frames.READY:
            if begun:
                raise wire_frames.BadMessage("it begins twice")
            kind, payload = wire_frames.receive(self._pipes)
        patience.spend(self._pipes.spent())
        patience.credit(len(payload))
        return kind, payload

    def _lent(self, payload: bytes) -> memoryview:
        if self._ring is None:
            raise wire_frames.BadMessage("nothing is shared")
        return self._ring.lent(payload)

    def _release(self) -> None:
        """Tell the worker that it may use again what it lent."""
        # It never has more than a few slots lent: who does not take their words in does not listen.
        if not self._pipes.offer(wire_frames.RELEASE):
            raise self.failure("it does not listen")

    def _stop(self) -> None:
        """Tell the worker that nobody reads the rest of its answer, and pass that over."""
        self._pipes.allow(self._silence)  # for all of it
        self._guard_io(self._pipes.write, wire_frames.STOP)
        while self._busy:
            kind, _ = self._guard_io(wire_frames.receive, self._pipes)
            self._busy = kind not in (wire_frames.END, wire_frames.ERROR)

    def _guard_io(
        self,
        action: Callable[_Arguments, _Done],
        *arguments: _Arguments.args,
        **named: _Arguments.kwargs,
    ) -> _Done:
        """What the worker does; its death and its nonsense as its failure."""
        try:
            return action(*arguments, **named)
        except TimeoutError as error:
            raise self.failure("it does not answer") from error
        except (wire_frames.BadMessage, OSError) as error:
            said = self._last_words() or str(error)
            if not self._begun and isinstance(error, (wire_frames.Ended, OSError)):
                self._end()
                raise SandboxFailed(said) from error
            raise self.failure(said) from error

    def _last_words(self) -> str:
        """The last line on the worker's standard error, of as much as fits into its pipe."""
        assert self._process.stderr is not None
        words = b""
        with contextlib.suppress(OSError):
            os.set_blocking(self._process.stderr.fileno(), False)
            words = os.read(self._process.stderr.fileno(), _MOST_WORDS)
        lines = words.decode("utf-8", "replace").strip().splitlines()
        return printable(lines[-1][:LONGEST_LINE]) if lines else ""

    def _decode_error(self, error: object) -> Exception:
        if not isinstance(error, dict):
            raise wire_frames.BadMessage("an error of no known form")
        kind, message = error.get("kind"), error.get("message")
        if not isinstance(message, str):
            raise wire_frames.BadMessage("an error of no known form")
        message = printable(message[:LONGEST_LINE])
        if kind == "missing":
            return NotInGuestError(message)
        if kind == "appliance":
            return Unsupported(message)
        if kind == "lost":
            return self.failure(message)
        if kind == "image":
            words = self._last_words()
            if "Permission denied" in words:
                return Unsupported("the sandbox may not read the image")
            told = program_messages.by_qemu(words or message, typed(Path(self._image)))
            return ImageError(told.means, subject=self._image, hint=told.step)
        if kind == "failed":
            path = error.get("path")
            return EngineError(message, subject=None if path is None else printable(string(path)))
        raise wire_frames.BadMessage("an error of no known kind")
