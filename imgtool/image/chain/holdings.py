"""What a qcow2 image holds besides its content: what work on the image must not lose.

QEMU changes more than it is asked for. One that opens an image for a repair has not read its
snapshots, and where it writes the header anew then (it has a dirty bitmap to mark, or flags that
it does not know to clear) it writes that there are none. So what is there is read without QEMU,
before the work and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from imgtool.formats import qcow2
from imgtool.formats.qcow2_bitmaps import Bitmap, read_bitmaps
from imgtool.formats.qcow2_snapshots import read_snapshots
from imgtool.image.locking.held import way_to
from imgtool.image.locking.host_file import open_host_file
from imgtool.text import printable

if TYPE_CHECKING:
    from imgtool.image.chain.info import ImageInfo

_SHOWN = 5  # of many names
_NOTED = 256  # of the names that a record has room for


@dataclass(frozen=True)
class Held:
    """An internal snapshot; `disk_size` and `vm_state_size` in bytes, `time` in nanoseconds.

    One that is yet to be made has a name alone.
    """

    name: bytes
    id: bytes | None = None
    time: int = 0
    disk_size: int = 0
    vm_state_size: int = 0


@dataclass(frozen=True)
class Holdings:
    """What an image holds besides its content; sizes in bytes, names as they stand there.

    `made` is what it was made with: version, cluster size, width of its refcounts, features.
    `snapshots` and `bitmaps` are None where their table cannot be read.
    """

    virtual_size: int
    made: tuple[int, ...]
    backing: bytes | None = None
    backing_format: bytes | None = None
    data_file: bytes | None = None
    snapshots: tuple[Held, ...] | None = ()
    bitmaps: tuple[Bitmap, ...] | None = ()

    @property
    def more_than_content(self) -> bool:
        """Whether there is a snapshot or a bitmap, or a table of them that cannot be read."""
        return self.snapshots != () or self.bitmaps != ()

    def after_resize(self, size: int) -> Holdings:
        """The same with a disk of another size."""
        return replace(self, virtual_size=size)

    def on(self, backing: str | None, format: str | None) -> Holdings:
        """The same on another base, or on none."""
        return replace(
            self,
            backing=backing.encode(errors="surrogateescape") if backing else None,
            backing_format=format.encode() if format else None,
        )

    def with_snapshot(self, name: str) -> Holdings:
        """The same and a snapshot more."""
        return replace(self, snapshots=(*(self.snapshots or ()), Held(name.encode())))

    def after_revert(self, id: str) -> Holdings:
        """The same with the disk as large as it was at a snapshot."""
        there = [row.disk_size for row in self.snapshots or () if row.id == id.encode()]
        return self.after_resize(there[0]) if there else self

    def without_snapshot(self, id: str) -> Holdings:
        """The same without the snapshot that has this id."""
        rows = self.snapshots or ()
        return replace(self, snapshots=tuple(row for row in rows if row.id != id.encode()))

    def of_copy(self, bitmaps: tuple[Bitmap, ...]) -> Holdings:
        """What a copy of the content has, with these bitmaps."""
        return replace(self, snapshots=(), bitmaps=bitmaps)


class ReadAt:
    """A file to the parsers here, of which only `read(offset, length)` is there."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        self._at = {0: 0, 1: self._at, 2: self._size}[whence] + offset
        return self._at

    def read(self, length: int) -> bytes:
        """As of a file."""
        content = self._read(self._at, max(min(length, self._size - self._at), 0))
        self._at += len(content)
        return content


def read_holdings(file: BinaryIO) -> Holdings | None:
    """What a qcow2 image holds; None for what is none."""
    header = qcow2.read_header(file)
    if header is None:
        return None
    rows = read_snapshots(file, header)
    return Holdings(
        virtual_size=header.virtual_size,
        made=(header.version, header.cluster_size, header.refcount_bits, *header.features),
        backing=header.backing,
        backing_format=header.backing_format,
        data_file=header.data_file,
        snapshots=None
        if rows is None
        else tuple(
            Held(
                name=row.name,
                id=row.id,
                time=row.time,
                disk_size=header.virtual_size if row.disk_size is None else row.disk_size,
                vm_state_size=row.vm_state_size,
            )
            for row in rows
        ),
        bitmaps=read_bitmaps(file, header),
    )


