"""What other programs say, in words of our own: what it means, and what to do next.

QEMU, the kernel and their like speak to those who know their sources. Their text is logged, and
shown with `-v`; the user is told one line of ours.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """What was said: what it `means`, and the next `step` where there is one."""

    means: str
    step: str | None = None


@dataclass(frozen=True)
class _Known:
    """Words that are known, by a regular expression; `{}` in the step stands for the file."""

    words: str
    means: str
    step: str | None = None


_ANOTHER_COPY = "look for another copy of it"

# But for a field whose length is wrong: that it is not valid any more does not help then.
_BITMAPS = _Known(
    r"bitmaps_ext(?!: Invalid extension length)|bitmaps extension with zero|bitmaps found than"
    r"|[Bb]itmap directory|Bitmap .*(constraints|not supported)",
    "its table of dirty bitmaps is damaged, and QEMU opens no such image",
    "mend a copy of it, which has no bitmaps then: cp {0} COPY, then"
    " dd if=/dev/zero of=COPY bs=1 seek=95 count=1 conv=notrunc",
)

# QEMU's block/*.c: what damaged and odd images of every format made version 7.2 say.
_QEMU = (
    _Known(
        r"log that needs to be replayed|log .*replay",
        "it was not closed properly: a log in it has to be replayed before it can be read",
        "leave it as it is, and replay the log in a copy: cp {0} COPY, then qemu-img check -r all"
        " COPY",
    ),
    _BITMAPS,
    _Known(
        r"snapshot table",
        "its table of internal snapshots is damaged, and QEMU opens no such image",
        "mend a copy of it, which may lack snapshots then: cp {0} COPY, then qemu-img check -r all"
        " COPY",
    ),
    _Known(
        r'Failed to get "|Failed to lock',
        "another process has it open",
        "shut the guest down, or end that process, then try again",
    ),
    _Known(
        r"No space left|Disk quota",
        "the host has no room for it",
        "make room on the file system of the image, then repeat the command",
    ),
    _Known(
        r"Image is corrupt; cannot be opened read/write",
        "QEMU found its tables damaged and marked it: it is opened for reading only",
        "mend a copy of it: cp {0} COPY, then imgtool check --repair all COPY",
    ),
    _Known(
        r"truncated|after (the )?end of|past the end|total sector count|outside image"
        r"|[Cc]ould not read .* table",
        "a part of its file is missing: it was cut off",
        "copy it anew from where it came, and compare the lengths of the two",
    ),
    _Known(
        r"No such file or directory",
        "a file that it is made of is not there",
        "put it back where it was; -v names it",
    ),
    _Known(
        r"Permission denied|Operation not permitted",
        "this user may not open it, or a file that it is made of",
        "run imgtool as a user who may",
    ),
    _Known(
        r"socket path .* too long",
        "the folder for QEMU's socket has too long a name",
        "name a shorter one: TMPDIR=FOLDER, or for a mount XDG_RUNTIME_DIR=FOLDER",
    ),
    _Known(
        r"encrypt|key-secret|decrypt",
        "it is encrypted in a way that QEMU would need a key for, or does not know",
    ),
    _Known(
        r"[Uu]nsupported|does not support|not supported|[Uu]nknown (driver|format|protocol)",
        "it is of a kind that QEMU does not read, or its header is damaged",
        "the program that made it can convert it; else " + _ANOTHER_COPY,
    ),
    _Known(
        r"Input/output error|\bEIO\b",
        "a part of it cannot be read: its tables are damaged, or the disk that its file is on",
        "imgtool check {0} tells whether it is the tables",
    ),
    _Known(
        r"not (in|a) .*(format|image)|[Ii]nvalid|[Ii]ncorrect|checksum|magic|signature|exceeds"
        r"|too (small|large|big|short|long)|must be|No valid|[Cc]orrupt|mismatch|Unknown error"
        r"|does not contain|Assertion",
        "its header is damaged",
        _ANOTHER_COPY,
    ),
)

# mount(8), ntfs-3g and libguestfs's daemon, in the appliance and on the host.
_MOUNT = (
    _Known(
        r"unknown filesystem type|No such device",
        "the kernel that is to read it does not know this filesystem",
    ),
    _Known(
        r"unclean file system|hibernat|not .*shut ?down|Windows",
        "Windows was not shut down properly, or is hibernated",
        "start the guest, and shut it down without fast start-up",
    ),
    _Known(
        r"missing dev|devid|open_ctree|degraded",
        "a device that it is made of is missing",
        "give it with -A; or read what is there: -m DEV:/:degraded",
    ),
    _Known(
        r"more filesystems",
        "it has the marks of two filesystems",
        "say which it is: -m DEV:/::TYPE",
    ),
    _Known(r"mount point does not exist|Not a directory", "the guest has no such directory"),
    _Known(r"already mounted|busy", "it is mounted already"),
    _Known(r"Permission denied|write-protected|read-only", "it can only be read"),
    _Known(r"Input/output error", "a part of it cannot be read"),
    _Known(
        r"wrong fs type|[Bb]ad (superblock|message)|needs cleaning|Invalid argument"
        r"|can't read superblock|Unknown parameter|[Uu]nrecognized mount option",
        "the kernel finds it damaged, or of a kind or with an option that it does not know",
    ),
)

_RPM = (
    _Known(
        r"rpmts|rpmdb|rpm",
        "the guest's rpm database cannot be read: it is damaged, or of a kind that the appliance's"
        " rpm does not know",
        "'rpm -qa' in the guest lists its packages",
    ),
)


def _explain(text: str, known: tuple[_Known, ...], name: str) -> Said | None:
    for one in known:
        if re.search(one.words, text):
            return Said(one.means, one.step and one.step.format(name))
    return None


def _log(who: str, text: str) -> None:
    line = " ".join(text.split())[:2000]
    log.info("%s said: %s", who, "".join(c if c.isprintable() else "?" for c in line))


def by_qemu(text: str, name: str = "IMAGE") -> Said:
    """What QEMU's words about an image mean; `name` is what a user would type for it."""
    _log("QEMU", text)
    unknown = Said("QEMU cannot do it, and says nothing that imgtool knows", "-v shows its words")
    return _explain(text, _QEMU, name) or unknown


def step_for_bitmaps(name: str) -> str:
    """What to do with an image whose dirty bitmaps QEMU does not take, or for too long."""
    return str(_BITMAPS.step).format(name)


def by_mount(text: str) -> Said:
    """What the words of mount(8) and its like mean."""
    _log("mount", text)
    unknown = Said("the kernel refuses it, for a reason that imgtool does not know", "-v shows it")
    return _explain(text, _MOUNT, "") or unknown


def by_rpm(text: str) -> Said:
    """What the words of rpm, or of who asked it for the packages, mean."""
    _log("inspection", text)
    unknown = Said("the appliance cannot tell", "-v shows why")
    return _explain(text, _RPM, "") or unknown
