"""What can be wrong with the links of a chain, in words: what it means and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgtool.errors import ImgtoolError, RefusedError, join_names
from imgtool.formats.protocols import protocol_of
from imgtool.image import headers
from imgtool.image.chain.info import FORMATS, ImageInfo
from imgtool.image.checks.ages import newer_bases
from imgtool.image.locking.locks import Holder, holders, in_use_for_writing
from imgtool.text import printable, typed

Severity = Literal["risk", "warning", "note"]

_ANOTHER_COPY = "look for another copy of it; nothing that imgtool has makes it readable"


def salvage(link: ImageInfo) -> str:
    """The command that copies what can be read of an image, with zeros for what cannot be."""
    return f"qemu-img convert --salvage -f {link.format} -O raw {typed(link.path)} NEW"


@dataclass(frozen=True)
class Finding:
    """One thing about one image: `what` it is in words for scripts, what it `means`, what to `do`.

    `severity` is `risk` where data is lost or may be, `warning` where it will be if one does the
    obvious next thing, `note` for what is worth knowing.
    """

    path: Path
    severity: Severity
    what: str
    means: str
    do: str


def _rebase(overlay: Path, base: Path, format: str) -> str:
    words = f"--base-format {format} {typed(overlay)} {typed(base)}"
    return f"imgtool overlay rebase --unsafe {words}"


def unreadable(
    error: ImgtoolError, path: Path, above: ImageInfo | None, format: str | None
) -> Finding:
    """An image that cannot be opened; `above` takes it as `format`."""
    if above is not None and format is not None and not isinstance(error, RefusedError):
        name = printable(path)
        if format not in FORMATS:
            return Finding(
                above.path,
                "risk",
                "unknown-backing-format",
                f"it names the format '{printable(format)}' for its base {name}; no such format is"
                " supported",
                f"find out what the file is: imgtool info {typed(path)}; then write that into the"
                f" overlay: {_rebase(above.path, path, 'FORMAT')}",
            )
        try:
            content = headers.read(path)
        except OSError:
            content = None
        if content is not None and headers.contradicts(content, format):
            is_what = content.format or "raw"
            return Finding(
                above.path,
                "risk",
                "wrong-backing-format",
                f"it takes its base {name} as {format}, but that is {is_what}: the chain cannot be"
                " read",
                f"write the right format into the overlay: {_rebase(above.path, path, is_what)}",
            )
    return Finding(
        path,
        "risk",
        "unreadable",
        f"it cannot be read: {error.message}",
        error.hint or _ANOTHER_COPY,
    )


def not_followed(error: ImgtoolError, link: ImageInfo) -> Finding:
    """A backing file whose name leads where a chain may not go, or nowhere."""
    rename = "'imgtool overlay rebase --unsafe' writes another name, if the data is elsewhere now"
    if not isinstance(error, RefusedError):
        return Finding(link.path, "risk", "bad-backing-name", error.message, error.hint or rename)
    local = protocol_of(link.backing or "") in (None, "file")
    return Finding(
        link.path,
        "warning",
        "outside" if local else "not-local",
        f"{error.message}: what is below was not looked at",
        error.hint or rename,
    )


def missing(link: ImageInfo, path: Path) -> Finding:
    """A backing file that is not there."""
    return Finding(
        link.path,
        "risk",
        "missing-backing-file",
        f"its backing file {printable(str(link.backing))} is not at {printable(path)}: all that"
        " was not written since the overlay was made is out of reach",
        "put the file back; if it was moved, tell the overlay where it is now: imgtool overlay"
        f" rebase --unsafe {typed(link.path)} NEWBASE",
    )


def found_by_name(link: ImageInfo, path: Path) -> Finding:
    """A backing file that is not at its place, and was taken from a folder that was given."""
    return Finding(
        link.path,
        "note",
        "base-found-by-name",
        f"its backing file {printable(str(link.backing))} is not there: {printable(path)} is used,"
        " by its name",
        "if it is the right one, write its name into the overlay: imgtool overlay rebase --unsafe"
        f" --base-format {link.backing_format or 'FORMAT'} {typed(link.path)} {typed(path)}",
    )


def loop(path: Path) -> Finding:
    """An image that was met before on the way down."""
    return Finding(
        path,
        "risk",
        "loop",
        "the chain leads back into itself: no image of it can be read",
        "find out which image stood on what, then write that into the wrong link: qemu-img rebase"
        " -u -F FORMAT -b BASE LINK",
    )


def too_long(path: Path, most: int, last: Path) -> Finding:
    """A chain with more links than imgtool follows; `last` is the last one that it does."""
    return Finding(
        path,
        "risk",
        "too-long",
        f"the chain that it is in has more than {most} links: imgtool does not open it, and QEMU"
        " gets slow",
        f"make it shorter: imgtool overlay flatten {typed(last)}",
    )


def pair_findings(above: ImageInfo, below: ImageInfo, format: str | None) -> Iterator[Finding]:
    """What is odd about an overlay and its base, given the format that the overlay names."""
    name = printable(below.path)
    if format is None:
        # A guest can write any header to its raw disk: then the name tells the truth.
        forged = below.format != "raw" and below.path.suffix.lower() == ".raw"
        yield Finding(
            above.path,
            "risk" if forged else "warning",
            "no-backing-format",
            f"it does not say which format {name} has; QEMU guesses {below.format} from what is in"
            " it, which a guest with a raw disk can forge"
            + (", and the file is named .raw" if forged else ""),
            "find out which it is, then write it down:"
            f" {_rebase(above.path, below.path, 'raw')}, or the same with {below.format}"
            if forged
            else f"write it down: {_rebase(above.path, below.path, below.format)}",
        )
    elif format == "raw":
        yield from _taken_as_raw(above, below)
    if above.virtual_size < below.virtual_size:
        yield Finding(
            above.path,
            "warning",
            "smaller-than-base",
            f"it has {above.virtual_size} bytes, its base {below.virtual_size}: what lies beyond is"
            " hidden from the guest",
            f"if that was not meant: imgtool resize {typed(above.path)} {below.virtual_size}",
        )
    elif above.virtual_size > below.virtual_size:
        yield Finding(
            above.path,
            "note",
            "larger-than-base",
            f"it has {above.virtual_size} bytes, its base {below.virtual_size}: to commit it makes"
            " the base grow",
            "nothing, if it was made to be larger",
        )
    if any(newer_bases((above, below))):
        yield Finding(
            above.path,
            "risk",
            "base-newer",
            f"its base {name} was changed after it: if that was more than a copy of the file, the"
            " overlay no longer fits",
            "look whether its filesystems are sound before anything is written; if the base was"
            f" only copied or touched: touch -r {typed(below.path)} {typed(above.path)}",
        )


def _taken_as_raw(above: ImageInfo, below: ImageInfo) -> Iterator[Finding]:
    try:
        content = headers.read(below.path)
    except OSError:
        return
    if content is not None and content.format and headers.contradicts(content, "raw"):
        yield Finding(
            above.path,
            "risk",
            "wrong-backing-format",
            f"it takes {printable(below.path)} as raw, but that holds a {content.format} header:"
            " the guest sees the container instead of its disk, or its guest wrote that header",
            "if it is the former, write the right format into the overlay: "
            + _rebase(above.path, below.path, content.format),
        )


def header_findings(link: ImageInfo) -> Iterator[Finding]:
    """What an image's header says of its state, and of what is not seen of its disk."""
    if link.unseen is not None:
        yield Finding(link.path, "risk", link.unseen.what, link.unseen.means, link.unseen.do)
    if link.corrupt:
        yield Finding(
            link.path,
            "risk",
            "corrupt",
            "QEMU found its tables damaged and marked it; it is opened for reading only",
            f"mend a copy of it: cp {typed(link.path)} COPY, then imgtool check --repair all COPY",
        )


