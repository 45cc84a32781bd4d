"""What is wrong with a chain, as far as it can be followed.

`open_chain` stops at the first thing that makes a chain unreadable. This goes on to the next link,
and looks as well for what reads without an error and is wrong all the same.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgtool.errors import ImageError, ImgtoolError, RefusedError
from imgtool.host import program_messages
from imgtool.host.process import Limits, ProgramFailed, TimedOut, run
from imgtool.image.chain.chain import MAX_LINKS, Chain
from imgtool.image.chain.info import ImageInfo, probe
from imgtool.image.checks import findings
from imgtool.image.checks.dependants import Identity, Overlays
from imgtool.image.checks.findings import Finding, salvage
from imgtool.image.checks.recognise import require_known_content
from imgtool.image.headers import Header
from imgtool.image.intent.intent_log import operation_of, read_facts
from imgtool.image.locking.host_file import file_node, node_driver
from imgtool.image.policy import AllowedDirs
from imgtool.text import printable, typed

# Some say that an image is unsound, some that it is not, and some that it has no such check.
_SOUND, _ERRORS, _LEAKS, _NO_CHECK = 0, 2, 3, 63
_WITH_CHECK = ("qcow2", "qed", "vdi", "vhdx", "vmdk")

# A sound image is checked by reading tables that are a thousandth of it. A hostile one can name
# the same table a million times over.
CHECK_MEMORY = 4 << 30
_CHECK_SECONDS, _CHECK_BYTES_A_SECOND = 120, 20 << 20

# What an image can be the cause of; that QEMU is not installed is not among it.
_WRONG = (ImageError, RefusedError, ProgramFailed, TimedOut)


@dataclass(frozen=True)
class CheckResult:
    """What `qemu-img check` counted: unsound entries, and clusters that nothing uses; and how many
    clusters are compressed."""

    corruptions: int
    leaks: int
    errors: int
    compressed: int = 0

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
    node = check_node(link, file_node(link.path, link.driver))
    seconds = _CHECK_SECONDS + link.actual_size / _CHECK_BYTES_A_SECOND
    argv = ["qemu-img", "check", "--output=json"]
    argv += ["-r", repair] if repair else ["-U"]
    done = run(
        [*argv, "json:" + json.dumps(node)],
        # A repair is never stopped halfway.
        limits=Limits(memory=CHECK_MEMORY, wall=None if repair else seconds),
        ok=(_SOUND, 1, _ERRORS, _LEAKS, _NO_CHECK),
    )
    if done.returncode == _NO_CHECK:
        raise UnsupportedCheck(f"{link.format} has no check", subject=printable(link.path))
    if not done.stdout.strip():
        told = program_messages.by_qemu(done.stderr.decode(errors="replace"), typed(link.path))
        raise ImageError(told.means, subject=printable(link.path), hint=told.step)
    answer = json.loads(done.stdout)
    return CheckResult(
        corruptions=answer.get("corruptions", 0),
        leaks=answer.get("leaks", 0),
        errors=answer.get("check-errors", 0),
        compressed=answer.get("compressed-clusters", 0),
    )


def check_node(
    link: ImageInfo, file: dict[str, object], data: dict[str, object] | None = None
) -> dict[str, object]:
    """A description of one image for QEMU, without its base, by the nodes of its file and of its
    data file: without `data` the one that it names."""
    node: dict[str, object] = {"driver": link.format, "file": file}
    if link.data_path is not None:
        node["data-file"] = data or file_node(link.data_path, node_driver(link.data_path))
    if link.format in ("qcow2", "qed", "vmdk"):
        node["backing"] = None
    return node


class UnsupportedCheck(ImageError):
    """The format has nothing that could be checked."""


class ChainCheck:
    """Chains that are looked at together: each image once, however many overlays stand on it.

    `metadata` has QEMU check the tables of every image, which reads all of them. `on_link` is told
    of each image before it is looked at. Nothing is raised for what is wrong with an image;
    `HostError` where QEMU cannot be run.
    """

    def __init__(
        self,
        *,
        backing_dirs: Sequence[str | Path] = (),
        metadata: bool = True,
        on_link: Callable[[Path], None] | None = None,
    ) -> None:
        self._backing_dirs = backing_dirs
        self._metadata = metadata
        self._on_link = on_link
        self._overlays = Overlays(backing_dirs)
        self._probed: dict[tuple[Path, str | None], ImageInfo | ImgtoolError] = {}
        self.looked_at: set[Identity] = set()
        # Of how many images the tables were not looked at, by the reason.
        self.unchecked: Counter[str] = Counter()

    def know(self, header: Header) -> None:
        """Take note of an overlay that may be in another folder than its base."""
        self._overlays.add(header)

    def chain(self, path: str | Path, *, format: str | None = None) -> Iterator[Finding]:
        """What there is to say of the chain that starts at `path`; what was said of an image that
        stands in several chains is not said again."""
        path = Path(path).absolute()
        places = AllowedDirs.around(path, self._backing_dirs)
        above: ImageInfo | None = None
        seen: set[Identity] = set()
        while True:
            try:
                identity = _identity(path)
                if above is None and identity in self.looked_at:
                    return
                link = self._probe(path, format, places, below=above is not None)
            except _WRONG as error:
                if above is None:
                    with contextlib.suppress(ImageError):
                        self.looked_at.add(_identity(path))
                yield findings.unreadable(error, path, above, format)
                return
            if identity in seen:
                yield findings.loop(path)
                return
            if len(seen) == MAX_LINKS:
                yield findings.too_long(path, MAX_LINKS, path if above is None else above.path)
                return
            seen.add(identity)
            if above is not None:
                yield from findings.pair_findings(above, link, format)
            if identity in self.looked_at:
                return  # what is below has been looked at with it
            self.looked_at.add(identity)
            yield from self._alone(link, above)
            if link.backing is None:
                return
            try:
                path, note = places.find_base(link.backing, of=link.path)
            except _WRONG as error:
                yield findings.not_followed(error, link)
                return
            if not _is_there(path):
                yield findings.missing(link, path)
                return
            if note is not None:
                yield findings.found_by_name(link, path)
            above, format = link, link.backing_format

    def _probe(
        self, path: Path, format: str | None, places: AllowedDirs, *, below: bool
    ) -> ImageInfo:
        found = self._probed.get((path, format))
        if found is None:
            try:
                found = probe(path, format=format, places=places, by_header=True, below=below)
            except _WRONG as error:
                found = error
            self._probed[path, format] = found
        if isinstance(found, ImgtoolError):
            raise found
        return found

    def _alone(self, link: ImageInfo, above: ImageInfo | None) -> Iterator[Finding]:
        """What is odd about one image by itself."""
        if self._on_link is not None:
            self._on_link(link.path)
        if (operation := operation_of(read_facts(link.path))) is not None:
            yield findings.interrupted_work(link.path, operation)
        yield from findings.header_findings(link)
        writer = findings.writer_of(link.path)
        if writer is not None:
            self.unchecked["in use"] += 1
            yield findings.being_written(link, above, writer)
        else:
            if link.dirty:
                yield findings.dirty(link)
            if self._metadata and link.format in _WITH_CHECK:
                yield from _tables(link)
            elif self._metadata:
                self.unchecked[f"{link.format}, which has no check"] += 1
                if above is None:
                    yield from _content(link)
        with contextlib.suppress(OSError):  # gone since it was opened
            yield from findings.several(link.path, self._overlays.on(link.path))


def _identity(path: Path) -> Identity:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ImageError((reason or "not a path").lower(), subject=printable(path)) from error
    return status.st_dev, status.st_ino


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError:
        return True  # what cannot be said of it is said where it is opened
    except OSError:
        return False
    return True


def _content(link: ImageInfo) -> Iterator[Finding]:
    """Whether a raw image can be a disk at all, by what is known of its content."""
    if link.format != "raw":
        return
    try:
        require_known_content(Chain((link,)), or_blank=True)
    except ImageError as error:
        yield Finding(
            link.path,
            "warning",
            "not-a-disk",
            error.message,
            "nothing, if it is no disk image, or one of which the guest uses all as it likes",
        )


def _tables(link: ImageInfo) -> Iterator[Finding]:
    try:
        result = check_metadata(link)
    except UnsupportedCheck:
        return
    except _WRONG as error:
        yield Finding(
            link.path,
            "risk",
            "unreadable",
            f"its tables cannot be checked: {error.message}",
            f"what can be read goes into a new image: {salvage(link)}",
        )
        return
    if link.dirty:
        return  # its tables lag behind what is in it: that is what dirty means
    if not result.sound:
        yield Finding(
            link.path,
            "risk",
            "damaged-tables",
            f"{result.corruptions} entries of its tables are wrong, {result.errors} could not be"
            " checked: parts of the disk read as other parts, or not at all",
            f"try to mend a copy: cp {typed(link.path)} COPY, then imgtool check --repair all COPY;"
            f" or copy what can be read: {salvage(link)}",
        )
    elif result.leaks:
        yield Finding(
            link.path,
            "note",
            "leaks",
            f"{result.leaks} clusters are marked as used and are not: lost space, no lost data",
            f"imgtool check --repair leaks {typed(link.path)}",
        )
