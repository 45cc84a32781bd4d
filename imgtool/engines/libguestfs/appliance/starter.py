"""Started in QEMU's place by libguestfs: continues the saved appliance if it is asked for.

Not imported but copied beside the saved appliance, and run by itself with nothing but Python's own
modules: `python -IS starter.py ARGUMENTS`. What is not exactly the appliance that was saved starts
from its beginning, as if this program was not there. Either way it ends as QEMU, with its own PID.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path


def shape(argv: list[str]) -> list[str]:
    """QEMU's arguments without what differs from one launch to the next and does not matter.

    These are the files of the guest's disks, the socket, and words for the appliance's kernel.
    """
    kept = []
    for before, word in zip(["", *argv], argv, strict=False):
        if before == "-drive" and (disk := re.search(r"(?:^|,)id=(hd\d+)(?:,|$)", word)):
            word = disk[1]
        elif before == "-chardev":
            word = re.sub(r"(^|,)path=[^,]*", "", word)
        elif before == "-append":
            word = re.sub(r"\b(guestfs_identifier|TERM)=\S*", "", word)
        kept.append(word)
    return kept


def appliance_drive(argv: list[str]) -> int:
    """Which of the arguments is the appliance's own disk; -1 if none is."""
    named = re.compile(r"(^|,)id=appliance(,|$)")
    return next((number for number, word in enumerate(argv) if named.search(word)), -1)


def file_of(drive: str) -> str:
    """The file of a -drive argument."""
    found = re.search(r"(?:^|,)file=((?:[^,]|,,)*)", drive)
    return found[1].replace(",,", ",") if found else ""


def identity(path: str, *, time: bool = True) -> list[object]:
    """What changes when a file is replaced.

    Not its time for the appliance, which libguestfs touches at each launch.
    """
    facts = Path(path).stat()
    return [path, facts.st_size, facts.st_ino, *([facts.st_mtime_ns] if time else ())]


def stands(saved: dict[str, object]) -> bool:
    """Whether QEMU and the appliance are still those that were saved."""
    try:
        files = saved["files"]
        return isinstance(files, list) and all(
            identity(facts[0], time=len(facts) > 3) == facts for facts in files
        )
    except (OSError, TypeError, KeyError, IndexError):
        return False


def quote_option(path: Path) -> str:
    """A path as a value of one of QEMU's lists of options."""
    return str(path).replace(",", ",,")


def main(folder: Path, argv: list[str]) -> None:
    saved = json.loads((folder / "saved.json").read_text())
    if "-kernel" in argv and shape(argv) == saved["shape"] and stands(saved):
        state = os.open(folder / "state", os.O_RDONLY)
        os.set_inheritable(state, True)
        argv[appliance_drive(argv)] = (
            f"file={quote_option(folder / 'root.qcow2')},snapshot=on,id=appliance,cache=unsafe,"
            "if=none,format=qcow2"
        )
        argv += ["-incoming", f"fd:{state}"]
    os.execv(saved["hypervisor"], [saved["hypervisor"], *argv])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
