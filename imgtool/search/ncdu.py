"""The export format of ncdu, which `ncdu -f FILE` opens (dev.yorhel.nl/ncdu/jsonfmt, version 1.0).

An array for each directory: first what is known of itself, then what is in it. It is written as the
guest is walked through.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator

from imgtool.guest.model import Entry

_TYPES = {stat.S_IFREG, stat.S_IFDIR}


def export(
    top: Entry, entries: Iterable[Entry], *, program: str, version: str, moment: int
) -> Iterator[str]:
    """Pieces of the file. `entries` are all below the top, parents first; `moment` is in seconds.

    Names that are not UTF-8 have U+FFFD where they are not.
    """
    head = {"progname": program, "progver": version, "timestamp": moment}
    yield f"[1,0,{json.dumps(head)},\n"
    yield "[" + json.dumps(_item(top, top.path, None))
    above = [top]
    for entry in entries:
        while not entry.path.startswith(above[-1].path.rstrip(b"/") + b"/"):
            above.pop()
            yield "]"
        item = json.dumps(_item(entry, entry.name, above[-1]))
        if entry.type == "directory":
            above.append(entry)
            yield ",\n[" + item
        else:
            yield ",\n" + item
    yield "]" * len(above) + "]\n"


def _item(entry: Entry, name: bytes, parent: Entry | None) -> dict[str, object]:
    item: dict[str, object] = {"name": name.decode("utf-8", "replace")}
    # A device number is told where it differs from that of the directory.
    if parent is None or entry.device != parent.device:
        item["dev"] = entry.device
    item |= {"asize": entry.size, "dsize": entry.blocks * 512, "ino": entry.inode}
    if entry.type != "directory" and entry.nlink > 1:
        item |= {"hlnkc": True, "nlink": min(entry.nlink, (1 << 31) - 1)}
    if stat.S_IFMT(entry.mode) not in _TYPES:
        item["notreg"] = True
    return item
