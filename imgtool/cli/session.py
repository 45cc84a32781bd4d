"""What every command shares: opening the guest from the options, and reporting what went wrong."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from imgtool.cli import differences, render
from imgtool.errors import ExitStatus, Force, ImgtoolError, NotReadDirectly
from imgtool.guest.guest_options import GuestKeywords, GuestOptions
from imgtool.host import interrupt

if TYPE_CHECKING:
    from imgtool.guest.guest import Guest
    from imgtool.guest.writable import WritableGuest
    from imgtool.image.chain.chain import Chain

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class _PlainFormatter(logging.Formatter):
    """What is logged may hold names from a guest: nothing in it steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(render.plain, super().format(record).split("\n")))


def set_up_logging(*, verbose: bool, debug: bool) -> None:
    """`-v` shows what the library says of its steps, `--debug` everything."""
    _warned.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("imgtool: %(message)s"))
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO if verbose else logging.ERROR,
        handlers=[handler],
    )


_warned: set[str] = set()


def warning(line: str) -> None:
    """A line for the user that does not change the exit status; said once in a command."""
    if line not in _warned:
        _warned.add(line)
        render.message("warning", line)


@dataclass
class Failures:
    """What failed in a command that goes on: the exit status is the first failure's own.

    Different failures in one command are status 1, done in part.
    """

    debug: bool = False
    statuses: list[ExitStatus] = field(default_factory=list)

    def add(self, error: ImgtoolError) -> None:
        """Say what failed and remember it."""
        self.statuses.append(error.status)
        if interrupt.pending():
            return  # the error is only what the interruption looked like
        render.message("error", str(error))
        if error.hint:
            render.hint(error.hint)
        if self.debug:
            traceback.print_exception(error)

    def problem(self, path: bytes, line: str) -> None:
        """A path of the guest that could not be served."""
        render.message("error", f"{line} ({render.escape(path)})")
        self.statuses.append(ExitStatus.FAILED)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Go on after an error in the block."""
        try:
            yield
        except ImgtoolError as error:
            if error.status is ExitStatus.INTERRUPTED:
                raise
            self.add(error)

    def finish(self) -> None:
        """End the command with the status that the failures ask for."""
        if self.statuses:
            first = self.statuses[0]
            same = all(status == first for status in self.statuses)
            raise SystemExit(int(first if same else ExitStatus.FAILED))


@dataclass(frozen=True, kw_only=True)
class Common:
    """What a command that opens no guest has in common with others of its kind."""

    format: str | None = None
    backing_dirs: Sequence[Path] = ()
    dry_run: bool = False
    force: Force = ()
    debug: bool = False


class _WriteKeywords(GuestKeywords):
    """What opens a guest to be changed takes by name."""

    clone: Path | None
    tmp_dir: Path | None
    force: Force
    review: Callable[[Sequence[Chain]], None] | None
    notice: Callable[[str], None]
    debug: bool


@dataclass(frozen=True, kw_only=True)
class Request(GuestOptions):
    """The guest that a command was given, and what is to be done with it."""

    image: Path
    debug: bool = False
    dry_run: bool = False
    clone: Path | None = None
    tmp_dir: Path | None = None
    force: Force = ()

    @contextlib.contextmanager
    def opened(self) -> Iterator[Guest]:
        """The guest, open to be read; with `-v` it says which engine it is and what takes time."""
        from imgtool.opening import open_guest

        with (
            _time_opening("closed"),
            open_guest(self.image, **self.keywords(), notice=warning, debug=self.debug) as guest,
        ):
            yield guest

    @contextlib.contextmanager
    def opened_to_write(self) -> Iterator[WritableGuest]:
        """The guest, open to be changed: all of it or nothing, and with `dry_run` only shown."""
        from imgtool.opening import open_guest_to_write

        with (
            _time_opening("written and closed"),
            open_guest_to_write(self.image, **self._keywords_to_write()) as guest,
        ):
            log.info("engine: libguestfs, since the direct engine does not write")
            yield guest

    def ask_directly(self, question: Callable[[Guest], Answer]) -> Answer | None:
        """What the direct engine answers, before an appliance is started; None where it does not
        read this, or not all of it. Raises what the question raises.
        """
        if self.keys:  # it opens nothing that is encrypted
            return None
        try:
            with replace(self, engine="direct").opened() as guest:
                _ = guest.layout
                return None if guest.unshown() else question(guest)
        except NotReadDirectly as error:
            log.info("not looked at before: %s", error)
            return None

    def refuse_doubtful_guest(self) -> None:
        """Raise what `opened_to_write` would raise of doubtful images, before one is read."""
        from imgtool.opening import WriteOptions, refuse_doubtful_guest

        refuse_doubtful_guest(self.image, WriteOptions(**self._keywords_to_write()))

    def refuse_unwritable_guest(self) -> None:
        """Raise what `opened_to_write` would raise of the images, before one is read."""
        from imgtool.opening import WriteOptions, refuse_unwritable_guest

        refuse_unwritable_guest(self.image, WriteOptions(**self._keywords_to_write()))

    def _keywords_to_write(self) -> _WriteKeywords:
        return {
            "clone": self.clone,
            "tmp_dir": self.tmp_dir,
            "force": self.force,
            "review": self._review if self.dry_run else None,
            "notice": warning,
            "debug": self.debug,
            **self.keywords(),
        }

    def _review(self, written: Sequence[Chain]) -> None:
        """Show what would be changed."""
        overlays = [chain.active.path for chain in written]
        images = map(Path, (self.image, *self.add))
        folders = [*self.backing_dirs, *(image.absolute().parent for image in images)]
        after = replace(
            self, image=overlays[0], add=overlays[1:], format="qcow2", backing_dirs=folders
        )
        failures = Failures(self.debug)
        differences.show(self.opened, after.opened, failures.problem)
        failures.finish()


@contextlib.contextmanager
def _time_opening(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    log.info("%s after %.3f s in all", what, time.monotonic() - started)
