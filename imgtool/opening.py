"""`open_guest()`: from image files to an open guest."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from imgtool.errors import Force, ImgtoolError, UsageError, shorten
from imgtool.guest.guest import Guest
from imgtool.guest.guest_options import GuestOptions
from imgtool.guest.partitions import partitions_of
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.reading import chain_to_read
from imgtool.image.chain.steady import is_safe_from_others, refuse_others_opened
from imgtool.image.checks.doubts import doubts_of, refuse_doubtful
from imgtool.image.locking.locks import warn_if_written

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest.fsck import FsckFailure
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest
    from imgtool.guest.writable import WritableGuest

log = logging.getLogger(__name__)
ENGINES = ("auto", "direct", "libguestfs")


def _log_notice(line: str) -> None:
    log.warning("%s", line)


@dataclass(frozen=True, kw_only=True)
class ReadOptions(GuestOptions):
    """How a guest is opened: `notice` gets lines for the user, `debug` logs what the appliance
    says."""

    notice: Callable[[str], None] = _log_notice
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class InPlaceOptions(ReadOptions):
    """How a guest is opened to be changed: `force` gives up the guards that it names."""

    force: Force = ()


@dataclass(frozen=True, kw_only=True)
class WriteOptions(InPlaceOptions):
    """How a guest is opened to be changed as a whole.

    With `clone` the result is in a new overlay on the image, and with `review` it is thrown away
    after that was called with the chains that have it. Until the end it is in overlays beside the
    images, or in `tmp_dir`.
    """

    clone: Path | None = None
    tmp_dir: Path | None = None
    review: Callable[[Sequence[Chain]], None] | None = None


_Given = ParamSpec("_Given")
_Options = TypeVar("_Options", bound=ReadOptions)
_Opened = TypeVar("_Opened", bound=Guest)


def _takes(
    options: Callable[_Given, _Options],
) -> Callable[
    [Callable[[str | Path, _Options], Iterator[_Opened]]],
    Callable[Concatenate[str | Path, _Given], AbstractContextManager[_Opened]],
]:
    """Make a context manager of a function of an image and its options: the fields of `options` are
    its keywords."""

    def decorate(
        function: Callable[[str | Path, _Options], Iterator[_Opened]],
    ) -> Callable[Concatenate[str | Path, _Given], AbstractContextManager[_Opened]]:
        opened = contextlib.contextmanager(function)

        def open_it(
            image: str | Path, *given: _Given.args, **named: _Given.kwargs
        ) -> AbstractContextManager[_Opened]:
            return opened(image, options(*given, **named))

        functools.update_wrapper(open_it, function)
        image, _ = inspect.signature(function).parameters.values()
        fields = inspect.signature(options).parameters.values()
        open_it.__signature__ = inspect.Signature([image, *fields])  # type: ignore[attr-defined]
        return open_it  # type: ignore[return-value]  # `image` may be given by its name too

    return decorate


def _parse_options(options: _Options) -> _Options:
    """The options with what is typed read; what is said twice is told once."""
    return replace(
        options,
        mounts=options.parsed_mounts(),
        keys=options.parsed_keys(),
        notice=_once(options.notice),
    )


def _once(notice: Callable[[str], None]) -> Callable[[str], None]:
    """Two engines that look at one guest find the same things odd: each is said once."""
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            notice(line)

    return say


def open_images(
    images: Sequence[str | Path],
    *,
    format: str | None = None,
    backing_dirs: Sequence[str | Path] = (),
) -> tuple[Chain, ...]:
    """The chains of a guest's disks, checked: nothing is opened that the chain rule forbids."""
    chains = tuple(open_chain(image, format=format, backing_dirs=backing_dirs) for image in images)
    return _not_noise(chains, format)


def _not_noise(chains: tuple[Chain, ...], format: str | None) -> tuple[Chain, ...]:
    from imgtool.image.checks.recognise import require_known_content

    if format is None:
        for chain in chains:
            require_known_content(chain)
    return chains


