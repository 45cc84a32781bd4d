"""From image files to a guest that the sandboxed worker reads."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.engines.direct import sandbox
from imgtool.engines.direct.filesystem import NeedsAppliance
from imgtool.engines.direct.ring import ring
from imgtool.guest.model import Mount
from imgtool.image.chain import Chain
from imgtool.image.reading import passes_locks
from imgtool.image.snapshot_view import at_snapshot

if TYPE_CHECKING:
    from imgtool.engines.direct.guest import DirectGuest
    from imgtool.image.clusters import Clusters

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_direct(
    image: str,
    chains: Sequence[Chain],
    *,
    snapshot: str | None = None,
    mounts: Sequence[Mount] = (),
    root: str | None = None,
    notice: Callable[[str], None],
) -> Iterator[DirectGuest]:
    """Open a guest in the sandbox; `NeedsAppliance` where only the appliance can."""
    with contextlib.ExitStack() as stack:
        chains = [stack.enter_context(at_snapshot(chain, snapshot)) for chain in chains]
        images = sandbox.Images(chains)
        stack.callback(images.close)
        shared = [passes_locks(chain) for chain in chains]

        def started(overlays: Mapping[int, Path], inner: contextlib.ExitStack) -> DirectGuest:
            disks = [
                sandbox.server(
                    chain,
                    images,
                    snapshot=snapshot,
                    force_share=shared[number],
                    overlay=overlays.get(number),
                )
                for number, chain in enumerate(chains)
            ]

            @functools.cache
            def clusters() -> list[Clusters | None]:
                from imgtool.image.clusters import plain  # only large files need it

                names = images.names.items()
                files = {path: images.descriptors[name] for path, name in names}
                return [
                    # Else there is more to it, or somebody writes.
                    plain(chain, files)
                    if snapshot is None and not shared[number] and number not in overlays
                    else None
                    for number, chain in enumerate(chains)
                ]

            memory = inner.enter_context(ring())
            process = inner.enter_context(sandbox.sandboxed(images, shared=[memory.descriptor]))
            # Loaded while the worker starts.
            from imgtool.engines.direct.client import Client
            from imgtool.engines.direct.guest import DirectGuest

            return DirectGuest(
                Client(process, image=image, ring=memory),
                image=image,
                disks=disks,
                mounts=mounts,
                root=root,
                replayed=overlays,
                clusters=clusters,
                notice=notice,
            )

        first = stack.enter_context(contextlib.ExitStack())
        guest = started({}, first)
        journals = guest.journals()
        if not journals:
            yield guest
            return
        first.close()
        if snapshot is not None:
            raise NeedsAppliance("a journal has to be replayed in a snapshot")
        from imgtool.engines.direct import replay

        started_at = time.monotonic()
        overlays = stack.enter_context(replay.recovered(chains, images, guest.disk_sizes, journals))
        log.info("journal: replayed in %.3f s", time.monotonic() - started_at)
        for overlay in overlays.values():
            images.add_made(overlay)
        yield started(overlays, stack)
