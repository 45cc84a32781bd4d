"""A directory's content as a tar stream, in the worker."""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection

from imgtool.engines.direct.worker import tar_headers
from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.tree import Found, InodeRef, Tree
from imgtool.engines.direct.worker.tree_files import pieces

_PART = 1 << 20


def write(
    tree: Tree,
    top: bytes,
    left_out: Collection[bytes],
    attributes: Callable[[Found], bytes],
    problem: Callable[[bytes, str], None],
    give: Callable[[bytes | bytearray], None],
    give_contents: Callable[[Found], None],
) -> None:
    """Give all below the directory `top` (without a slash at its end), names relative to it.

    What cannot be read is told to `problem` and is not in the stream. A file of more than 1 MiB is
    given as it is read: `ReadFailed` with its path ends the stream within it, where tar(1) finds
    the end too early.
    """
    real, place = tree.resolve(top or b"/")
    linked: dict[InodeRef, bytes] = {}
    first = tree.lstat(real)
    held = bytearray(attributes(first) + tar_headers.header(b"./", first, None))
    for child in tree.walk(top or b"/", place, problem):
        if child.path in left_out or stat.S_ISSOCK(child.node.mode):
            continue
        relative = b"." + child.path[len(top) :]
        has_names = child.node.nlink > 1 and not stat.S_ISDIR(child.node.mode)
        other = linked.get(child.place) if has_names else None
        header = b"" if other is not None else attributes(child)
        header += tar_headers.header(relative, child, other)
        content = b""
        streamed = False
        if stat.S_ISREG(child.node.mode) and other is None:
            streamed = child.node.size > _PART
            if not streamed:
                try:
                    content = b"".join(
                        pieces(tree.filesystem(child.place), child, 0, child.node.size)
                    )
                except ReadFailed as error:
                    problem(child.path, str(error))
                    continue
        if has_names:
            linked.setdefault(child.place, relative)
        held += header
        if streamed:
            # The header at least is out when reading fails.
            give(held)
            held = bytearray()
            try:
                give_contents(child)
            except ReadFailed as error:
                raise ReadFailed(str(error), child.path) from error
            held += tar_headers.padding(child.node.size)
        else:
            held += content + tar_headers.padding(len(content))
        if len(held) >= _PART:
            give(held)
            held = bytearray()
    give(held + tar_headers.END)
