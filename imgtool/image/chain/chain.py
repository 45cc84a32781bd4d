"""A chain: the active image and what it stands on, followed link by link by imgtool itself.

QEMU would follow a chain by guessing formats and opening whatever a header names. Here every link
is looked at alone, the next one only after its place was checked, and QEMU is then given the whole
chain with a driver written at every level, so that nothing is left for it to guess or to open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import (
    ImageError,
    ImagePermissionError,
    NotInGuestError,
    RefusedError,
    join_names,
)
from imgtool.host import program_messages
from imgtool.host.process import ProgramFailed, TimedOut, run
from imgtool.image.chain.info import ImageInfo, Snapshot, probe
from imgtool.image.chain.qemu_info import PROBE_LIMITS, ask_qemu
from imgtool.image.intent.intent_state import refuse_other_format, unfinished_commit
from imgtool.image.locking.host_file import file_node, node_driver, open_host_file
from imgtool.image.policy import AllowedDirs
from imgtool.text import printable, typed

MAX_LINKS = 200
# What QEMU takes to open a chain grows with the square of its length and more: seconds for 200.
_OPENED_AS_ONE = 64

# The formats that can name a backing file: for these QEMU must be told that there is none.
_WITH_BACKING = ("qcow2", "qcow", "qed", "vmdk")


@dataclass(frozen=True)
class Chain:
    """The links of a chain, active image first, base last; `problems` are lines for the user.

    `header` is an overlay on the active image's file with another header for it, as it was at a
    snapshot (`imgtool.image.chain.snapshot_view`); `names` are those of files that QEMU is not to
    open by their own (`imgtool.image.chain.steady`). `lost` are the parts of the disk, in bytes
    from start to end, that are not there, and for which QEMU reads zeros.
    """

    links: tuple[ImageInfo, ...]
    problems: tuple[str, ...] = field(default=())
    header: Path | None = None
    names: Mapping[Path, str] = field(default_factory=dict, compare=False)
    lost: tuple[tuple[int, int], ...] = ()

    @property
    def active(self) -> ImageInfo:
        """The image that was asked for."""
        return self.links[0]

    @property
    def base(self) -> ImageInfo:
        """The image that stands on no other; the active one itself if there is no overlay."""
        return self.links[-1]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the chain, those of the active image first."""
        return tuple(path for link in self.links for path in link.files)

    def open_file(self, path: Path) -> BinaryIO:
        """Open one of the chain's files for reading: the very one that was looked at."""
        noted = {name: identity for link in self.links for name, identity in link.inodes}
        return open_host_file(path, noted=noted.get(path))

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each base that was found elsewhere than where it should be."""
        return tuple(link.found for link in self.links if link.found is not None)

    @property
    def safe_by_name(self) -> bool:
        """Whether QEMU, told only the name and format of the active image, opens these very files
        in these very formats.

        If not, because a header names no format for a backing file (QEMU would guess again), a
        data file without its folder (QEMU takes it from the current one), or a backing file that
        was found elsewhere, give it `filename()`.
        """
        return (
            self.header is None
            and not self.names
            and self.misleading_base is None
            and all(
                (link.backing is None or link.backing_format is not None)
                and (link.data_file is None or link.data_file.startswith("/"))
                for link in self.links
            )
        )

    @property
    def misleading_base(self) -> tuple[ImageInfo, ImageInfo] | None:
        """The first link, and what it stands on, whose name for that leads elsewhere when QEMU
        follows the names from the active image's own place; None if there is none."""
        path = self.active.path.resolve()
        for link, below in pairwise(self.links):
            # QEMU does not look where links lead.
            path = path.parent / str(link.backing).removeprefix("file:")
            try:
                same = path.samefile(below.path)
            except (OSError, ValueError):
                same = False
            if not same:
                return link, below
        return None

    def snapshot(self, name: str) -> Snapshot:
        """The internal snapshot of the active image with this name, or else with this id.

        Raises `NotInGuestError`, listing those that there are.
        """
        there = self.active.snapshots
        for known in ([s for s in there if s.name == name], [s for s in there if s.id == name]):
            if known:
                return known[0]
        names = join_names(printable(snapshot.name) for snapshot in there)
        raise NotInGuestError(
            f"no internal snapshot '{printable(name)}'",
            subject=printable(self.active.path),
            hint=f"it has: {names}" if there else "it has no internal snapshots",
        )

    def blockdev(
        self,
        *,
        read_only: bool = True,
        force_share: bool = False,
        names: Mapping[Path, str] | None = None,
    ) -> dict[str, object]:
        """The chain as QEMU's `-blockdev` takes it: a driver and absolute names at every level.

        `force_share` reads past the locks of a running QEMU and is for readers only. `names` are
        other names of the chain's files, for a QEMU that sees them elsewhere.
        """

        def file(path: Path, driver: str) -> dict[str, object]:
            return file_node(path, driver, names[path] if names else self.names.get(path))

        node: dict[str, object] | None = None
        for number, link in reversed([*enumerate(self.links)]):
            above: dict[str, object] = {"driver": link.format, "file": file(link.path, link.driver)}
            if self.header is not None and not number:
                below = {"driver": "raw", "file": above["file"]}
                over = {"driver": "qcow2", "file": file(self.header, "file"), "backing": below}
                above["file"] = over
            if link.data_path is not None:
                above["data-file"] = file(link.data_path, node_driver(link.data_path))
            if link.format in _WITH_BACKING:
                above["backing"] = node
            node = above
        if node is None:
            raise ValueError("a chain has at least one link")
        if read_only:
            node["read-only"] = True
        if force_share:
            node["force-share"] = True
        return node

    def filename(
        self,
        *,
        read_only: bool = True,
        force_share: bool = False,
        names: Mapping[Path, str] | None = None,
    ) -> str:
        """`blockdev()` as a file name that qemu-img, qemu-nbd and qemu-io take."""
        node = self.blockdev(read_only=read_only, force_share=force_share, names=names)
        return "json:" + json.dumps(node, ensure_ascii=False)


