"""Writing that happens whole or not at all.

What is written goes to an overlay beside the image. When all of it is there and sound, the record
beside the image says "commit", and only then the overlay is written down into the image. Cut off
before that word, nothing has happened; after it, the image is read through the overlay, and
whoever works on it next finishes (`imgtool.image.change.recovery`). Disks of one guest are written
together: the record of the first one says the word for all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgtool.errors import Force, HostError, ImgtoolError, RefusedError
from imgtool.host import interrupt
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.holdings import holdings_of, note_holdings
from imgtool.image.chain.info import probe
from imgtool.image.chain.reading import base_lock, block_readers
from imgtool.image.chain.steady import bind_images
from imgtool.image.chain.writable import refuse_without_key
from imgtool.image.change.changes import marks
from imgtool.image.change.guards import (
    need_space,
    refuse_existing,
    refuse_several_names,
    refuse_to_guess,
    refuse_to_write,
)
from imgtool.image.change.made import made_file, make_file, written_as_made
from imgtool.image.change.overlays import backing_name
from imgtool.image.change.plan import Notice, put_in_place, sync_file
from imgtool.image.change.recovery import finish_write, is_untouched, resolve_intent
from imgtool.image.checks.checking import check_metadata
from imgtool.image.checks.dependants import refuse_if_base
from imgtool.image.intent.intent_log import Record, open_record, sync_folder, temporary_path
from imgtool.image.intent.marks import identity_of, is_same_file
from imgtool.image.locking.held import real_path, way_to
from imgtool.image.locking.host_file import exchanged_file
from imgtool.image.locking.locks import held_for_writing, refuse_if_in_use
from imgtool.image.policy import name_beside
from imgtool.image.qemu.qemu_img import qemu_img
from imgtool.text import printable, typed

# Of an overlay that holds nothing yet.
_EMPTY = 4 << 20


def overlay_on(
    chain: Chain, path: Path, name: str | None = None, *, record: Record | None = None
) -> Chain:
    """A new overlay at `path` on a chain, as a chain; in it the base is called `name`, or else by
    its absolute path. What the guest keeps from others is in it: it is for its owner alone. Which
    file it is goes to the `record` of the work that it is for.

    Raises `RefusedError` for a chain that QEMU could not open by the names in it.
    """
    refuse_to_guess(chain)
    active = chain.active
    # The chain was looked at: QEMU need not open it to know its size.
    words: list[str | Path] = ["create", "-u", "-f", "qcow2", "-F", active.format]
    words += ["-b", name or active.path.resolve(), path, str(active.virtual_size)]
    made = make_file(path)
    if record is not None:
        record.note(made=made)
    with written_as_made(words, path, made) as given:
        qemu_img(given, image=path)
    dirs = [link.path.parent for link in chain.links]
    above = open_chain(path, format="qcow2", backing_dirs=dirs)
    _refuse_other_files(above, path, made, chain)
    return above


def _refuse_other_files(above: Chain, path: Path, made: object, chain: Chain) -> None:
    """Raise `RefusedError` if what was opened is not the file that was made, on the very files that
    were looked at."""
    with above.open_file(path) as file:
        if not is_same_file(made, Path(f"/proc/self/fd/{file.fileno()}")):
            raise exchanged_file(path)
    below = [link.inodes for link in above.links[1:]]
    for link, found in zip(chain.links, below, strict=True):
        if [one for _, one in link.inodes] != [one for _, one in found]:
            raise exchanged_file(link.path)


class Transaction:
    """Overlays to write to, one for each disk of a guest; `commit` makes what was written theirs.

    `chains` are those of the overlays, in the order of the disks.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        records: Sequence[Record],
        backing_dirs: Sequence[str | Path],
        notice: Notice,
        force: Force = (),
    ) -> None:
        self.chains = tuple(chains)
        self._records = tuple(records)
        self._backing_dirs = backing_dirs
        self._notice = notice
        self._force = force

    def commit(self) -> None:
        """Write everything down; from the first moment on it is either finished or can be.

        Ctrl-C then waits for the end. Where not one byte could be written, all is as it was.
        """
        for chain in self.chains:
            _sound_on_disk(chain)
            refuse_if_in_use(Chain(chain.links[1:]), force=self._force)
        images = [record.image for record in self._records]
        with block_readers(images), held_for_writing([*self._overlays(), *images]):
            for chain in self.chains:
                self._refuse_what_came_meanwhile(Chain(chain.links[1:]), chain)
            for record, overlay in zip(self._records, self._overlays(), strict=True):
                sync_folder(record.path.parent)
                record.note(step="ready", noted=marks(record.image, overlay))
            with (
                interrupt.on_interrupt(self._say_that_it_goes_on),
                interrupt.defer_interrupts(last=True),
            ):
                self._records[0].note(step="commit")
                try:
                    self._finish()
                except BaseException:
                    if all(is_untouched(record) for record in self._records):
                        self._records[0].note(step="ready")
                    raise
                if interrupt.pending():
                    self._notice("done: all of it is in the image")

    def _overlays(self) -> list[Path]:
        return [chain.active.path for chain in self.chains]

    def _finish(self) -> None:
        # The chains were opened: what they stand on may be where no rule looks by itself.
        below = [link.path.parent for chain in self.chains for link in chain.links]
        for record in reversed(self._records):
            finish_write(record, below)

    def _refuse_what_came_meanwhile(self, image: Chain, overlay: Chain) -> None:
        """A guest that was started on the image, a new overlay on it, a host that became full."""
        refuse_if_in_use(image, force=self._force)
        refuse_if_base(image, self._backing_dirs, force=self._force)
        if image.active.driver == "file":
            free = max(image.active.virtual_size - image.active.actual_size, 0)
            grows = min(way_to(overlay.active.path).stat().st_blocks * 512, free)
            need_space(real_path(image.active.path).parent, grows)

    def _say_that_it_goes_on(self) -> None:
        self._notice("the write is being finished, so that nothing is left half done")