@contextlib.contextmanager
def images_to_read(
    images: Sequence[str | Path],
    *,
    format: str | None = None,
    backing_dirs: Sequence[str | Path] = (),
    partial: bool = False,
) -> Iterator[tuple[Chain, ...]]:
    """`open_images` for those who read them in the block: no imgtool changes them meanwhile."""
    with contextlib.ExitStack() as stack:
        chains = tuple(
            stack.enter_context(
                chain_to_read(image, format=format, backing_dirs=backing_dirs, partial=partial)
            )
            for image in images
        )
        yield _not_noise(chains, format)


@_takes(ReadOptions)
def open_guest(image: str | Path, options: ReadOptions) -> Iterator[Guest]:
    """Open the guest whose disks are `image` and `add`, to read it; it is closed with the block.

    The keywords are the fields of `ReadOptions`. Not one byte of an image, nor its mtime, changes.
    Raises the errors of `imgtool.errors`: `ImageError` for an image that cannot be read,
    `RefusedError` where data would be at risk, `HostError` where the host lacks something.
    """
    engine, snapshot = options.engine, options.snapshot
    if engine not in ENGINES:
        raise UsageError(f"no such engine; choose from {', '.join(ENGINES)}", subject=engine)
    options = _parse_options(options)
    notice = options.notice
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        chains = stack.enter_context(
            images_to_read(
                [image, *options.add],
                format=options.format,
                backing_dirs=options.backing_dirs,
                partial=snapshot is None,
            )
        )
        for chain in chains:
            if snapshot is not None:
                chain.snapshot(snapshot)
            if line := warn_if_written(chain):
                notice(line)
            for line in doubts_of(chain):
                notice(line)
        log.info("chain: checked in %.3f s", time.monotonic() - started)

        def appliance() -> AbstractContextManager[Guest]:
            _refuse_lost(chains)
            return _appliance(chains, image, options)

        if options.keys and engine == "direct":
            raise UsageError(
                "the direct engine opens nothing that is encrypted",
                subject="--key",
                hint="leave --engine out",
            )
        if engine == "libguestfs" or (options.keys and engine == "auto"):
            if engine == "auto":
                log.info("engine: libguestfs, since keys are given")
            read = stack.enter_context(appliance())
            read.chains = chains
            yield read
            _tell_left_out(read, notice)
            return

        from imgtool.engines.direct.parent.session import open_direct
        from imgtool.engines.fallback import ChosenGuest

        chosen = ChosenGuest(
            stack,
            lambda: open_direct(str(image), chains, options, notice),
            None if engine == "direct" else appliance,
            image=str(image),
        )
        chosen.chains = chains
        yield chosen
        _tell_left_out(chosen, notice)


def _tell_left_out(guest: Guest, notice: Callable[[str], None]) -> None:
    if count := guest.oversized_xattrs:
        notice(f"extended attributes (streams of NTFS) of more than 64 KiB are left out: {count}")


def _refuse_lost(chains: Sequence[Chain]) -> None:
    """Raise `ImageError` for an image that was cut off: the appliance would read zeros for what is
    lost of it."""
    from imgtool.image.chain.ends import Truncated

    for chain in chains:
        if (unseen := chain.active.unseen) is not None and chain.active.is_truncated:
            raise Truncated(chain.active.path, unseen)


@_takes(WriteOptions)
def open_guest_to_write(image: str | Path, options: WriteOptions) -> Iterator[WritableGuest]:
    """Open a guest to change it, through the appliance; the keywords are the fields of
    `WriteOptions`, and the errors those of `open_guest`.

    What was written is in the image once the block has ended without an error, all of it;
    otherwise the image is as it was. Raises `RefusedError` for an image that is in use, or the base
    of overlays; `force` gives up what it names.
    """
    from imgtool.guest.writable import WritableGuest
    from imgtool.image.change import transaction

    clone, tmp_dir, review = options.clone, options.tmp_dir, options.review
    backing_dirs, force = options.backing_dirs, options.force
    _refuse_clone_of_several(options)
    options = _parse_to_write(options)
    notice = options.notice
    chains = _chains_to_write_as_a_whole(image, options)
    if clone is not None:
        for line in doubts_of(chains[0]):
            notice(line)
        begun: AbstractContextManager[transaction.Clone | transaction.Transaction] = (
            transaction.clone(chains[0], clone, force=force)
        )
    else:
        begun = transaction.transaction(
            chains, backing_dirs=backing_dirs, tmp_dir=tmp_dir, force=force, notice=notice
        )
    with begun as writing:
        with _appliance(writing.chains, image, options, write=True, force=force) as guest:
            assert isinstance(guest, WritableGuest)
            yield guest
            guest.finish()
        if guest.unsound:
            _refuse_new_faults(guest.unsound, chains, image, options)
        if review is not None:
            review(writing.chains)
            return
        started = time.monotonic()
        writing.commit()
        log.info("transaction: committed in %.2f s", time.monotonic() - started)


