"""How a process of the sandbox gives up its rights, before anything of an image reaches it.

What namespaces do not do for it, it does itself: it becomes a user that is nobody else, closes what
it inherited, and lets filters and, where there are no namespaces, Landlock take the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence

from imgtool.engines.direct.wire import landlock, seccomp
from imgtool.engines.direct.wire.libc import libc
from imgtool.engines.direct.worker import limits

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_CAP_AMBIENT = 1, 8, 47
_AMBIENT_RAISE = 2
_LAST = (1 << 31) - 1

# linux/capability.h
_VERSION = 0x20080522  # of which capset(2) and capget(2) are told
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


def close_inherited(kept: Collection[int]) -> None:
    """Close what this process was started with, but for its standard streams and `kept`.

    An image's file is open there as the host sees it, past the mount that makes it read-only.
    """
    first = 3
    for number in sorted(number for number in kept if number >= first):
        os.closerange(first, number)
        first = number + 1
    os.closerange(first, _LAST)


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def become(user: int) -> None:
    """Become a user and a group of this number, with the right to read files and no other.

    Raises `OSError` where root may not.
    """
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()
    libc.capget(header, held)
    # Containers have the second. It is for writing too, which Landlock does not let through.
    may = next((c for c in (_DAC_READ_SEARCH, _DAC_OVERRIDE) if held[1] >> c & 1), None)
    libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    bits = 0 if may is None else 1 << may
    if libc.capset(header, (ctypes.c_uint32 * 6)(bits, bits, bits, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")
    if may is not None and libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, may, 0, 0):
        raise OSError(ctypes.get_errno(), "QEMU cannot be given the right to read")


def drop_capabilities() -> None:
    """Give up all capabilities, for good: no program that is started gets more."""
    header, none = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")


@contextlib.contextmanager
def _rules(paths: Mapping[str, int], descriptors: Sequence[int]) -> Iterator[list[landlock.Rule]]:
    with contextlib.ExitStack() as stack:
        rules = [(number, landlock.READ) for number in descriptors]
        for path, allowed in paths.items():
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, opened)
            rules.append((opened, allowed))
        yield rules


def enter(
    *,
    kept: Sequence[int],
    user: int | None,
    images: Sequence[int] = (),
    paths: Mapping[str, int] | None = None,
    newest: int = _LAST,
) -> None:
    """Give up what this process has no need of; `kept` and `images` are descriptors that stay open.

    As root it becomes `user`. `paths` is for where there are no namespaces: the files and folders
    that remain, each with what may be done to them; of Landlock no version after `newest` is used.
    """
    close_inherited([*kept, *images])
    if user is None:
        drop_capabilities()
    else:
        become(user)
        end_with_parent()  # which was forgotten with the user
    limits.require()
    if paths is not None:
        if user is None:
            limits.share_user()
        with _rules(paths, images) as rules:
            landlock.restrict(rules, newest=newest)
    seccomp.confine(seccomp.reading_filter())


def enter_to_mount() -> None:
    """Give up what the replay of a journal has no need of, but for what it mounts first."""
    close_inherited(())
    seccomp.confine(seccomp.replay_filter(mounts=True))
