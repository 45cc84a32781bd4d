"""`open_guest()`: from image files to an open guest."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool.errors import ImageError, RefusedError, UsageError
from imgtool.guest.keys import Key, parse_key
from imgtool.guest.model import Mount
from imgtool.image.chain import Chain, open_chain
from imgtool.image.locks import refuse_if_in_use, warn_if_written

if TYPE_CHECKING:
    from imgtool.engines.libguestfs.guest import LibguestfsGuest

log = logging.getLogger(__name__)
ENGINES = ("auto", "direct", "libguestfs")


def _say_nothing(line: str) -> None:
    log.warning("%s", line)


def open_images(
    images: Sequence[str | Path],
    *,
    format: str | None = None,
    backing_dirs: Sequence[str | Path] = (),
) -> tuple[Chain, ...]:
    """The chains of a guest's disks, checked: nothing is opened that the chain rule forbids."""
    from imgtool.image.recognise import refuse_noise

    chains = tuple(
        open_chain(Path(image), format=format, backing_dirs=[Path(d) for d in backing_dirs])
        for image in images
    )
    if format is None:
        for chain in chains:
            refuse_noise(chain)
    return chains


@contextlib.contextmanager
def open_guest(
    image: str | Path,
    *,
    add: Sequence[str | Path] = (),
    format: str | None = None,
    snapshot: str | None = None,
    mounts: Sequence[Mount] = (),
    root: str | None = None,
    keys: Sequence[Key | str] = (),
    engine: str = "auto",
    backing_dirs: Sequence[str | Path] = (),
    write: bool = False,
    notice: Callable[[str], None] = _say_nothing,
    debug: bool = False,
) -> Iterator[LibguestfsGuest]:
    """Open the guest whose disks are `image` and `add`; it is closed with the block.

    Read-only unless `write`: not one byte of an image, nor its mtime, changes. `snapshot` reads the
    disks as they were at that internal snapshot. `mounts` replaces layout discovery. `notice` gets
    lines for the user. Raises the errors of `imgtool.errors`: `ImageError` for an image that cannot
    be read, `RefusedError` where data would be at risk, `HostError` where the host lacks something.
    """
    if engine not in ENGINES:
        raise UsageError(f"no such engine; choose from {', '.join(ENGINES)}", subject=engine)
    if engine == "direct":
        raise ImageError(
            "the direct engine is not part of this version",
            subject=image,
            hint="leave --engine out, or say --engine libguestfs",
        )
    if write and snapshot is not None:
        raise UsageError("a snapshot cannot be written", subject=snapshot)
    wanted = [key if isinstance(key, Key) else parse_key(key) for key in keys]
    chains = open_images([image, *add], format=format, backing_dirs=backing_dirs)
    for chain in chains:
        if write:
            refuse_if_in_use(chain)
        elif line := warn_if_written(chain):
            notice(line)

    from imgtool.engines.libguestfs.guest import LibguestfsGuest
    from imgtool.engines.libguestfs.launch import launched

    with contextlib.ExitStack() as stack:
        add_drives = _drives(chains, snapshot, write, stack)
        handle = stack.enter_context(launched(add_drives, notice=notice, debug=debug))
        guest = LibguestfsGuest(
            handle,
            image=str(image),
            mounts=mounts,
            root=root,
            keys=wanted,
            write=write,
            notice=notice,
        )
        yield guest
        if write:
            guest.finish()


def _drives(
    chains: Sequence[Chain], snapshot: str | None, write: bool, stack: contextlib.ExitStack
) -> Callable[[Any], None]:
    """What adds the disks to a handle.

    What libguestfs could not open by its name alone, a snapshot or a chain that QEMU would have to
    guess at, is served to the appliance by qemu-nbd.
    """
    by_name = all(chain.safe_by_name for chain in chains)
    if write and not by_name:
        raise RefusedError(
            "QEMU would have to guess a format, or open a file by a relative name, to write this",
            subject=chains[0].active.path,
            hint="write the backing format into the overlay: qemu-img rebase -u -F FORMAT -b BASE",
        )
    if snapshot is None and by_name:

        def add_files(handle: Any) -> None:
            # Nothing was written: there is nothing to sync when the appliance goes.
            handle.set_autosync(write)
            for chain in chains:
                active = chain.active
                handle.add_drive_opts(
                    str(active.path.absolute()), format=active.format, readonly=not write
                )

        return add_files

    from imgtool.image.nbd import serve

    sockets = [stack.enter_context(serve(chain, snapshot=snapshot)).socket for chain in chains]

    def add_servers(handle: Any) -> None:
        handle.set_autosync(False)
        for socket in sockets:
            handle.add_drive_opts(
                "", format="raw", readonly=True, protocol="nbd", server=[f"unix:{socket}"]
            )

    return add_servers
