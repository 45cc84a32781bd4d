"""The worker's answers to layout discovery, as the parent asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from imgtool.engines.direct.parent import questions
from imgtool.engines.direct.parent.client import Client
from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.errors import EngineError
from imgtool.guest.blocks import Block, filesystems_on
from imgtool.guest.layout import LAYOUT_FILE_LIMIT
from imgtool.guest.model import Device


class WorkerVolume:
    """One filesystem, mounted alone in the worker."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def read(self, path: str, limit: int = LAYOUT_FILE_LIMIT) -> bytes | None:
        """The first `limit` bytes of a regular file; None if there is none."""
        return self._client.call(questions.small(path, limit))

    def is_dir(self, path: str) -> bool:
        """Whether the path is a directory; any case where the filesystem ignores it."""
        return self._client.call(questions.is_dir(path, any_case="Windows" in path))


class WorkerVolumes:
    """The worker's answers to layout discovery."""

    def __init__(self, client: Client, blocks: Sequence[Block]) -> None:
        self._client = client
        self._blocks = blocks
        self._without_type = {block.device for block in blocks if block.type is None}
        self.refused: dict[str, str] = {}

    def filesystems(self) -> Sequence[Device]:
        """The filesystems, without the subvolumes of those that cannot be read here."""
        return filesystems_on(self._blocks, lambda device: ())

    def blocks(self) -> Sequence[Block]:
        """The block devices."""
        return self._blocks

    @contextlib.contextmanager
    def look_into(self, source: str) -> Iterator[WorkerVolume]:
        """Open one filesystem; `EngineError` if it cannot be mounted."""
        if source in self._without_type:
            raise EngineError("no known filesystem", subject=source)
        try:
            self._client.call(questions.look(source))
        except Unsupported as error:
            self.refused[source] = str(error)
            raise EngineError(str(error), subject=source) from error
        yield WorkerVolume(self._client)

    def subvolume_by_id(self, device: str, number: int) -> str | None:
        """Subvolumes are not read here."""
        return None
