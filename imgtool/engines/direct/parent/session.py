"""From image files to a guest that the sandboxed worker reads."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.engines.direct.parent import sandbox
from imgtool.engines.direct.parent.ring import ring
from imgtool.engines.direct.parent.scratch import scratch_memory
from imgtool.engines.direct.wire.refusals import NoSandbox, SandboxFailed, Unsupported
from imgtool.guest.guest_options import GuestOptions
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.reading import passes_locks
from imgtool.image.chain.snapshot_view import at_snapshot

if TYPE_CHECKING:
    from imgtool.engines.direct.parent.guest import DirectGuest
    from imgtool.image.qemu.clusters import Clusters

log = logging.getLogger(__name__)

# What this host does not have, and why: found out once.
_unavailable: dict[sandbox.Kind, str] = {}


@contextlib.contextmanager
def open_direct(
    image: str, chains: Sequence[Chain], options: GuestOptions, notice: Callable[[str], None]
) -> Iterator[DirectGuest]:
    """Open the guest of these chains in the sandbox; `Unsupported` where only the appliance can,
    `NoSandbox` where nothing can be read without it.
    """
    snapshot = options.snapshot
    with contextlib.ExitStack() as stack:
        chains = [stack.enter_context(at_snapshot(chain, snapshot)) for chain in chains]
        images = sandbox.Images(chains)
        stack.callback(images.close)
        shared = [passes_locks(chain) for chain in chains]

        def started(
            kind: sandbox.Kind, overlays: Mapping[int, Path], inner: contextlib.ExitStack
        ) -> DirectGuest:
            disks = [
                sandbox.server(
                    chain,
                    images,
                    kind=kind,
                    snapshot=snapshot,
                    force_share=shared[number],
                    overlay=overlays.get(number),
                )
                for number, chain in enumerate(chains)
            ]

            @functools.cache
            def clusters() -> list[Clusters | None]:
                from imgtool.image.qemu.clusters import plain  # only large files need it

                return [
                    # Else there is more to it, or somebody writes.
                    plain(chain, images.descriptors)
                    if snapshot is None and not shared[number] and number not in overlays
                    else None
                    for number, chain in enumerate(chains)
                ]

            memory = inner.enter_context(ring())
            landlocked = kind is sandbox.Kind.LANDLOCK  # else it has a folder
            scratch = inner.enter_context(scratch_memory()) if landlocked else None
            handed = [memory.descriptor, *([scratch.descriptor] if scratch else [])]
            process = inner.enter_context(sandbox.start_worker(images, kind=kind, shared=handed))
            if scratch is not None:
                inner.enter_context(scratch.limit(process))
            # Loaded while the worker starts.
            from imgtool.engines.direct.parent.client import Client
            from imgtool.engines.direct.parent.guest import DirectGuest

            return DirectGuest(
                Client(process, image=image, ring=memory, scratch=scratch),
                image=image,
                sandbox=kind.value,
                disks=disks,
                lost=[chain.lost for chain in chains],
                mounts=options.parsed_mounts(),
                root=options.root,
                replayed=overlays,
                clusters=clusters,
                notice=notice,
            )

        first = stack.enter_context(contextlib.ExitStack())
        kind, guest = _in_a_sandbox(lambda kind, inner: started(kind, {}, inner), first)
        journals = guest.journals()
        if not journals:
            yield guest
            return
        first.close()
        if snapshot is not None:
            raise Unsupported("a journal has to be replayed in a snapshot")
        if any(chain.lost for chain in chains):
            raise Unsupported("a journal has to be replayed in an image that was cut off")
        if kind is not sandbox.Kind.NAMESPACES:
            raise Unsupported("a journal is replayed in namespaces alone")
        from imgtool.engines.direct.replay import host

        started_at = time.monotonic()
        overlays = stack.enter_context(
            host.replay_journals(chains, images, guest.disk_sizes, journals)
        )
        log.info("journal: replayed in %.3f s", time.monotonic() - started_at)
        for overlay in overlays.values():
            images.add_made(overlay)
        yield started(kind, overlays, stack)


def _in_a_sandbox(
    start: Callable[[sandbox.Kind, contextlib.ExitStack], DirectGuest], stack: contextlib.ExitStack
) -> tuple[sandbox.Kind, DirectGuest]:
    """What `start` gives for the first kind of sandbox that can be had here; it is closed with the
    stack. Raises `NoSandbox` where there is none.
    """
    for kind in sandbox.Kind:
        if kind in _unavailable:
            continue
        with contextlib.ExitStack() as inner:
            try:
                guest = start(kind, inner)
            except NoSandbox as error:
                log.info("sandbox: none by %s: %s", kind.value, error)
                failed = isinstance(error, SandboxFailed)
                _unavailable[kind] = "it cannot be closed here" if failed else str(error)
                continue
            stack.enter_context(inner.pop_all())
            return kind, guest
    reasons = "; ".join(f"{kind.value}: {reason}" for kind, reason in _unavailable.items())
    raise NoSandbox(f"no sandbox can be had ({reasons})")
