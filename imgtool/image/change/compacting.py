"""Give back the space of an image's file that holds nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import NO_ROOM, Force, ImageError, ImgtoolError, host_file_error
from imgtool.formats import qcow2
from imgtool.formats.qcow2_refcounts import used_ranges
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.holdings import Holdings, holdings_of
from imgtool.image.chain.info import probe
from imgtool.image.chain.steady import steady
from imgtool.image.change.copies import convert, options_like, size_of_copy
from imgtool.image.change.guards import (
    refuse_encrypted,
    refuse_if_too_little_space,
    refuse_second_file,
    refuse_to_guess,
    refuse_to_replace,
)
from imgtool.image.change.made import made_file
from imgtool.image.change.overlays import backing_name
from imgtool.image.change.plan import Plan, Seen, Work
from imgtool.image.checks.checking import check_metadata
from imgtool.image.checks.recognise import require_known_content
from imgtool.image.intent.intent_log import temporary_path
from imgtool.image.locking.locks import block_writers
from imgtool.image.qemu.qemu_img import OnPart
from imgtool.text import printable

_PIECE = 1 << 20  # read at a time
_BLOCK = 4096  # what reads as zeros becomes a hole, this much at a time


def plan_compact(
    path: Path,
    *,
    format: str | None = None,
    force: Force = (),
    backing_dirs: Sequence[str | Path] = (),
) -> Plan:
    """Write the image into a new file without what holds nothing, prove it, and swap it in.

    Zeros become holes. An image with internal snapshots, bitmaps or compressed clusters keeps them:
    then only clusters that nothing uses any more become holes. Raises `ImageError` for other
    formats than raw and qcow2.
    """
    chain = open_chain(path, format=format, backing_dirs=backing_dirs)
    if format is None:
        require_known_content(chain, or_blank=True)
    active = chain.active
    if active.format not in ("raw", "qcow2"):
        raise ImageError(
            "only raw and qcow2 images can be made smaller",
            subject=printable(path),
            hint="imgtool convert makes a qcow2 image of it",
        )
    refuse_encrypted(chain)
    refuse_second_file(active)
    refuse_to_replace(chain, force=force)
    if len(chain.links) > 1:
        refuse_to_guess(chain)
    keeps = active.format == "qcow2" and _has_more_than_content(chain)
    options = options_like(active)
    copy = active.actual_size if keeps else size_of_copy(chain, options, active.format)
    space = min(copy, active.actual_size) + (1 << 20)
    refuse_if_too_little_space(path.resolve().parent, space, force=force)
    temporary = temporary_path(path)
    base = None if keeps else _same_base(chain)
    lines = (
        f"copy what is in use of {printable(path)} into a new file (up to {space} bytes)"
        + (f", its {len(active.snapshots)} snapshots with it" if active.snapshots else ""),
        "prove that it has the same content",
        f"put it in the place of {printable(path)}",
    )

    def after(holdings: Holdings) -> Holdings:
        return holdings if base is None else holdings.on(*base)

    def do(work: Work) -> None:
        with block_writers(chain), steady(chain) as seen:
            work.reserve(temporary)
            if keeps:
                _copy_used(work, chain, temporary)
            elif active.format == "raw":
                words: list[str | Path] = ["convert", "-O", "raw", seen.filename(), temporary]
                work.qemu_img("compact", words, path, made=temporary)
                with (
                    chain.open_file(active.path) as old,
                    made_file(temporary, write=True) as descriptor,
                ):
                    # QEMU makes whole sectors of it.
                    os.ftruncate(descriptor, os.fstat(old.fileno()).st_size)
            else:
                named = ("-B", base[0], "-F", base[1]) if base else ()
                convert(work, "compact", seen, temporary, options, *named)
            new = replace(seen, links=(probe(temporary, format=active.format), *chain.links[1:]))
            what = "the new file does not have the same content"
            work.prove_same(seen.filename(), new.filename(), what, path)
            work.swap(temporary, active)

    return Plan(
        "compact",
        path.absolute(),
        lines,
        do,
        active.format,
        space=space,
        facts={"temporary": str(temporary)},
        seen=Seen.of(*chain.files),
        after=after,
    )


def _has_more_than_content(chain: Chain) -> bool:
    """Whether a copy of what a guest sees would lack something, or take more space."""
    active = chain.active
    held = holdings_of(active.path, active.format)
    more = held is not None and held.more_than_content
    return more or check_metadata(active).compressed > 0


def _same_base(chain: Chain) -> tuple[str, str] | None:
    """The backing file that the image has, by the name it has, and its format."""
    if len(chain.links) < 2:
        return None
    below, real = chain.links[1], chain.active.path.resolve()
    name = str(chain.active.backing)
    with contextlib.suppress(OSError):
        if (real.parent / name.removeprefix("file:")).samefile(below.path):
            return name, below.format
    return backing_name(below.path, real), below.format


def _copy_used(work: Work, chain: Chain, temporary: Path) -> None:
    """Copy the clusters that are in use to where they were, and prove that they arrived."""
    path = chain.active.path
    with (
        chain.open_file(path) as old,
        made_file(temporary, write=True) as descriptor,
        os.fdopen(os.dup(descriptor), "r+b") as new,
    ):
        header = qcow2.read_header(old)
        if header is None:
            raise ImageError("its header cannot be read", subject=printable(path))
        with work.step("compact") as on_part, _full_disk_told(temporary):
            _copy(old, new, header, on_part)
            os.fsync(new.fileno())
        with work.step("proof") as on_part:
            same = _same(old, new, header, on_part)
    if not same or not check_metadata(probe(temporary, format="qcow2")).sound:
        raise ImgtoolError("the proof failed: the copy differs", subject=printable(path))


@contextlib.contextmanager
def _full_disk_told(path: Path) -> Iterator[None]:
    """What the host's file system says to a write, as an error with what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in NO_ROOM
        raise host_file_error(
            "it cannot be written",
            error,
            subject=printable(path.parent),
            hint="make room on that file system, then repeat the command" if full else None,
        ) from error


def _pieces(
    file: BinaryIO, header: qcow2.Qcow2Header, on_part: OnPart | None
) -> Iterator[tuple[int, int]]:
    """The parts of the file that are in use, none larger than is read at a time."""
    end = os.fstat(file.fileno()).st_size
    for start, length in used_ranges(file, header):
        for at in range(start, start + length, _PIECE):
            if on_part is not None:
                on_part(at / end)
            yield at, min(_PIECE, start + length - at)
    if on_part is not None:
        on_part(1.0)


def _copy(old: BinaryIO, new: BinaryIO, header: qcow2.Qcow2Header, on_part: OnPart | None) -> None:
    for at, length in _pieces(old, header, on_part):
        content = os.pread(old.fileno(), length, at)
        if at + length > os.fstat(new.fileno()).st_size:
            os.truncate(new.fileno(), at + length)
        for start in range(0, len(content), _BLOCK):
            block = content[start : start + _BLOCK]
            # Zeros are in use as well, and need not take space.
            if block.strip(b"\0"):
                os.pwrite(new.fileno(), block, at + start)


def _same(old: BinaryIO, new: BinaryIO, header: qcow2.Qcow2Header, on_part: OnPart | None) -> bool:
    return all(
        os.pread(old.fileno(), length, at) == os.pread(new.fileno(), length, at)
        for at, length in _pieces(old, header, on_part)
    )