def refuse_doubtful_guest(image: str | Path, options: WriteOptions) -> None:
    """Raise what `open_guest_to_write` would raise of images that are doubtful, or encrypted by
    QEMU: for who reads the guest first, or asks a user for a text. What was interrupted is
    finished, as there.

    An image that is cloned may be doubtful: it is only read.
    """
    from imgtool.image.chain.writable import refuse_without_key

    _refuse_clone_of_several(options)
    options = _parse_to_write(options)
    for chain in _chains_to_write_as_a_whole(image, options):
        refuse_without_key(chain.links)
        if options.clone is None:
            refuse_doubtful(chain, force=options.force)


def refuse_unwritable_guest(image: str | Path, options: WriteOptions) -> None:
    """Raise what `open_guest_to_write` would raise before it starts an appliance, of the images
    alone: for who reads the guest first, and writes to it in any case. What was interrupted is
    finished, as there.
    """
    from imgtool.image.chain.writable import refuse_without_key
    from imgtool.image.change.guards import refuse_to_write

    _refuse_clone_of_several(options)
    options = _parse_to_write(options)
    for chain in _chains_to_write_as_a_whole(image, options):
        if options.clone is None:
            refuse_to_write(chain, options.backing_dirs, force=options.force)
        else:
            refuse_without_key(chain.links)


def _refuse_clone_of_several(options: WriteOptions) -> None:
    if options.clone is None:
        return
    if options.add:
        raise UsageError("a clone is made of one disk", subject=options.clone)
    if options.tmp_dir is not None:
        raise UsageError(
            "--tmp-dir says nothing of a clone: what is written is the clone",
            subject=options.clone,
        )


def _chains_to_write_as_a_whole(image: str | Path, options: WriteOptions) -> tuple[Chain, ...]:
    """The chains, and what was interrupted on them finished, unless they are left alone."""
    from imgtool.image.change.guards import refuse_if_interrupted

    if options.clone is None and options.review is None:
        return _chains_to_write(image, options)
    disks = [image, *options.add]
    for disk in disks:  # it is left alone: what was interrupted on it too
        refuse_if_interrupted(Path(disk))
    return open_images(disks, format=options.format, backing_dirs=options.backing_dirs)


def _refuse_new_faults(
    found: Sequence[FsckFailure], chains: Sequence[Chain], image: str | Path, options: ReadOptions
) -> None:
    """Raise `ImgtoolError` where a filesystem has faults that it had not before it was written to.

    A filesystem with older faults may be written to: a guest that does not start is often mended
    by one file.
    """
    from imgtool.engines.libguestfs.guest.fsck import check, filesystems, new_faults

    with _appliance(chains, image, options) as before:
        # What is in the journals counts as written.
        before.mount_layout()
        before.unmount_layout()
        same = filesystems(before.volumes, [one.device for one in found])
        known = {one.device: one for one in check(before.handle, same)}
    for one in found:
        if new := new_faults(known.get(one.device), one):
            raise ImgtoolError(
                "what was written left its filesystem unsound, and nothing was changed:"
                f" {shorten(new[0])}",
                subject=one.device,
                hint="it had faults before: on a copy of the image, have it mended first"
                if one.device in known
                else None,
            )
        options.notice(f"{one.device} had faults before it was written to: {shorten(one.said)}")