def holdings_of(image: Path, format: str | None) -> Holdings | None:
    """What the image holds, as one of this format where that is known; None where nothing can be
    told: of a raw disk, on which a guest may have written any header, and of other formats."""
    if format not in (None, "qcow2") or not way_to(image).exists():
        return None
    with open_host_file(image) as file:
        return read_holdings(file)


def bitmaps_in(link: ImageInfo) -> tuple[Bitmap, ...]:
    """The dirty bitmaps of an image that hold, or that a killed writer has left as holding no more;
    those that cannot be read are QEMU's to complain of."""
    held = holdings_of(link.path, link.format)
    return (held.bitmaps or ()) if held is not None else ()


def left_out(snapshots: int, bitmaps: int) -> list[str]:
    """A line for a plan that does not keep so many of them; none where there is nothing to say."""
    counts = (snapshots, "internal snapshot"), (bitmaps, "dirty bitmap")
    what = [f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    return [f"leave out its {' and '.join(what)}"] if what else []


def lost(expected: Holdings, found: Holdings | None) -> list[str]:
    """What should be there and is not, in words for the user; empty where all is."""
    if found is None:
        return ["all of it"]
    missing = []
    if expected.snapshots is not None:
        there = set(found.snapshots or ())
        named = {row.name for row in there}
        missing += _names_of(
            "snapshot",
            [
                row.name
                for row in expected.snapshots
                if row not in there and (row.id is not None or row.name not in named)
            ],
        )
    if expected.bitmaps is not None:
        kept = set(found.bitmaps or ())
        missing += _names_of("bitmap", [row.name for row in expected.bitmaps if row not in kept])
    if (expected.backing, expected.backing_format) != (found.backing, found.backing_format):
        missing.append("the name of its base")
    if expected.data_file != found.data_file:
        missing.append("the name of its data file")
    if expected.virtual_size != found.virtual_size:
        missing.append(f"its size of {expected.virtual_size} bytes")
    if expected.made != found.made:
        missing.append("how it was made")
    return missing


def _names_of(what: str, names: Sequence[bytes]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(f"'{printable(name.decode(errors='replace'))}'" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}{'s' if len(names) > 1 else ''} {shown}{more}"]


def note_holdings(before: Holdings | None, after: Holdings | None) -> dict[str, object]:
    """For a record: what has to be there in the middle of the work too, before and after it.

    Of a bitmap, whether it was of no use already. Empty where there is nothing to lose.
    """
    if before is None or after is None or not before.more_than_content:
        return {}
    rows, maps = set(after.snapshots or ()), set(after.bitmaps or ())
    return {
        "holds": {
            "snapshots": [
                [(row.id or b"").hex(), row.name.hex()]
                for row in before.snapshots or ()
                if row in rows
            ][:_NOTED],
            "bitmaps": [
                [row.name.hex(), row.in_use] for row in before.bitmaps or () if row in maps
            ][:_NOTED],
        }
    }


@dataclass(frozen=True)
class Since:
    """What became of an image since a record was written, in words for the user: snapshots that are
    `gone`, and bitmaps that are `spoilt`: they hold no more, since their writer was killed."""

    gone: tuple[str, ...] = ()
    spoilt: tuple[str, ...] = ()


def since(note: object, found: Holdings | None) -> Since:
    """What is not as a record says that it has to be; nothing where it does not say."""
    if not isinstance(note, dict) or found is None:
        return Since()
    ids = {(row.id or b"").hex() for row in found.snapshots or ()}
    maps = {row.name.hex(): row.in_use for row in found.bitmaps or ()}
    try:
        rows = [bytes.fromhex(name) for id, name in note.get("snapshots", ()) if id not in ids]
        noted_maps = [(str(name), bool(in_use)) for name, in_use in note.get("bitmaps", ())]
        # While QEMU writes them down there are none that hold: one that is killed then leaves none.
        spoilt = [
            bytes.fromhex(name) for name, was in noted_maps if maps.get(name, True) and not was
        ]
    except (TypeError, ValueError):
        return Since()
    return Since(gone=tuple(_names_of("snapshot", rows)), spoilt=tuple(_names_of("bitmap", spoilt)))
