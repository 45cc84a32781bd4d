"""The parent's end of the conversation with the worker: it believes nothing that it hears."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import select
import time
from collections.abc import Callable, Generator
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

from imgtool import interrupt
from imgtool.engines.direct import protocol
from imgtool.engines.direct.filesystem import NeedsAppliance
from imgtool.engines.direct.ring import Ring
from imgtool.errors import EngineError, ImageError, ImgtoolError, Interrupted, NotInGuestError
from imgtool.guest.blocks import Block
from imgtool.guest.model import Application, Entry, OperatingSystem
from imgtool.image.places import printable

if TYPE_CHECKING:
    import subprocess

SILENCE = 60.0  # seconds without a byte from a worker that owes an answer
_LARGEST = (1 << 63) - 1
_LONGEST_LINE = 4096
_PIPE = 1 << 20
_MOST_PASSED = 256 << 20  # bytes of an answer that was stopped
_MOST_ALIVE = 1 << 16  # signs of life for one answer: 16 TiB of a file that is summed
# What is in no path: a NUL, and components that are empty, `.` or `..`
_ODD = re.compile(rb"\0|/(?:\.\.?)?(?:/|\Z)")
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


class _Answers:
    """The worker's stdout, read with a limit on how long it may be silent."""

    def __init__(self, descriptor: int, silence: float) -> None:
        self._descriptor = descriptor
        self._silence = silence
        # Fewer, larger parts; a system that allows no more than it gave is slower, not wrong.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE)

    def read(self, length: int) -> bytes:
        """Exactly `length` bytes, or fewer at the end."""
        found = bytearray(length)
        view = memoryview(found)
        done = 0
        deadline = time.monotonic() + self._silence
        while done < length:
            self._wait(deadline)
            count = os.readv(self._descriptor, [view[done:]])
            if not count:
                break
            done += count
        view.release()
        del found[done:]
        return found  # type: ignore[return-value]  # as good as bytes, and not copied

    def _wait(self, deadline: float) -> None:
        while not select.select([self._descriptor], [], [], 0.25)[0]:
            if interrupt.pending():
                raise Interrupted("interrupted")
            if time.monotonic() > deadline:
                raise TimeoutError


class Client:
    """One worker, for one guest. Not for several threads."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        image: str,
        silence: float = SILENCE,
        ring: Ring | None = None,
    ) -> None:
        assert process.stdin is not None and process.stdout is not None
        _keep_memory()
        self._requests = process.stdin
        self._answers: Any = _Answers(process.stdout.fileno(), silence)
        self._process = process
        self._image = image
        self._ring = ring
        self._busy = False
        self._broken = False

    @property
    def shared(self) -> int | None:
        """The descriptor of the memory that is shared with the worker."""
        return self._ring.descriptor if self._ring else None

    def failure(self, reason: str) -> WorkerFailed:
        """End the worker; the error that says why."""
        self._broken = True
        self._process.kill()
        return WorkerFailed(
            f"the direct engine's worker failed: {reason}",
            subject=self._image,
            hint="read it through the appliance: --engine libguestfs",
        )

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
        """The parts of an answer as they arrived; errors as `frames`."""
        with contextlib.closing(self.frames(do, **arguments)) as frames:
            for _, payload in frames:
                yield payload

    def frames(self, do: str, **arguments: object) -> Generator[tuple[bytes, bytes], None, None]:
        """The frames of an answer, their kinds (JSON or DATA) and payloads.

        Raises `NeedsAppliance`, `NotInGuestError`, `EngineError` or `ImageError` as the worker
        says, and `WorkerFailed` for a worker that dies, hangs or answers nonsense. An answer that
        is not read to its end is stopped.
        """
        if self._broken or self._busy:
            raise self.failure("it is not ready")
        self._busy = True
        body = json.dumps({"do": do, **arguments}).encode("ascii")
        self._heard(self._ask, body)
        alive = 0
        try:
            while True:
                kind, payload = self._heard(protocol.receive, self._answers)
                if kind == protocol.ALIVE:
                    alive += 1
                    if payload or alive > _MOST_ALIVE:
                        raise self.failure("it does not come to an end")
                    continue
                if kind in (protocol.END, protocol.ERROR):
                    self._busy = False
                    break
                if kind == protocol.LENT:
                    yield protocol.DATA, self._heard(self._lent, payload)
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

    def _lent(self, payload: bytes) -> memoryview:
        if self._ring is None:
            raise protocol.BadMessage("nothing is shared")
        return self._ring.lent(payload)

    def _taken(self) -> None:
        """Tell the worker that it may use again what it lent."""
        # It never has more than a few slots lent: who does not take their words in does not listen.
        if not select.select([], [self._requests], [], 0)[1]:
            raise self.failure("it does not listen")
        self._requests.write(protocol.TAKEN)
        self._requests.flush()

    def _stop(self) -> None:
        """Tell the worker that nobody reads the rest of its answer."""
        self._heard(self._ask, b"")  # protocol.STOP
        passed = 0
        while True:
            kind, payload = self._heard(protocol.receive, self._answers)
            if kind in (protocol.END, protocol.ERROR):
                self._busy = False
                return
            passed += len(payload) + 1
            if passed > _MOST_PASSED:
                raise self.failure("it does not stop")

    def _ask(self, body: bytes) -> None:
        self._requests.write(len(body).to_bytes(4, "big") + body)
        self._requests.flush()

    def _heard(self, action: Callable[..., Any], *arguments: object) -> Any:
        """What the worker does; its death and its nonsense as its failure."""
        try:
            return action(*arguments)
        except TimeoutError as error:
            raise self.failure("it does not answer") from error
        except (protocol.BadMessage, OSError) as error:
            raise self.failure(self._last_words() or str(error)) from error

    def _last_words(self) -> str:
        """The last line on the worker's standard error, of as much as fits into its pipe."""
        assert self._process.stderr is not None
        said = b""
        with contextlib.suppress(OSError):
            os.set_blocking(self._process.stderr.fileno(), False)
            said = os.read(self._process.stderr.fileno(), _PIPE)
        lines = said.decode("utf-8", "replace").strip().splitlines()
        return printable(lines[-1][:_LONGEST_LINE]) if lines else ""

    def _told(self, error: Any) -> Exception:
        if not isinstance(error, dict):
            raise protocol.BadMessage("an error of no known form")
        kind, message = error.get("kind"), error.get("message")
        if not isinstance(message, str):
            raise protocol.BadMessage("an error of no known form")
        message = printable(message[:_LONGEST_LINE])
        if kind == "missing":
            return NotInGuestError(message)
        if kind == "appliance":
            return NeedsAppliance(message)
        if kind == "image":
            said = self._last_words().removeprefix("qemu-nbd: ")
            if "Permission denied" in said:
                return NeedsAppliance("the sandbox may not read the image")
            return ImageError(f"QEMU cannot read it: {said or message}", subject=self._image)
        if kind == "failed":
            return EngineError(message)
        raise protocol.BadMessage("an error of no known kind")

    def one(self, do: str, **arguments: object) -> Any:
        """An answer of exactly one value, or None for an empty answer."""
        found: list[Any] = []
        for value in self.request(do, **arguments):
            if found:
                raise self.failure("an answer of several parts")
            found.append(value)
        return found[0] if found else None

    # Values with a form

    def checked(self, make: Callable[[], Any]) -> Any:
        """What `make` makes of an answer; nonsense in it is the worker's failure."""
        try:
            return make()
        except (
            *(protocol.BadMessage, TypeError, ValueError, LookupError),
            *(AttributeError, OverflowError),
        ) as error:
            raise self.failure("its answer makes no sense") from error


