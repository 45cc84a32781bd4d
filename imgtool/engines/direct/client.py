"""The parent's end of the conversation with the worker: it believes nothing that it hears."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import interrupt, said
from imgtool.engines.direct import protocol
from imgtool.engines.direct.filesystem import NeedsAppliance, SandboxFailed
from imgtool.engines.direct.messages import LONGEST_LINE, string
from imgtool.engines.direct.pipes import Patience, Pipes
from imgtool.engines.direct.ring import Ring
from imgtool.errors import EngineError, ImageError, ImgtoolError, NotInGuestError
from imgtool.image.places import printable, typed

if TYPE_CHECKING:
    import subprocess

SILENCE = 60.0  # seconds in which a worker that owes an answer has to be heard
# How long all answers together may be waited for (see `Patience`). Names and contents: ten minutes,
# and a second more for each KiB, some ten names, and for each answer.
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
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


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
        scratch: int | None = None,
    ) -> None:
        assert process.stdin is not None and process.stdout is not None
        _keep_memory()
        self._pipes: Any = Pipes(process.stdin.fileno(), process.stdout.fileno(), scratch)
        self._silence = silence
        self._patience = Patience(**_PATIENCE)
        self._patience_for_sums = Patience(**_PATIENCE_FOR_SUMS)
        self._patience_for_layout = Patience(**_PATIENCE_FOR_LAYOUT)
        self._process = process
        self._image = image
        self._ring = ring
        self.scratch = scratch
        self._begun = False
        self._busy = False
        self._broken = False

    @property
    def shared(self) -> int | None:
        """The descriptor of the memory that is shared with the worker."""
        return self._ring.descriptor if self._ring else None

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
        return WorkerFailed(
            f"the direct engine's worker failed: {reason}",
            subject=self._image,
            hint="read it through the appliance: --engine libguestfs",
        )

    def _end(self) -> None:
        self._broken = True
        self._process.kill()

    def request(self, do: str, **arguments: object) -> Generator[Any, None, None]:
        """The parts of an answer: JSON values as such, data as bytes, or as a memoryview that is
        good until the next part; errors as `frames`.
        """
        with contextlib.closing(self.frames(do, **arguments)) as frames:
            for kind, payload in frames:
                if kind != protocol.DATA:
                    yield self.checked(partial(protocol.parsed, payload))
                else:
                    yield payload

    def payloads(self, do: str, **arguments: object) -> Generator[bytes, None, None]:
        """The parts of an answer of JSON alone, as they arrived; errors as `frames`."""
        with contextlib.closing(self.frames(do, **arguments)) as frames:
            for kind, payload in frames:
                if kind != protocol.JSON:
                    raise self.failure("not what was asked for")
                yield payload

    def frames(self, do: str, **arguments: object) -> Generator[tuple[bytes, bytes], None, None]:
        """The frames of an answer, their kinds (JSON or DATA) and payloads.

        Raises `NeedsAppliance`, `NotInGuestError`, `EngineError` or `ImageError` as the worker
        says, `WorkerFailed` for a worker that dies, hangs or answers nonsense, and `SandboxFailed`
        if it does before anything of the image was looked at. An answer that is not read to its end
        is stopped.
        """
        if self._broken or self._busy:
            raise self.failure("it is not ready")
        self._busy = True
        body = json.dumps({"do": do, **arguments}).encode("ascii")
        sums = do == "checksum" or arguments.get("checksum") is not None
        patience = self._patience_for_sums if sums else self._patience
        try:
            self._pipes.allow(self._silence)
            self._heard(self._pipes.write, len(body).to_bytes(4, "big") + body)
            while True:
                kind, payload = self._heard(self._next, patience)
                if kind == protocol.ALIVE:
                    if not sums:
                        raise self.failure("it has nothing to work at")
                    continue
                if kind in (protocol.END, protocol.ERROR):
                    self._busy = False
                    patience.answered()
                    break
                if kind == protocol.LENT:
                    lent = self._heard(self._lent, payload)
                    patience.earned(len(lent))
                    yield protocol.DATA, lent
                    self._heard(self._taken)
                    continue
                yield kind, payload
        except GeneratorExit:
            if not (self._broken or interrupt.pending()):
                self._stop()
            raise
        finally:
            if self._busy and not self._broken:
                self.failure("interrupted")  # perhaps within a frame: nothing more is heard
        if kind == protocol.ERROR:
            raise self.checked(lambda: self._told(protocol.parsed(payload)))

    def _next(self, patience: Patience) -> tuple[bytes, bytes]:
        self._pipes.allow(self._silence)
        kind, payload = protocol.receive(self._pipes)
        begun, self._begun = self._begun, True
        if kind == protocol.READY:
            if begun:
                raise protocol.BadMessage("it begins twice")
            kind, payload = protocol.receive(self._pipes)
        patience.used(self._pipes.spent())
        patience.earned(len(payload))
        return kind, payload

    def _lent(self, payload: bytes) -> memoryview:
        if self._ring is None:
            raise protocol.BadMessage("nothing is shared")
        return self._ring.lent(payload)

    def _taken(self) -> None:
        """Tell the worker that it may use again what it lent."""
        # It never has more than a few slots lent: who does not take their words in does not listen.
        if not self._pipes.offer(protocol.TAKEN):
            raise self.failure("it does not listen")

    def _stop(self) -> None:
        """Tell the worker that nobody reads the rest of its answer, and pass that over."""
        self._pipes.allow(self._silence)  # for all of it
        self._heard(self._pipes.write, protocol.STOP)
        while self._busy:
            kind, _ = self._heard(protocol.receive, self._pipes)
            self._busy = kind not in (protocol.END, protocol.ERROR)

    def _heard(self, action: Callable[..., Any], *arguments: object) -> Any:
        """What the worker does; its death and its nonsense as its failure."""
        try:
            return action(*arguments)
        except TimeoutError as error:
            raise self.failure("it does not answer") from error
        except (protocol.BadMessage, OSError) as error:
            said = self._last_words() or str(error)
            if not self._begun and isinstance(error, (protocol.Ended, OSError)):
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

    def _told(self, error: Any) -> Exception:
        if not isinstance(error, dict):
            raise protocol.BadMessage("an error of no known form")
        kind, message = error.get("kind"), error.get("message")
        if not isinstance(message, str):
            raise protocol.BadMessage("an error of no known form")
        message = printable(message[:LONGEST_LINE])
        if kind == "missing":
            return NotInGuestError(message)
        if kind == "appliance":
            return NeedsAppliance(message)
        if kind == "lost":
            return self.failure(message)
        if kind == "image":
            words = self._last_words()
            if "Permission denied" in words:
                return NeedsAppliance("the sandbox may not read the image")
            told = said.by_qemu(words or message, typed(Path(self._image)))
            return ImageError(told.means, subject=self._image, hint=told.step)
        if kind == "failed":
            path = error.get("path")
            return EngineError(message, subject=None if path is None else printable(string(path)))
        raise protocol.BadMessage("an error of no known kind")

    def one(self, do: str, **arguments: object) -> Any:
        """An answer of exactly one value, or None for an empty answer."""
        found: list[Any] = []
        for value in self.request(do, **arguments):
            if found:
                raise self.failure("an answer of several parts")
            found.append(value)
        return found[0] if found else None

    def checked(self, make: Callable[..., Any], *arguments: object) -> Any:
        """What `make` makes of an answer; nonsense in it is the worker's failure.

        `make` looks at each value before it uses it, and says `BadMessage`: any other exception is
        a defect of imgtool, which the appliance is not to hide.
        """
        try:
            return make(*arguments)
        except protocol.BadMessage as error:
            raise self.failure("its answer makes no sense") from error
