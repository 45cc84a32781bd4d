"""The bytes of a guest's disk: QEMU reads the chain, a private socket hands them over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgtool.errors import HostError, ImageError
from imgtool.host import program_messages
from imgtool.host.process import Limits, spawn
from imgtool.host.scratch import for_sockets, scratch_folder
from imgtool.host.system_packages import binding_fix
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.reading import passes_locks
from imgtool.image.chain.snapshot_view import at_snapshot, snapshot_option
from imgtool.image.chain.steady import refuse_others_opened, steady
from imgtool.text import printable, typed

# 200 links with QEMU's caches stay far below this; a hostile table that asks for more dies alone.
_LIMITS = Limits(memory=4 << 30)
_START_LIMIT = 30.0
_CLIENTS = 8
_LARGEST_READ = 32 << 20


def _binding() -> Any:
    try:
        import nbd
    except ImportError as error:
        raise HostError(
            "the Python binding of libnbd is missing",
            hint=binding_fix("python3-libnbd"),
        ) from error
    return nbd


class NbdServer:
    """A read-only server of one chain, for as long as the `with` block of `serve` lasts."""

    def __init__(self, socket: Path, image: Path) -> None:
        self.socket = socket
        self._image = image
        self._handle: Any = None

    @property
    def uri(self) -> str:
        """The address, for programs that take NBD URIs."""
        return f"nbd+unix:///?socket={self.socket}"

    def _connection(self) -> Any:
        if self._handle is None:
            nbd = _binding()
            handle = nbd.NBD()
            # A read that is answered in fragments and fails in the middle ends the connection.
            handle.set_request_structured_replies(False)
            try:
                handle.connect_unix(str(self.socket))
            except nbd.Error as error:
                raise self._explain(error) from error
            self._handle = handle
        return self._handle

    def _explain(self, error: Exception) -> ImageError:
        told = program_messages.by_qemu(str(error), typed(self._image))
        return ImageError(told.means, subject=printable(self._image), hint=told.step)

    @property
    def size(self) -> int:
        """The size of the disk in bytes, at the snapshot if there is one."""
        return int(self._connection().get_size())

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer past the end. Raises `ImageError` if QEMU cannot."""
        handle = self._connection()
        length = max(min(length, self.size - offset), 0)
        parts = []
        while length:
            wanted = min(length, _LARGEST_READ)
            try:
                parts.append(bytes(handle.pread(wanted, offset)))
            except _binding().Error as error:
                raise self._explain(error) from error
            offset += wanted
            length -= wanted
        return b"".join(parts)

    def close(self) -> None:
        """Let go of the connection; the server itself ends with the `with` block."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with contextlib.suppress(_binding().Error):
                handle.shutdown()


@contextlib.contextmanager
def serve(chain: Chain, *, snapshot: str | None = None) -> Iterator[NbdServer]:
    """Serve the chain, as it was at the internal `snapshot` if given, read-only.

    Raises `NotInGuestError` for a snapshot that is not there and `ImageError` if QEMU cannot open
    the chain. When the block ends the server and its socket are gone.
    """
    image = chain.active.path
    if any(link.encrypted for link in chain.links):
        raise ImageError("encrypted by QEMU, which is not supported", subject=printable(image))
    argv = ["qemu-nbd", "--read-only", "--persistent", f"--shared={_CLIENTS}"]
    with scratch_folder("nbd", for_sockets()) as folder, contextlib.ExitStack() as up:
        chain = up.enter_context(at_snapshot(chain, snapshot))
        chain = up.enter_context(steady(chain))
        argv += snapshot_option(chain, snapshot)
        socket, ready, output = (folder / name for name in ("socket", "pid", "log"))
        argv += [f"--socket={socket}", f"--pid-file={ready}"]
        argv += [chain.filename(force_share=passes_locks(chain))]
        log = up.enter_context(output.open("wb"))
        process = up.enter_context(spawn(argv, limits=_LIMITS, stderr=log.fileno()))
        deadline = time.monotonic() + _START_LIMIT
        # QEMU writes its process id once it listens.
        while not ready.exists():
            if process.poll() is not None:
                told = program_messages.by_qemu(output.read_text(errors="replace"), typed(image))
                raise ImageError(told.means, subject=printable(image), hint=told.step)
            if time.monotonic() > deadline:
                raise ImageError(f"QEMU did not open it in {_START_LIMIT:g} s", subject=image)
            time.sleep(0.002)
        if chain.names:
            own = [folder, *([chain.header.parent] if chain.header else [])]
            refuse_others_opened(process.pid, [chain], besides=own)
        server = NbdServer(socket, image)
        up.callback(server.close)
        yield server