def whole(value: object, least: int = 0, most: int = _LARGEST) -> int:
    """A whole number within limits."""
    if type(value) is not int or not least <= value <= most:
        raise protocol.BadMessage("a number out of its limits")
    return value


def digest(value: object) -> str:
    """A checksum in hexadecimal."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{32,64}", value):
        raise protocol.BadMessage("no checksum")
    return value


def string(value: object) -> str:
    """A string of reasonable length."""
    if not isinstance(value, str) or len(value) > _LONGEST_LINE:
        raise protocol.BadMessage("no string")
    return value.encode("utf-8", "replace").decode()


def _optional(value: object) -> str | None:
    return None if value is None else string(value)


def block(row: Any) -> Block:
    """A block device as the worker tells of it."""
    device, kind, size, *texts, parents = row
    type, label, uuid, partuuid, partlabel, parttype = texts
    if kind not in ("device", "partition", "lv") or not string(device).startswith("/dev/"):
        raise protocol.BadMessage("no block device")
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
        parents=tuple(string(parent) for parent in parents),
    )


def real_path(value: object) -> bytes:
    """An absolute path without odd components."""
    raw = protocol.name(value)
    if not raw.startswith(b"/") or (raw != b"/" and _ODD.search(raw)):
        raise protocol.BadMessage("no path")
    return raw


def entry(row: Any) -> Entry:
    """An entry as the worker tells of it; one object for rows that are equal, one soon after the
    other, as in two guests that are compared.
    """
    return _entry(*row)


@lru_cache(16)
def _entry(*row: Any) -> Entry:
    path, mount, inode, mode, uid, gid, size, mtime, *others = row
    blocks, nlink, rdev, target, checksum, place = others
    if target is not None and "\0" in target:
        raise protocol.BadMessage("no target")
    return Entry(
        path=real_path(path),
        mode=whole(mode, most=0o177777),
        uid=whole(uid, most=0xFFFFFFFF),
        gid=whole(gid, most=0xFFFFFFFF),
        size=whole(size),
        mtime_ns=whole(mtime, -_LARGEST * 1000, _LARGEST * 1000),
        blocks=whole(blocks),
        nlink=whole(nlink),
        inode=whole(inode, most=(1 << 64) - 1),
        device=whole(mount),
        rdev=whole(rdev, most=(1 << 64) - 1),
        target=None if target is None else protocol.name(target),
        checksum=None if checksum is None else digest(checksum),
        place=None if place is None else digest(place),
    )


def operating_system(answer: Any) -> OperatingSystem:
    """An operating system as the worker tells of it."""
    applications = answer.pop("applications")
    mountpoints = {
        string(path): string(device) for path, device in answer.pop("mountpoints").items()
    }
    kernels = tuple(string(kernel) for kernel in answer.pop("kernels"))
    rows = None
    if applications is not None:
        rows = tuple(
            Application(string(name), string(version), string(release), whole(epoch), string(arch))
            for name, version, release, epoch, arch in applications
        )
    plain = {name: _optional(value) for name, value in answer.items()}
    return OperatingSystem(
        **plain,  # type: ignore[arg-type]
        mountpoints=mountpoints,
        kernels=kernels,
        applications=rows,
    )
