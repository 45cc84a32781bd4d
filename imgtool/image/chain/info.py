"""What one image file is, without opening any file that it names.

A qcow2 header tells it by itself. For the rest `qemu-img info` answers, under limits, after the
header was searched for names of files that QEMU would open as well. The format is probed here,
once; everything later passes it on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import ImageError, RefusedError
from imgtool.formats import lineage, qcow2, vhd, vmdk
from imgtool.formats.packed import packed_as, step_for_format, words_for
from imgtool.formats.qcow2_bitmaps import count_bitmaps
from imgtool.formats.qcow2_snapshots import read_snapshots
from imgtool.host import program_messages
from imgtool.image import headers
from imgtool.image.chain.ends import Short, Truncated, Unseen, cut_off, other_size, short_files
from imgtool.image.chain.qemu_info import Answer, ask_qemu, details_of
from imgtool.image.intent.intent_log import read_facts
from imgtool.image.locking.host_file import (
    Identity,
    file_node,
    node_driver,
    open_host_file,
    qemu_name,
)
from imgtool.image.locking.locks import in_use_for_writing
from imgtool.image.policy import AllowedDirs
from imgtool.text import printable, typed

FORMATS = ("raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx")
_LARGEST_FILE = 1 << 47  # twice that of the largest VHDX
_READ_IN_PART = ("qcow2", "vdi", "vmdk")  # QEMU opens them without their end
_OF_OTHERS = ("vpc", "vhdx", "vdi", "vmdk")

_MAX_SNAPSHOTS = 8192
_MAX_BITMAPS = 8192
_TABLES = 1 << 30  # more than the tables of any image

# What QEMU itself looks at to tell formats apart.
_PROBED_BYTES = 2048
_LUKS = b"LUKS\xba\xbe"


@dataclass(frozen=True)
class Snapshot:
    """An internal snapshot. `time` and `vm_clock` in nanoseconds (since 1970 UTC; of run time),
    `vm_state_size` in bytes: 0 for a snapshot of the disk alone."""

    id: str
    name: str
    time: int
    vm_state_size: int
    vm_clock: int


@dataclass(frozen=True)
class ImageInfo:
    """One file of a chain; sizes in bytes.

    `path` is absolute, as it was named. `driver` is QEMU's for the file below the format: file or
    host_device. `probed` says that the format was guessed from the content, `by_header` that QEMU
    was not asked whether it can open this. `backing` and
    `data_file` are the names as written in the header; `data_path` is where the latter is.
    `problems` are lines for the user; `found` is one that tells of a base which is not where the
    image that stands on it says, `unseen` what whoever reads the disk has to know. `inodes` are the
    files that were looked at, by `files`.
    """

    path: Path
    format: str
    virtual_size: int
    actual_size: int
    driver: str = "file"
    probed: bool = False
    by_header: bool = False
    cluster_size: int | None = None
    compat: str | None = None
    encrypted: bool = False
    dirty: bool = False
    corrupt: bool = False
    backing: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_path: Path | None = None
    extents: tuple[Path, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    problems: tuple[str, ...] = ()
    found: str | None = None
    unseen: Unseen | None = None
    inodes: tuple[tuple[Path, Identity], ...] = field(default=(), repr=False, compare=False)

    @property
    def is_truncated(self) -> bool:
        """Whether QEMU would read zeros where the file has ended: see `chain.lost`."""
        return self.unseen is not None and self.unseen.what == "truncated"

    @property
    def files(self) -> tuple[Path, ...]:
        """The file itself and those that hold its data; backing files are links of their own."""
        return (self.path, *([self.data_path] if self.data_path else []), *self.extents)


def _vmdk_extents(file: BinaryIO, path: Path, places: AllowedDirs) -> tuple[Path, ...]:
    extents = []
    for name in vmdk.extent_names(file):
        extent = places.follow(os.fsdecode(name), of=path, role="extent")
        with open_host_file(extent, within=places) as part:
            if vmdk.has_descriptor_inside(part):
                raise RefusedError(
                    f"its extent '{printable(os.fsdecode(name))}' names further files",
                    subject=printable(path),
                )
        extents.append(extent)
    return tuple(extents)


def _snapshots(answer: Answer) -> tuple[Snapshot, ...]:
    return tuple(
        Snapshot(
            id=row["id"],
            name=row["name"],
            time=row["date-sec"] * 10**9 + row["date-nsec"],
            vm_state_size=row["vm-state-size"],
            vm_clock=row["vm-clock-sec"] * 10**9 + row["vm-clock-nsec"],
        )
        for row in answer.get("snapshots", ())
    )


def _check_snapshot_table(file: BinaryIO, path: Path, header: qcow2.Qcow2Header) -> None:
    """QEMU takes zeros past the end for snapshots, and many seconds to list very many of them."""
    if header.snapshots > _MAX_SNAPSHOTS:
        raise ImageError(
            f"damaged: {header.snapshots} snapshots, more than {_MAX_SNAPSHOTS}",
            subject=printable(path),
        )
    if header.snapshots_end > file.seek(0, os.SEEK_END):
        raise ImageError(
            "damaged: its table of snapshots reaches past its end", subject=printable(path)
        )


def _check_bitmaps(path: Path, header: qcow2.Qcow2Header) -> None:
    """QEMU compares each with all others: for as many as it takes it needs more than a minute."""
    if (count := count_bitmaps(header)) > _MAX_BITMAPS:
        raise ImageError(
            f"damaged: {count} dirty bitmaps, more than {_MAX_BITMAPS}",
            subject=printable(path),
            hint=program_messages.step_for_bitmaps(typed(path)),
        )


def _check_complete(file: BinaryIO, path: Path, header: qcow2.Qcow2Header) -> tuple[str, ...]:
    length = file.seek(0, os.SEEK_END)
    needed = qcow2.size_needed(file, header)
    if needed <= length:
        return ()
    whole = -(-needed // header.cluster_size) * header.cluster_size
    most = length + (1 + header.snapshots) * header.virtual_size + _TABLES
    return _refuse_short(path, Short(path, length, whole), most)


def _refuse_short(image: Path, file: Short, most: int = _LARGEST_FILE) -> tuple[str, ...]:
    """Raise `ImageError` for a file of an image that is too short, and can have had up to `most`
    bytes; a line for the user where it is not for good."""
    # A running QEMU counts a cluster as used before the file has grown to hold it.
    what = f"the file is {file.length} bytes long but uses {file.needed}"
    if in_use_for_writing(file.path) is not None:
        return (f"{printable(file.path)}: {what}; it is being written",)
    if read_facts(image):
        return (f"{printable(file.path)}: {what}; work on it was interrupted",)
    if file.needed > most:
        raise ImageError(
            "its header is damaged: it names a place far beyond the end of the file",
            subject=printable(file.path),
            hint="look for another copy of it",
        )
    unseen = Unseen(
        "truncated",
        f"truncated: the file is {file.length} bytes long, what it holds reaches to {file.needed}",
        f"to read what is left, lengthen a copy: truncate -s {file.needed} COPY",
        file.needed,
        file.length,
    )
    raise Truncated(file.path, unseen)


def _problems(path: Path, *, corrupt: bool, dirty: bool) -> tuple[str, ...]:
    problems = []
    if corrupt:
        problems.append("marked corrupt by QEMU")
    if dirty:
        problems.append("not closed properly: in use, or its QEMU crashed")
    return tuple(f"{printable(path)}: {problem}" for problem in problems)


def _told_by_header(
    file: BinaryIO, path: Path, header: qcow2.Qcow2Header, driver: str, probed: bool
) -> ImageInfo | None:
    """The image, by its header alone; None where only QEMU knows what to make of it."""
    if header.has_data_file or header.encrypted or not header.sound or not header.virtual_size:
        return None
    try:
        # QEMU writes both in the encoding of the system; so what is not text is QEMU's to judge.
        backing = None if header.backing is None else header.backing.decode()
        named = None if header.backing_format is None else header.backing_format.decode()
    except UnicodeDecodeError:
        return None
    rows = read_snapshots(file, header)
    if rows is None or (named is not None and named not in FORMATS):
        return None
    problems = _problems(path, corrupt=header.corrupt, dirty=header.dirty)
    return ImageInfo(
        path=path,
        format="qcow2",
        virtual_size=header.virtual_size,
        actual_size=os.fstat(file.fileno()).st_blocks * 512,
        driver=driver,
        probed=probed,
        by_header=True,
        cluster_size=header.cluster_size,
        compat="1.1" if header.version == 3 else "0.10",
        dirty=header.dirty,
        corrupt=header.corrupt,
        backing=backing,
        backing_format=named,
        snapshots=tuple(
            Snapshot(
                id=row.id.decode(errors="replace"),
                name=row.name.decode(errors="replace"),
                time=row.time,
                vm_state_size=row.vm_state_size,
                vm_clock=row.vm_clock,
            )
            for row in rows
        ),
        problems=problems + _check_complete(file, path, header),
    )


def probe(
    path: str | Path,
    *,
    format: str | None = None,
    places: AllowedDirs | None = None,
    backing_dirs: Sequence[str | Path] = (),
    by_header: bool = False,
    below: bool = False,
    partial: bool = False,
) -> ImageInfo:
    """What the file at `path` is; `format` given means that the content is not asked.

    With `by_header` a qcow2 header is believed: whether QEMU opens the image is left to the caller.
    `below` is what a header named, and so has to be in `places`. With `partial` an image that was
    cut off is given too, where what is left of it can be told (`imgtool.image.chain.lost`).

    Neither backing files nor, before they are known to lie in `places` (by default those around
    the image and `backing_dirs`), data files and extents are opened. Raises `ImageError` for what
    is no image that can be read, `RefusedError` for a header that points elsewhere.
    """
    path = Path(path).absolute()
    if format is not None and format not in FORMATS:
        raise ImageError(
            f"format '{printable(format)}' is not supported",
            subject=printable(path),
            hint=f"supported are {', '.join(FORMATS)}",
        )
    places = places or AllowedDirs.around(path, backing_dirs)
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open_host_file(path, within=places if below else None))
        if file.seek(0, os.SEEK_END) == 0:
            raise ImageError("empty file", subject=printable(path))
        try:
            link = _probe_open_file(file, path, format, places, by_header)
        except Truncated as error:
            if not partial:
                raise
            link = _probe_open_file(file, path, format, places, by_header=False, whole=False)
            if link.format not in _READ_IN_PART or len(link.files) > 1 or link.backing is not None:
                raise
            line = error.unseen.line(path)
            link = replace(link, unseen=error.unseen, problems=(*link.problems, line))
        files = [opened.enter_context(open_host_file(p, within=places)) for p in link.files[1:]]
        status = [os.fstat(one.fileno()) for one in (file, *files)]
        inodes = tuple(zip(link.files, ((s.st_dev, s.st_ino) for s in status), strict=True))
        return replace(link, inodes=inodes)


def _refuse_unreadable(
    file: BinaryIO, path: Path, format: str | None, known: str | None
) -> vhd.Footer | None:
    """Raise `ImageError` for a VHD, VHDX, VDI or VMDK that QEMU would read wrong, or would refuse
    in words that say nothing. Gives its footer, if it is a VHD."""
    footer = vhd.read_footer(file) if known in (None, "vpc") else None
    found = lineage.read(file) if footer is not None or known in _OF_OTHERS else None
    if found is None or format not in (None, found.format):
        return footer
    if format is None and footer is not None and footer.offset and path.suffix.lower() == ".raw":
        # A guest can write any last sector to its raw disk; the name says what to believe.
        raise RefusedError(
            "it is named .raw, but ends as a fixed VHD does",
            subject=printable(path),
            hint="say which it is: --format raw or --format vpc",
        )
    lineage.refuse_differencing(path, found)
    return footer


def _answer(file: BinaryIO, path: Path, description: str, format: str | None) -> Answer:
    """`ask_qemu`, with the reason where QEMU has none that helps."""
    try:
        return ask_qemu(path, description, format)
    except ImageError as error:
        sparse = vmdk.read_sparse(file) if format in (None, "vmdk") else None
        descriptor = vmdk.read_descriptor(file)
        if sparse is not None and (descriptor is None or not descriptor.kind):
            name, folder = shlex.quote(printable(path.name)), shlex.quote(printable(path.parent))
            raise ImageError(
                "it is one of the files of a VMDK, and does not say itself what it is a part of",
                subject=printable(path),
                hint=f"give the text file that names it: grep -l {name} {folder}/*.vmdk",
            ) from error
        raise


def _probe_open_file(
    file: BinaryIO,
    path: Path,
    format: str | None,
    places: AllowedDirs,
    by_header: bool,
    whole: bool = True,
) -> ImageInfo:
    file.seek(0)
    start = file.read(_PROBED_BYTES)
    driver = "host_device" if stat.S_ISBLK(os.fstat(file.fileno()).st_mode) else "file"
    # By its own name: QEMU would look for extents in the folder of a link.
    description, probed_as = qemu_name(path), format
    header, data_file, data_path = None, None, None
    extents: tuple[Path, ...] = ()
    if format in (None, "qcow2"):
        header = qcow2.read_header(file)
    if header is not None:
        _check_snapshot_table(file, path, header)
        _check_bitmaps(path, header)
        if by_header and (told := _told_by_header(file, path, header, driver, format is None)):
            return told
    if header is not None and header.data_file is not None:
        data_file = os.fsdecode(header.data_file)
        data_path = places.follow(data_file, of=path, role="data file")
        open_host_file(data_path, within=places).close()
        node = {
            "driver": "qcow2",
            "file": file_node(path, driver),
            "data-file": file_node(data_path, node_driver(data_path)),
        }
        # Given as a node, because QEMU takes a relative data file from the current folder.
        description, probed_as = "json:" + json.dumps(node), None
    if format == "vmdk" or (
        format is None
        and (start.startswith(vmdk.SPARSE_MAGIC) or vmdk.looks_like_descriptor(start))
    ):
        extents = _vmdk_extents(file, path, places)

    footer: vhd.Footer | None = None
    problems: tuple[str, ...] = ()
    if format in (None, *_OF_OTHERS):
        known = format or headers.format_of(start)
        footer = _refuse_unreadable(file, path, format, known)
        if footer is not None and footer.offset:
            known = probed_as = "vpc"  # QEMU looks at the beginning alone, which is the disk's
        for short in short_files(file, path, known or "raw", extents) if whole else ():
            problems += _refuse_short(path, short)
    if format is None and start.startswith(_LUKS):
        probed_as = "raw"  # what is encrypted is the content; QEMU would want to decrypt it itself
    answer = _answer(file, path, description, probed_as)
    found = answer["format"]
    if format is None and found == "raw" and (kind := packed_as(start)) is not None:
        what, step = words_for(kind, start, path)
        raise ImageError(what, subject=printable(path), hint=step)
    if found not in FORMATS:
        raise ImageError(
            f"format '{printable(found)}' is not supported",
            subject=printable(path),
            hint=step_for_format(found, path),
        )
    if answer["virtual-size"] <= 0:
        raise ImageError("an image of a disk of no size", subject=printable(path))
    specific = details_of(answer)
    corrupt = bool(specific.get("corrupt", False))
    problems += _problems(path, corrupt=corrupt, dirty=bool(answer.get("dirty-flag")))
    if found == "qcow2" and header is not None and whole:
        problems += _check_complete(file, path, header)
    unseen = None
    if found == "vpc" and footer is not None:
        unseen = other_size(path, footer, answer["virtual-size"])
    elif found == "raw":
        unseen = cut_off(start, file.seek(0, os.SEEK_END))
    return ImageInfo(
        path=path,
        format=found,
        virtual_size=answer["virtual-size"],
        actual_size=answer.get("actual-size", 0),
        driver=driver,
        probed=format is None,
        cluster_size=answer.get("cluster-size"),
        compat=specific.get("compat"),
        encrypted=bool(answer.get("encrypted", False)),
        dirty=bool(answer.get("dirty-flag", False)),
        corrupt=corrupt,
        backing=answer.get("backing-filename"),
        backing_format=answer.get("backing-filename-format"),
        data_file=data_file,
        data_path=data_path,
        extents=extents if found == "vmdk" else (),
        snapshots=_snapshots(answer),
        problems=problems if unseen is None else (*problems, unseen.line(path)),
        unseen=unseen,
    )
