"""What is wrong with a chain, as far as it can be followed: what it means and what to do.

`open_chain` stops at the first thing that makes a chain unreadable. This goes on to the next link,
and looks as well for what reads without an error and is wrong all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgtool.errors import ImageError, ImgtoolError, RefusedError
from imgtool.image import headers
from imgtool.image.chain import MAX_LINKS
from imgtool.image.dependants import overlays_on
from imgtool.image.host_file import file_node, node_driver
from imgtool.image.info import ImageInfo, probe
from imgtool.image.locks import in_use_for_writing
from imgtool.image.places import Places, printable
from imgtool.process import Limits, run

Severity = Literal["risk", "warning", "note"]

# Some say that an image is unsound, some that it is not, and some that it has no such check.
_SOUND, _ERRORS, _LEAKS, _NO_CHECK = 0, 2, 3, 63
_CHECK_LIMITS = Limits(memory=4 << 30)
_WITH_CHECK = ("qcow2", "qed", "vdi", "vhdx", "vmdk")


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


@dataclass(frozen=True)
class CheckResult:
    """What `qemu-img check` counted: unsound entries, and clusters that nothing uses."""

    corruptions: int
    leaks: int
    errors: int

    @property
    def sound(self) -> bool:
        """Whether nothing but lost space was found."""
        return not self.corruptions and not self.errors


def check_metadata(
    link: ImageInfo, *, repair: Literal["leaks", "all"] | None = None
) -> CheckResult:
    """The image's own tables, checked by QEMU (`qemu-img check`); its base is not needed.

    Raises `ImageError` where QEMU cannot do it, `UnsupportedCheck` for a format without a check.
    """
    node: dict[str, object] = {"driver": link.format, "file": file_node(link.path, link.driver)}
    if link.data_path is not None:
        node["data-file"] = file_node(link.data_path, node_driver(link.data_path))
    if link.format in ("qcow2", "qed", "vmdk"):
        node["backing"] = None
    argv = ["qemu-img", "check", "--output=json"]
    argv += ["-r", repair] if repair else ["-U"]
    done = run(
        [*argv, "json:" + json.dumps(node)],
        limits=_CHECK_LIMITS,
        ok=(_SOUND, 1, _ERRORS, _LEAKS, _NO_CHECK),
    )
    if done.returncode == _NO_CHECK:
        raise UnsupportedCheck(f"{link.format} has no check", subject=printable(link.path))
    if not done.stdout.strip():
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise ImageError(printable(said[-1].removeprefix("qemu-img: ")), subject=link.path)
    answer = json.loads(done.stdout)
    return CheckResult(
        corruptions=answer.get("corruptions", 0),
        leaks=answer.get("leaks", 0),
        errors=answer.get("check-errors", 0),
    )


class UnsupportedCheck(ImageError):
    """The format has nothing that could be checked."""


def check_chain(
    path: str | Path,
    *,
    format: str | None = None,
    backing_dirs: Sequence[str | Path] = (),
    metadata: bool = True,
    done: set[tuple[int, int]] | None = None,
    on_link: Callable[[Path], None] | None = None,
) -> tuple[Finding, ...]:
    """What there is to say of the chain that starts at `path`; nothing if all is well.

    `metadata` has QEMU check the tables of every link, which reads all of them. Links in `done`
    (device and inode) are passed over, and those that were looked at added, so that chains with a
    base in common look at it once. Nothing is raised for what is wrong with an image.
    """
    path = Path(path).absolute()
    places = Places.around(path, backing_dirs)
    done = set() if done is None else done
    findings: list[Finding] = []
    seen: set[tuple[int, int]] = set()
    above: ImageInfo | None = None
    while len(seen) <= MAX_LINKS:
        try:
            link = probe(path, format=format, places=places)
            identity = _identity(path)
        except ImgtoolError as error:
            findings.append(_unreadable(error, path, above, format))
            break
        if identity in seen:
            findings.append(
                Finding(
                    path,
                    "risk",
                    "loop",
                    "the chain leads back into itself: no image of it can be read",
                    "find out which image stood on what, then 'qemu-img rebase -u' the wrong link",
                )
            )
            break
        seen.add(identity)
        if above is not None:
            findings += _between(above, link, format)
        if identity not in done:
            if on_link is not None:
                on_link(path)
            findings += _alone(link, metadata=metadata)
            findings += _stood_on(link, backing_dirs)
        elif _identity(path) in done and above is not None:
            break  # what is below has been looked at with it
        done.add(identity)
        if link.backing is None:
            break
        try:
            path, format = (
                places.follow(link.backing, of=link.path, role="backing file"),
                (link.backing_format),
            )
        except ImgtoolError as error:
            findings.append(_not_followed(error, link))
            break
        if not path.exists():
            findings.append(
                Finding(
                    link.path,
                    "risk",
                    "missing-backing-file",
                    f"its backing file {printable(link.backing)} is not at {printable(path)}:"
                    " all that was not written since the overlay was made is out of reach",
                    "put the file back; if it was moved, 'imgtool overlay rebase --unsafe' tells"
                    " the overlay where it is now",
                )
            )
            break
        above = link
    return tuple(findings)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _unreadable(
    error: ImgtoolError, path: Path, above: ImageInfo | None, format: str | None
) -> Finding:
    if above is not None and format is not None and isinstance(error, ImageError):
        return Finding(
            above.path,
            "risk",
            "wrong-backing-format",
            f"it takes its backing file {printable(path)} as {format}, which cannot be:"
            f" {error.message}",
            "find out what the file is ('imgtool info'), then write its format into the overlay:"
            " 'imgtool overlay rebase --unsafe'",
        )
    return Finding(
        path,
        "risk",
        "unreadable",
        f"it cannot be read: {error.message}",
        error.hint or "restore it from a backup, or save what is left with 'qemu-img convert'",
    )


def _not_followed(error: ImgtoolError, link: ImageInfo) -> Finding:
    outside = isinstance(error, RefusedError)
    return Finding(
        link.path,
        "risk",
        "outside" if outside else "bad-backing-name",
        error.message,
        error.hint or "'imgtool overlay rebase --unsafe' writes another name",
    )


def _between(above: ImageInfo, below: ImageInfo, format: str | None) -> Iterator[Finding]:
    """What is odd about an overlay and its base, given the format that the overlay names."""
    name = printable(below.path)
    if format is None:
        yield Finding(
            above.path,
            "warning" if below.format != "raw" else "risk",
            "no-backing-format",
            f"it does not say which format {name} has; QEMU guesses {below.format} from what is in"
            " it, which a guest with a raw disk can forge",
            f"write it down: imgtool overlay rebase --unsafe --base-format {below.format}"
            f" {printable(above.path)} {name}",
        )
    elif format == "raw":
        content = headers.read(below.path)
        if content is not None and content.format is not None:
            yield Finding(
                above.path,
                "risk",
                "wrong-backing-format",
                f"it takes {name} as raw, but that holds a {content.format} header: the guest sees"
                " the container instead of its disk, or its guest wrote that header",
                "if it is the former, write the right format into the overlay: imgtool overlay"
                f" rebase --unsafe --base-format {content.format} {printable(above.path)} {name}",
            )
    if above.virtual_size < below.virtual_size:
        yield Finding(
            above.path,
            "warning",
            "smaller-than-base",
            f"it has {above.virtual_size} bytes, its base {below.virtual_size}: what lies beyond is"
            " hidden from the guest",
            "if that was not meant: imgtool resize",
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
    if below.path.stat().st_mtime_ns > above.path.stat().st_mtime_ns:
        yield Finding(
            above.path,
            "risk",
            "base-newer",
            f"its base {name} was written after it: if that was more than a copy of the file, the"
            " overlay no longer fits",
            "look whether its filesystems are sound before anything is written; if the base was"
            f" only copied or touched: touch {printable(above.path)}",
        )


def _alone(link: ImageInfo, *, metadata: bool) -> Iterator[Finding]:
    """What is odd about one image by itself."""
    if link.corrupt:
        yield Finding(
            link.path,
            "risk",
            "corrupt",
            "QEMU found its tables damaged and marked it; it is opened for reading only",
            "copy what is left with 'imgtool convert', or 'imgtool check --repair all' on a copy",
        )
    writer = in_use_for_writing(link.path)
    if writer is not None and writer != "unknown":
        yield Finding(
            link.path,
            "note",
            "in-use",
            f"it is being written by {writer}: what is in it changes while it is looked at",
            "look again when the guest is shut down",
        )
        return
    if link.dirty:
        yield Finding(
            link.path,
            "warning",
            "dirty",
            "it was not closed properly: its QEMU was killed, or the host went down",
            "QEMU mends its tables when it opens it next, or: imgtool check --repair all",
        )
    if metadata and link.format in _WITH_CHECK:
        yield from _metadata(link)


def _metadata(link: ImageInfo) -> Iterator[Finding]:
    try:
        result = check_metadata(link)
    except UnsupportedCheck:
        return
    except ImgtoolError as error:
        yield Finding(
            link.path,
            "risk",
            "unreadable",
            f"its tables cannot be checked: {error.message}",
            "restore it from a backup",
        )
        return
    if not result.sound:
        yield Finding(
            link.path,
            "risk",
            "damaged-tables",
            f"{result.corruptions} entries of its tables are wrong, {result.errors} could not be"
            " checked: parts of the disk read as other parts, or not at all",
            "copy the file, then 'imgtool check --repair all' on the copy and look at the guest",
        )
    elif result.leaks and not link.dirty:
        yield Finding(
            link.path,
            "note",
            "leaks",
            f"{result.leaks} clusters are marked as used and are not: lost space, no lost data",
            "imgtool check --repair leaks",
        )


def _stood_on(link: ImageInfo, backing_dirs: Sequence[str | Path]) -> Iterator[Finding]:
    overlays = overlays_on(link.path, backing_dirs)
    if len(overlays) > 1:
        names = ", ".join(printable(overlay.name) for overlay in overlays[:5])
        yield Finding(
            link.path,
            "note",
            "base-of-several",
            f"{len(overlays)} overlays stand on it ({names}{', ...' if len(overlays) > 5 else ''}):"
            " to commit one of them would ruin the others",
            "keep it read-only; 'imgtool overlay flatten' makes an overlay stand alone",
        )