def _next_path(link: ImageInfo, places: AllowedDirs) -> tuple[Path, str | None]:
    path, note = places.find_base(str(link.backing), of=link.path)
    named = f"its backing file '{printable(str(link.backing))}'"
    try:
        path.stat()
    except PermissionError as error:
        raise ImagePermissionError(
            f"{named} cannot be looked at: permission denied",
            subject=printable(link.path),
            hint="run imgtool as a user who may read it",
        ) from error
    except OSError as error:
        raise ImageError(
            f"{named} is missing",
            subject=printable(link.path),
            hint=f"it should be at {printable(path)}; where it is elsewhere: --backing-dir FOLDER",
        ) from error
    return path, note


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:  # gone since it was opened
        raise ImageError("it has vanished", subject=printable(path)) from error
    return status.st_dev, status.st_ino


def follow_chain(
    path: str | Path,
    *,
    format: str | None = None,
    backing_dirs: Sequence[str | Path] = (),
    partial: bool = False,
) -> Iterator[tuple[ImageInfo, tuple[str, ...]]]:
    """The links of the chain that starts at `path`, each with its problems, as far as they can be
    followed: the errors are those of `open_chain`, raised where the next link would come."""
    path = Path(path).absolute()
    places = AllowedDirs.around(path, backing_dirs)
    if (overlay := unfinished_commit(path)) is not None:
        # The image holds a part of what the overlay has all of, until the commit is finished.
        refuse_other_format(path, overlay, format)
        path, format = overlay.absolute(), "qcow2"
    link = probe(path, format=format, places=places, by_header=True, partial=partial)
    if link.probed and link.format != "raw" and link.backing and path.suffix == ".raw":
        # A guest can write any header to its raw disk; the name says which of the two to believe.
        raise RefusedError(
            f"it is named .raw, but holds a {link.format} header with a backing file",
            subject=printable(path),
            hint=f"say which it is: --format raw or --format {link.format}",
        )
    yield link, link.problems
    seen = {_identity(path)}
    while link.backing is not None:
        if len(seen) == MAX_LINKS:
            raise RefusedError(
                f"a chain of more than {MAX_LINKS} links",
                subject=printable(path),
                hint=f"make it shorter: imgtool overlay flatten {typed(link.path)}",
            )
        below, note = _next_path(link, places)
        if _identity(below) in seen:
            raise ImageError(
                f"its backing file '{printable(link.backing)}' leads back into the chain: a loop",
                subject=printable(link.path),
            )
        seen.add(_identity(below))
        above, link = (
            link,
            probe(below, format=link.backing_format, places=places, by_header=True, below=True),
        )
        if note is not None:
            link = replace(link, found=note, problems=(note, *link.problems))
        problems = link.problems
        if link.probed and link.format != "raw":
            guessed = (
                f"{printable(above.path)} names no format for its backing file;"
                f" it was taken as {link.format} from its content"
            )
            problems = (guessed, *problems)
        yield link, problems


def open_chain(
    path: str | Path,
    *,
    format: str | None = None,
    backing_dirs: Sequence[str | Path] = (),
    partial: bool = False,
) -> Chain:
    """Follow the chain that starts at `path`, the active image, which has `format` if given.

    With `partial` an image that was cut off is opened too, for who minds what is `lost` of it.

    Raises `ImageError` for a link that is missing, damaged or met twice, and `RefusedError` for
    one that is outside the folders a chain may use (`AllowedDirs.around`) or not a local file.
    """
    links: list[ImageInfo] = []
    problems: list[str] = []
    for link, lines in follow_chain(
        path, format=format, backing_dirs=backing_dirs, partial=partial
    ):
        links.append(link)
        problems += lines
    chain = Chain(tuple(links), tuple(problems))
    if partial and chain.active.is_truncated:
        from imgtool.image.chain.lost import lost_ranges

        chain = replace(chain, lost=lost_ranges(chain.active))
    _have_qemu_open(chain)
    return chain


def _have_qemu_open(chain: Chain) -> None:
    """Raise `ImageError` where QEMU cannot open a link of which only the header was read."""
    if not any(link.by_header for link in chain.links):
        return
    if len(chain.links) > _OPENED_AS_ONE:
        _have_each_opened(chain)
        return
    try:
        run(["qemu-io", "-r", "-U", "-c", "length", chain.filename()], limits=PROBE_LIMITS)
    except ProgramFailed as error:
        _have_each_opened(chain)  # it does not say which link it means
        told = program_messages.by_qemu(error.stderr, typed(chain.active.path))
        raise ImageError(
            told.means, subject=printable(chain.active.path), hint=told.step
        ) from error
    except TimedOut:
        _have_each_opened(chain)
        raise


def _have_each_opened(chain: Chain) -> None:
    for link in chain.links:
        if link.by_header:
            ask_qemu(link.path, str(link.path), link.format)
