"""Writing that happens whole or not at all.

What is written goes to an overlay beside the image. When all of it is there and sound, the record
beside the image says "commit", and only then the overlay is written down into the image. Cut off
before that word, nothing has happened; after it, the image is read through the overlay, and
whoever works on it next finishes (`imgtool.image.recovery`). Disks of one guest are written
together: the record of the first one says the word for all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.errors import ImgtoolError, RefusedError
from imgtool.image.chain import Chain, open_chain
from imgtool.image.checking import check_metadata
from imgtool.image.guards import refuse_if_too_little_space, refuse_to_guess, refuse_to_write
from imgtool.image.info import probe
from imgtool.image.places import printable
from imgtool.image.qemu_img import qemu_img
from imgtool.image.record import Record, opened, temporary_path
from imgtool.image.recovery import finish_write, settle
from imgtool.image.work import Notice, sync_file

# Of an overlay that holds nothing yet.
_EMPTY = 4 << 20


def overlay_on(chain: Chain, path: Path) -> Chain:
    """A new overlay at `path`, named absolutely to what it stands on, as a chain to be opened.

    Raises `RefusedError` for a chain that QEMU could not open by the names in it.
    """
    refuse_to_guess(chain)
    active = chain.active
    words: list[str | Path] = ["create", "-q", "-f", "qcow2", "-F", active.format]
    qemu_img([*words, "-b", active.path.resolve(), path], image=path)
    return open_chain(path, format="qcow2", backing_dirs=[link.path.parent for link in chain.links])


class Transaction:
    """Overlays to write to, one for each disk of a guest; `commit` makes what was written theirs.

    `chains` are those of the overlays, in the order of the disks.
    """

    def __init__(self, chains: Sequence[Chain], records: Sequence[Record]) -> None:
        self.chains = tuple(chains)
        self._records = tuple(records)

    def commit(self) -> None:
        """Write everything down; from the first moment on it is either finished or can be."""
        for chain in self.chains:
            overlay = probe(chain.active.path, format="qcow2")
            if not check_metadata(overlay).sound:
                raise ImgtoolError(
                    "what was written did not arrive sound; the image is as it was",
                    subject=printable(chain.links[1].path),
                )
            sync_file(overlay.path)
        for record in self._records:
            record.note(step="ready")
        self._records[0].note(step="commit")
        for record in reversed(self._records):
            finish_write(record)


@contextlib.contextmanager
def transaction(
    chains: Sequence[Chain],
    *,
    backing_dirs: Sequence[str | Path] = (),
    notice: Notice,
) -> Iterator[Transaction]:
    """Begin to write to the images at the tops of `chains`; what is not committed is undone.

    Raises `RefusedError` for an image that is in use, the base of others, or that another imgtool
    is at work on, and `HostError` where this user may not write.
    """
    for chain in chains:
        refuse_to_write(chain, backing_dirs)
        refuse_if_too_little_space(chain.active.path.resolve().parent, _EMPTY)
    name = secrets.token_hex(8)
    images = [str(chain.active.path.resolve()) for chain in chains]
    with contextlib.ExitStack() as stack:
        records = []
        for chain in chains:
            record = stack.enter_context(opened(chain.active.path, create=True))
            assert record is not None
            if record.facts:
                raise RefusedError(
                    f"a {record.operation} of it was interrupted",
                    subject=printable(chain.active.path),
                    hint=f"imgtool recover {printable(chain.active.path)}",
                )
            overlay = str(temporary_path(chain.active.path))
            record.note(operation="write", id=name, images=images, overlay=overlay)
            records.append(record)
        try:
            overlays = [
                overlay_on(chain, Path(record.facts["overlay"]))
                for chain, record in zip(chains, records, strict=True)
            ]
            for chain in overlays:
                os.chmod(chain.active.path, 0o600)  # noqa: PTH101 - it holds what the guest hides
            yield Transaction(overlays, records)
        finally:
            # What was committed has no record any more.
            for record in records:
                line = settle(record, finish=False)
                if line and record.facts:
                    notice(line)