@_takes(InPlaceOptions)
def open_guest_in_place(image: str | Path, options: InPlaceOptions) -> Iterator[LibguestfsGuest]:
    """As `open_guest_to_write`, but every write is in the image at once: for a mount, whose user
    decides what belongs together."""
    from imgtool.image.change.guards import refuse_to_guess, refuse_to_write

    options = _parse_to_write(options)
    chains = _chains_to_write(image, options)
    for chain in chains:
        refuse_to_guess(chain)
        refuse_to_write(chain, options.backing_dirs, force=options.force)
    with _appliance(chains, image, options, write=True, force=options.force) as guest:
        yield guest
        guest.finish()


def _parse_to_write(options: _Options) -> _Options:
    """`_parse_options`, unless what is asked for cannot be written to: `UsageError`."""
    options.refuse_direct()
    if options.snapshot is not None:
        raise UsageError("a snapshot cannot be written to", subject=options.snapshot)
    return _parse_options(options)


def _chains_to_write(image: str | Path, options: ReadOptions) -> tuple[Chain, ...]:
    from imgtool.image.change.recovery import recover
    from imgtool.image.intent.intent_state import refuse_format_of_record

    images = [Path(disk) for disk in (image, *options.add)]
    for disk in images:
        refuse_format_of_record(disk, options.format)
        if line := recover(disk, backing_dirs=options.backing_dirs):
            options.notice(line)
    return open_images(images, format=options.format, backing_dirs=options.backing_dirs)


@contextlib.contextmanager
def _appliance(
    chains: Sequence[Chain],
    image: str | Path,
    options: ReadOptions,
    *,
    write: bool = False,
    force: Force = (),
) -> Iterator[LibguestfsGuest]:
    from imgtool.engines.libguestfs.appliance.launch import launch_appliance
    from imgtool.engines.libguestfs.guest.guest import LibguestfsGuest

    kind: type[LibguestfsGuest] = LibguestfsGuest
    if write:
        from imgtool.engines.libguestfs.write.guest import LibguestfsWritableGuest

        kind = LibguestfsWritableGuest

    with contextlib.ExitStack() as stack:
        add_drives = _drives(chains, options.snapshot, write, stack)
        launch = launch_appliance(add_drives, notice=options.notice, debug=options.debug)
        handle = stack.enter_context(launch)
        if write and not all(map(is_safe_from_others, chains)):
            refuse_others_opened(handle.get_pid(), chains)
        yield kind(
            handle,
            image=str(image),
            mounts=options.parsed_mounts(),
            root=options.root,
            keys=options.parsed_keys(),
            write=write,
            force=force,
            notice=options.notice,
        )


def _drives(
    chains: Sequence[Chain], snapshot: str | None, write: bool, stack: contextlib.ExitStack
) -> Callable[[Any], None]:
    """What adds the disks to a handle.

    A disk that is only read is served to the appliance by qemu-nbd. By its name libguestfs (1.48)
    puts an overlay on it and leaves QEMU to guess what is in that overlay: a guest that writes the
    header of an image to its disk could name any file of the host as the base of it.
    """
    # A table with 4096-byte sectors is seen only on a disk that has them.
    sectors = [_sectors(chain, snapshot) for chain in chains]
    if write:
        if snapshot is not None or not all(chain.safe_by_name for chain in chains):
            raise ValueError("a chain to write to is opened by name")

        def add_files(handle: Any) -> None:
            handle.set_autosync(True)
            for chain, size in zip(chains, sectors, strict=True):
                active = chain.active
                handle.add_drive_opts(
                    # By its own name: QEMU looks for what it stands on beside a link.
                    str(active.path.resolve()),
                    format=active.format,
                    readonly=False,
                    **size,
                )

        return add_files

    from imgtool.image.qemu.nbd import serve

    sockets = [stack.enter_context(serve(chain, snapshot=snapshot)).socket for chain in chains]

    def add_servers(handle: Any) -> None:
        handle.set_autosync(False)
        for socket, size in zip(sockets, sectors, strict=True):
            handle.add_drive_opts(
                "", format="raw", readonly=True, protocol="nbd", server=[f"unix:{socket}"], **size
            )

    return add_servers


def _sectors(chain: Chain, snapshot: str | None) -> dict[str, int]:
    table = partitions_of(chain, snapshot=snapshot).partitions
    return {"blocksize": 4096} if any(row.sector_size == 4096 for row in table) else {}
