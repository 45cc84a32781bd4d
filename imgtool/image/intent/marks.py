"""What a file that is worked on looks like from outside: to tell later whether it is still the same
file, and whether anybody has written to it since."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NotRequired, TypedDict

from imgtool.errors import ImgtoolError
from imgtool.formats import qcow2, vmdk
from imgtool.formats.qcow2_snapshots import read_snapshots
from imgtool.image.intent import devices
from imgtool.image.locking.held import real_path, way_to
from imgtool.image.locking.host_file import open_host_file


class Mark(TypedDict):
    """What a file looks like: `size` in bytes and `mtime` in nanoseconds, or, of a block device,
    what was `written` to it. An image has its `snapshots`, and as `parts` the other files that hold
    its data.
    """

    identity: list[int | str]
    size: NotRequired[int]
    mtime: NotRequired[int]
    written: NotRequired[list[str] | None]
    snapshots: NotRequired[str | None]
    parts: NotRequired[list[Mark]]


# A mark as a record has it, which anybody may have written.
Noted = Mapping[str, object]


def identity_of(image: Path) -> list[int | str]:
    """What tells an image from another one that has its name by now: of a file the inode and,
    where it has one, its generation; of a block device see `imgtool.image.intent.devices`.
    """
    status = way_to(image).stat()
    if not stat.S_ISBLK(status.st_mode):
        return [status.st_ino, *devices.generation(way_to(image))]
    return [*devices.identity(way_to(image))]


def is_same_file(noted: object, image: Path) -> bool:
    """Whether an identity that was noted is that of the file that is there now."""
    if not way_to(image).exists():
        return False
    return same_identity(noted, identity_of(image))


def same_identity(noted: object, now: list[int | str]) -> bool:
    """Whether an identity that was noted is the one of now."""
    if not isinstance(noted, list) or not noted:
        return False
    if isinstance(now[0], str):  # a device
        return devices.same_device(noted, [str(one) for one in now]) is True
    known = min(len(noted), len(now))  # another machine of a shared folder may see less
    return noted[:known] == now[:known]


def mark_of(image: Path, *, but_for: str | None = None) -> Mark:
    """The identity of an image, its size in bytes, its mtime in nanoseconds, and a checksum over
    the ids and names of its internal snapshots, without the one that is called `but_for`. Of a
    block device, which has neither size nor mtime, how much was written to it since it was
    attached. `parts` are the same of the other files that hold its data, where there are any."""
    mark = _mark_of_file(image)
    mark["snapshots"] = snapshots_of(image, but_for=but_for)
    if parts := [_mark_of_file(path) for path in _other_files(image)]:
        mark["parts"] = parts
    return mark


def _mark_of_file(path: Path) -> Mark:
    status = way_to(path).stat()
    identity = identity_of(path)
    if stat.S_ISBLK(status.st_mode):
        return {"identity": identity, "written": _written_to(path)}
    return {"identity": identity, "size": status.st_size, "mtime": status.st_mtime_ns}


def _other_files(image: Path) -> list[Path]:
    """The data file or the extents that an image names, where they are files or devices."""
    found: list[Path] = []
    with contextlib.suppress(OSError, ValueError, ImgtoolError), open_host_file(image) as file:
        header = qcow2.read_header(file)
        if header is not None:
            names = [header.data_file] if header.data_file else []
        else:
            names = list(vmdk.extent_names(file)) if _is_vmdk(file) else []
        for name in names:
            path = real_path(image).parent / os.fsdecode(name).removeprefix("file:")
            if not os.path.lexists(path):  # QEMU looks beside a link to the image
                path = image.absolute().parent / path.name
            if path.is_file() or path.is_block_device():
                found.append(path)
    return found


def names_extents(file: BinaryIO) -> bool:
    """Whether a file is a VMDK of which the data are in others."""
    return _is_vmdk(file) and bool(vmdk.extent_names(file))


def _is_vmdk(file: BinaryIO) -> bool:
    file.seek(0)
    start = file.read(512)
    return start.startswith(vmdk.SPARSE_MAGIC) or vmdk.looks_like_descriptor(start)


def _written_to(device: Path) -> list[str] | None:
    """Which boot this is, and how many sectors were written and discarded in it, by the kernel's
    count (Documentation/ABI/stable/sysfs-block); None where it keeps none. What a program that is
    gone has left in the cache is written first: the count would grow by it later."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        descriptor = os.open(way_to(device), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            number = os.fstat(descriptor).st_rdev
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        node = Path("/sys/dev/block", f"{os.major(number)}:{os.minor(number)}", "stat")
        counts = node.read_text().split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, counts[6], *counts[13:14]]
    return None


def snapshots_of(image: Path, *, but_for: str | None = None) -> str | None:
    """A checksum over the list of internal snapshots, without the one called `but_for`; None for
    an image that has no such list."""
    with contextlib.suppress(OSError, ValueError), open_host_file(image) as file:
        header = qcow2.read_header(file)
        rows = read_snapshots(file, header) if header is not None else None
        if rows is None:
            return None
        import hashlib  # seldom needed, and slow to load

        whole = hashlib.sha256()
        for row in rows:
            if but_for is None or row.name != os.fsencode(but_for):
                whole.update(repr((row.id, row.name)).encode())
        return whole.hexdigest()
    return None


def is_as_noted(noted: object, image: Path) -> bool:
    """Whether a file is the one that was noted, and nobody has written to it since."""
    if not isinstance(noted, dict) or not is_same_file(noted.get("identity"), image):
        return False
    now = mark_of(image)
    parts, now_parts = parts_of(noted), now.get("parts", [])
    return (
        noted.get("snapshots") == now.get("snapshots")
        and len(parts) == len(now_parts)
        and all(map(_is_the_same, [noted, *parts], [now, *now_parts]))
    )


def parts_of(mark: Noted) -> list[Noted]:
    """The marks that were noted of the other files that hold an image's data."""
    found = mark.get("parts")
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def _is_the_same(then: Noted, now: Mark) -> bool:
    """Whether a file is the same and was not written to between two marks."""
    if not same_identity(then.get("identity"), now["identity"]):
        return False
    if "written" in now:  # what is not counted can have been written to
        return now["written"] is not None and then.get("written") == now["written"]
    return then.get("size") == now["size"] and then.get("mtime") == now["mtime"]
