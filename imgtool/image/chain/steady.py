"""Chains whose files another user can exchange between the look at them and their use.

Who may write to a folder may put a link to any file of the host in the place of a base, and who may
write to an image may name another one in its header. QEMU opens what a name leads to at that time,
with the rights of whoever started it. So it is given descriptors of the files that were looked at,
and once it has opened the chain it is looked at what it has opened.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from imgtool.errors import HostError, RefusedError
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.info import ImageInfo
from imgtool.image.intent.marks import names_extents
from imgtool.image.locking.held import bind_path
from imgtool.image.locking.host_file import exchanged_file, open_host_file
from imgtool.text import printable

_MOST_LINKS = 40  # that Linux follows


def is_safe_from_others(chain: Chain) -> bool:
    """Whether nobody but this user and root can exchange a file of the chain, or write to it."""
    return all(is_out_of_reach(path) for path in chain.files)


def is_out_of_reach(path: Path) -> bool:
    """Whether nobody but this user and root can write to a file, or put another in its place."""
    try:
        file = path.stat()
    except OSError:
        return False
    if file.st_uid not in (0, os.geteuid()):
        return False
    if stat.S_ISREG(file.st_mode) and file.st_mode & 0o022:
        return False
    return is_name_out_of_reach(path)


def is_name_out_of_reach(path: Path) -> bool:
    """Whether nobody but this user and root can put another file in the place of one."""
    users = (0, os.geteuid())
    try:
        for name in _names_to(path.absolute()):
            folder = name.parent.lstat()
            if folder.st_uid not in users:
                return False
            if folder.st_mode & 0o022 and not (
                # There nobody but their owners can exchange names.
                folder.st_mode & stat.S_ISVTX and name.lstat().st_uid in users
            ):
                return False
    except OSError:
        return False
    return True


def _names_to(path: Path) -> Iterator[Path]:
    """Each name that is looked up on the way to a file, those in its links too; in folders that are
    named without links. Raises `OSError`."""
    at, left, links = Path("/"), [*path.parts[1:]], 0
    while left:
        name = at / left.pop(0)
        if name.name == "..":
            at = at.parent
            continue
        yield name
        if not stat.S_ISLNK(name.lstat().st_mode):
            at = name
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = name.readlink()
        at = Path("/") if target.is_absolute() else at
        left = [*target.parts[target.is_absolute() :], *left]


@contextlib.contextmanager
def bind_images(links: Sequence[ImageInfo]) -> Iterator[None]:
    """Until the block ends the names of the images' files stand for the very files that were looked
    at, in all that imgtool does with them (`imgtool.image.locking.held.way_to`): where nobody else
    can exchange them they do so by themselves.

    Raises `RefusedError` for a file that is not the one any more that was looked at, also where it
    was exchanged only during the block, or which root cannot work on by a descriptor.
    """
    with contextlib.ExitStack() as stack:
        bound: dict[Path, tuple[int, int]] = {}
        for link in links:
            for path in _files_to_bind(link):
                identity = dict(link.inodes)[path]
                file = stack.enter_context(open_host_file(path, noted=identity))
                stack.enter_context(bind_path(path, file.fileno()))
                bound[path] = identity
        yield
    for path, identity in bound.items():
        try:
            status = path.stat()
        except FileNotFoundError:  # removed by the work itself
            continue
        except OSError as error:  # such as a circle of links
            raise exchanged_file(path) from error
        if (status.st_dev, status.st_ino) != identity:
            raise exchanged_file(path)


@contextlib.contextmanager
def bind_paths(paths: Sequence[Path]) -> Iterator[None]:
    """`bind_images` for files of which nothing is known but their names: what they lead to now, or
    that they lead nowhere."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            if not os.path.lexists(path):
                stack.enter_context(bind_path(path, None))
            elif not is_out_of_reach(path):
                file = stack.enter_context(open_host_file(path))
                if names_extents(file):
                    _refuse_by_name(path)
                else:
                    stack.enter_context(bind_path(path, file.fileno()))
        yield


def _files_to_bind(link: ImageInfo) -> list[Path]:
    """The files of an image that another user can exchange, and that QEMU takes by descriptors."""
    if link.extents:  # QEMU looks for them beside the name that it is given
        refuse_by_name([link])
        return []
    return [path for path in link.files if not is_out_of_reach(path)]


def refuse_by_name(links: Sequence[ImageInfo]) -> None:
    """Raise `RefusedError` for root where QEMU has to be given the names of files that another user
    can exchange: it would open any file of the host for that one."""
    for path in (path for link in links for path in link.files):
        _refuse_by_name(path)


def _refuse_by_name(path: Path) -> None:
    if os.geteuid() != 0 or is_name_out_of_reach(path):
        return  # who has no rights but their own, or a folder that is nobody else's
    owner = _owner_of(path.parent)
    raise RefusedError(
        "another user can exchange it for any file, and QEMU, which has to be given its name, would"
        " open that with the rights of root",
        subject=printable(path),
        hint=f"do it with the rights of its folder's owner: runuser -u {owner} -- imgtool ..."
        if owner
        else "work on a copy in a folder that only you can write to",
    )


def _owner_of(folder: Path) -> str | None:
    """The user whose rights are enough to work in a folder, and do no harm elsewhere."""
    import pwd

    with contextlib.suppress(OSError, KeyError):
        owner = folder.stat().st_uid
        return pwd.getpwuid(owner).pw_name if owner else None
    return None


@contextlib.contextmanager
def steady(chain: Chain) -> Iterator[Chain]:
    """The chain as QEMU is given it until the block ends: as it is where nobody else can exchange
    its files, or else by descriptors of this process.

    Raises `RefusedError` for a file that is not the one any more that was looked at.
    """
    if chain.names or is_safe_from_others(chain):
        yield chain
        return
    with contextlib.ExitStack() as opened:
        names = {}
        for path in itertools.chain.from_iterable(map(_files_to_bind, chain.links)):
            file = opened.enter_context(chain.open_file(path))
            # The process opens it anew, with locks of its own.
            names[path] = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield replace(chain, names=names)


def refuse_others_opened(
    pid: int, chains: Sequence[Chain], *, besides: Sequence[Path] | None = None
) -> None:
    """Raise `RefusedError` if a QEMU that was started on these chains has not opened the very files
    that were looked at, or, with `besides`, any other one that is not in those folders.
    """
    known = {
        identity: path for chain in chains for link in chain.links for path, identity in link.inodes
    }
    try:
        found = _files_of(pid)
    except OSError as error:
        raise HostError(
            f"it cannot be seen which files QEMU has opened: {(error.strerror or '').lower()}",
            subject=printable(chains[0].active.path),
            hint="work on a copy in a folder that only you can write to",
        ) from error
    for identity, path in known.items():
        if identity not in found:
            raise exchanged_file(path)
    if besides is None:
        return
    own = {folder.resolve() for folder in besides}
    for identity, path in found.items():
        if identity not in known and not own.intersection(path.parents):
            raise exchanged_file(chains[0].active.path)


def _files_of(pid: int) -> dict[tuple[int, int], Path]:
    """The files and block devices that a process has open, but for those without a name."""
    found = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed by now
            status = entry.stat()
            if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                name = os.readlink(entry.path)  # noqa: PTH115
                if not name.startswith("/memfd:"):
                    found[status.st_dev, status.st_ino] = Path(name)
    return found