def _sound_on_disk(chain: Chain) -> None:
    overlay = probe(chain.active.path, format="qcow2")
    if not check_metadata(overlay).sound:
        raise ImgtoolError(
            "what was written did not arrive sound; the image is as it was",
            subject=printable(chain.links[1].path),
        )
    sync_file(overlay.path)


class Clone:
    """A new overlay to write to, which `commit` gives its name; as a `Transaction` of one disk."""

    def __init__(self, chain: Chain, new: Path, made: object) -> None:
        self.chains = (chain,)
        self._new = new
        self._made = made

    def commit(self) -> None:
        """Give it its name; the image that it stands on is as it was."""
        _sound_on_disk(self.chains[0])
        temporary = self.chains[0].active.path
        mode = stat.S_IMODE(way_to(self.chains[0].links[1].path).stat().st_mode) | stat.S_IWUSR
        with made_file(temporary, made=self._made) as descriptor:
            os.fchmod(descriptor, mode)
        put_in_place(temporary, self._new, self._made)


@contextlib.contextmanager
def clone(chain: Chain, new: Path, *, force: Force = ()) -> Iterator[Clone]:
    """Begin to write to a linked clone of an image; without `commit` nothing is left of it.

    Raises `RefusedError` if `new` exists, or if the image is being written by somebody, or if QEMU
    would need a key for it.
    """
    refuse_existing(new)
    refuse_without_key(chain.links)
    # Others may read it, as other clones do.
    refuse_if_in_use(chain, read_only=True, force=force)
    with base_lock(chain), open_record(new, create=True) as record:
        assert record is not None
        resolve_intent(record, finish=True)
        temporary = temporary_path(new)
        record.note(operation="create", temporary=str(temporary))
        name = backing_name(chain.active.path, new)
        try:
            above = overlay_on(chain, temporary, name, record=record)
            yield Clone(above, new, record.facts.get("made"))
        finally:
            resolve_intent(record, finish=False)


@contextlib.contextmanager
def transaction(
    chains: Sequence[Chain],
    *,
    backing_dirs: Sequence[str | Path] = (),
    tmp_dir: Path | None = None,
    force: Force = (),
    notice: Notice,
) -> Iterator[Transaction]:
    """Begin to write to the images at the tops of `chains`; what is not committed is undone.

    The overlays are beside the images, or in `tmp_dir`. Raises `RefusedError` for an image that is
    in use, the base of others, or that another imgtool is at work on, and `HostError` where this
    user may not write.
    """
    if tmp_dir is not None and not tmp_dir.is_dir():
        what = "not a folder" if os.path.lexists(tmp_dir) else "no such folder"
        raise HostError(what, subject=printable(tmp_dir), hint="--tmp-dir names one that is there")
    for chain in chains:
        refuse_to_write(chain, backing_dirs, force=force)
        refuse_several_names(chain.active.path)
        beside = temporary_path(chain.active.path)
        need_space(tmp_dir or beside.parent, _EMPTY)
    name = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        for chain in chains:
            stack.enter_context(bind_images(chain.links))
        images = [real_path(chain.active.path) for chain in chains]
        records: list[Record] = []
        overlays = []
        try:
            for chain, image in zip(chains, images, strict=True):
                record = stack.enter_context(open_record(image, create=True))
                assert record is not None
                if record.facts:
                    raise RefusedError(
                        f"a {record.operation} of it was interrupted",
                        subject=printable(image),
                        hint=f"imgtool recover {typed(image)}",
                    )
                overlay = temporary_path(image)
                if tmp_dir is not None:
                    overlay = tmp_dir.resolve() / overlay.name
                held = holdings_of(image, chain.active.format)
                record.note(
                    operation="write",
                    format=chain.active.format,
                    id=name,
                    images=[name_beside(image, other) for other in images],
                    number=len(records),
                    overlay=name_beside(image, overlay),
                    identity=identity_of(image),
                    **note_holdings(held, held),
                )
                records.append(record)
                overlays.append(overlay)
            above = [
                overlay_on(chain, overlay, backing_name(image, overlay), record=record)
                for chain, image, overlay, record in zip(
                    chains, images, overlays, records, strict=True
                )
            ]
            for chain in above:
                stack.enter_context(bind_images(chain.links[:1]))
            yield Transaction(above, records, backing_dirs, notice, force)
        finally:
            # What was committed has no record any more. The first one's goes last.
            for record in reversed(records):
                line = resolve_intent(record, finish=False, backing_dirs=backing_dirs)
                if line and record.facts:
                    notice(line)
