"""The options that mean the same wherever they appear."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from imgtool.cli import completing
from imgtool.cli.output import Output
from imgtool.errors import Reason
from imgtool.formats.checksums import CHECKSUMS


class Engine(StrEnum):
    """What reads the guest."""

    auto = "auto"
    direct = "direct"
    libguestfs = "libguestfs"


class Checksum(StrEnum):
    """Checksums of file contents."""

    _ignore_ = "members name"
    members = vars()
    for name in CHECKSUMS:
        members[name] = name


class Kept(StrEnum):
    """Which extended attributes a copy keeps."""

    user = "user"
    all = "all"


Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="The disk image.")]
GuestPaths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Absolute guest paths; * ? [a-z] are expanded in the guest.",
        autocompletion=completing.guest_paths,
    ),
]
GuestPathsOrRoot = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATH]...",
        help="Absolute guest paths; / if none is given.",
        autocompletion=completing.guest_paths,
    ),
]
OutwardPaths = Annotated[
    list[str],
    typer.Argument(
        metavar="SRC... DEST",
        help="What to copy, and where to.",
        autocompletion=completing.outward_paths,
    ),
]
InwardPaths = Annotated[
    list[str],
    typer.Argument(
        metavar="SRC... DEST",
        help="What to copy, and where to.",
        autocompletion=completing.inward_paths,
    ),
]
Add = Annotated[
    list[Path] | None,
    typer.Option("-A", "--add", metavar="IMAGE", help="A further disk of the same guest."),
]
Format = Annotated[
    str | None,
    typer.Option("--format", metavar="FMT", help="Take the image as this format; do not probe."),
]
Snapshot = Annotated[
    str | None,
    typer.Option("--snapshot", metavar="NAME", help="Read the image as at this snapshot."),
]
Mounts = Annotated[
    list[str] | None,
    typer.Option(
        "-m",
        metavar="DEV[:MOUNTPOINT[:OPTIONS[:FSTYPE]]]",
        help="Use this layout, do not look for one.",
    ),
]
Root = Annotated[
    str | None,
    typer.Option("--root", metavar="DEV", help="Which operating system, if there are several."),
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="SELECTOR",
        help="Key of an encrypted device: DEV:file:FILE, UUID:key:PASSPHRASE, all:...",
    ),
]
EngineOption = Annotated[Engine, typer.Option("--engine", help="What reads the guest.")]
BackingDirs = Annotated[
    list[Path] | None,
    typer.Option(
        "--backing-dir",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="A further folder that backing files may be in (IMGTOOL_BACKING_DIRS).",
    ),
]
OutputOption = Annotated[Output, typer.Option("-o", "--output", help="Form of the rows.")]
Human = Annotated[bool, typer.Option("-h", "--human", help="Sizes such as 1.5G in tables.")]
Parallel = Annotated[
    int, typer.Option("-P", "--parallel", metavar="N", min=1, max=64, help="Images at a time.")
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say which engine, why, and how long it took.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks and the engine's own log.")]

# Of the commands that write
Force = Annotated[
    list[Reason] | None,
    typer.Option(
        "--force",
        metavar="REASON",
        help="Give up the one guard that a refusal names so (repeatable); imgtool(1) lists them.",
    ),
]
Clone = Annotated[
    Path | None,
    typer.Option(
        "--clone", metavar="NEW", help="Leave the image alone; the result is a new overlay on it."
    ),
]
TmpDir = Annotated[
    Path | None,
    typer.Option("--tmp-dir", metavar="DIR", help="Where what is written is kept until the end."),
]
DryRun = Annotated[
    bool, typer.Option("-n", "--dry-run", help="Say what would be done, and do nothing.")
]