def interrupted_work(path: Path, operation: str) -> Finding:
    """Work of imgtool's own on an image that was cut off, or is under way."""
    half = operation in ("commit", "write")
    return Finding(
        path,
        "risk" if half else "warning",
        "interrupted",
        f"a {printable(operation)} of it was interrupted, or is under way"
        + (": it holds a part of what was to be written to it" if half else ""),
        f"imgtool recover {typed(path)}",
    )


def dirty(link: ImageInfo) -> Finding:
    """An image that nobody has open and nobody closed."""
    return Finding(
        link.path,
        "warning",
        "dirty",
        "it was not closed properly: its QEMU was killed, or the host went down; its tables are"
        " not up to date",
        f"QEMU mends them when it opens it next, or: imgtool check --repair all {typed(link.path)}",
    )


def being_written(link: ImageInfo, above: ImageInfo | None, writer: Holder) -> Finding:
    """An image that is being written; `above` is the overlay on it that it was reached from."""
    if above is not None and not _same_process(above.path, writer):
        return Finding(
            link.path,
            "risk",
            "base-in-use",
            f"it is being written by {writer}, while {printable(above.path)} stands on it: that"
            " makes garbage of the overlay",
            writer.hint,
        )
    return Finding(
        link.path,
        "note",
        "in-use",
        f"it is being written by {writer}: what is in it changes while it is looked at, so its"
        " tables were not checked",
        "look again when the guest is shut down",
    )


def _same_process(path: Path, writer: Holder) -> bool:
    """Whether a base's writer has the overlay open too: a QEMU that commits."""
    try:
        return any(holder.pid == writer.pid for holder in holders(path))
    except OSError:
        return False


def several(path: Path, overlays: Sequence[Path]) -> Iterator[Finding]:
    """An image that more than one overlay stands on."""
    if len(overlays) > 1:
        names = join_names(printable(overlay.name) for overlay in overlays)
        yield Finding(
            path,
            "note",
            "base-of-several",
            f"{len(overlays)} overlays stand on it ({names}): to commit one of them would"
            " ruin the others",
            "keep it read-only; 'imgtool overlay flatten' makes an overlay stand alone",
        )


def writer_of(path: Path) -> Holder | None:
    """Who may write to the image, as far as that can be known."""
    try:
        found = in_use_for_writing(path)
    except OSError:
        return None
    return found if isinstance(found, Holder) else None
