"""LVM's metadata on physical volumes: volume groups, logical volumes, and where their bytes are.

Only linear volumes are mapped. Whatever else a group holds (mirrors, stripes, thin pools,
snapshots, caches, missing physical volumes, exported groups) raises `Unsupported`.

Source: lvm2, lib/format_text/layout.h and the text format as vgcfgbackup(8) writes it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker.fs.base import ReadFailed, Source
from imgtool.formats.lvm_uuid import with_dashes

_SECTOR = 512
_LABEL_SECTORS = 4
_LABEL = struct.Struct("<8sQII8s")
_AREA_HEADER = struct.Struct("<I16sIQQ")
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_LOCATION = struct.Struct("<QQII")
_IGNORED = 1
_LARGEST_TEXT = 8 << 20
_MOST_TOKENS = 2_000_000
_MOST_NESTED = 16
_MOST_VOLUMES = 1000  # each is looked at
_LONGEST_NUMBER = 20
_LARGEST = 1 << 60  # of a volume or a physical volume, in bytes
_CRC_SEED = 0xF597A6CF
_NAME = re.compile(r"(?!-|\.\.?\Z)[A-Za-z0-9_.+\-]{1,127}\Z")

_TOKEN = re.compile(
    r'\s+|\#[^\n]*|(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>-?\d+(?:\.\d+)?)'
    r"|(?P<name>[A-Za-z0-9_.+\-/]+)|(?P<mark>[{}\[\]=,])"
)


class Extent(NamedTuple):
    """A stretch of a logical volume: `length` bytes at `start` are at `offset` of `physical`."""

    start: int
    length: int
    physical: str
    offset: int


class LogicalVolume(NamedTuple):
    """A visible logical volume; `extents` ascend and cover it."""

    name: str
    uuid: str
    size: int
    extents: tuple[Extent, ...]


# What stands in LVM's text: words, lists of them, and sections of such.
Word: TypeAlias = str | int | float
Section: TypeAlias = dict[str, "Value"]
Value: TypeAlias = Word | list[Word] | Section


class PhysicalVolume(NamedTuple):
    """A physical volume; `device` is the guest's name of what it is on."""

    uuid: str
    device: str
    size: int


class VolumeGroup(NamedTuple):
    """A volume group, its volumes in the order of their names."""

    name: str
    uuid: str
    size: int
    physical: tuple[PhysicalVolume, ...]
    logical: tuple[LogicalVolume, ...]


def _checksum(data: bytes) -> int:
    return zlib.crc32(data, _CRC_SEED ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


# The text format


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = count = 0
    while at < len(text):
        matched = _TOKEN.match(text, at)
        if matched is None:
            raise ReadFailed("LVM metadata that cannot be parsed")
        at = matched.end()
        if matched.lastgroup:
            count += 1
            if count > _MOST_TOKENS:
                raise ReadFailed("LVM metadata of absurd size")
            yield matched.lastgroup, matched.group()


def _value(kind: str, word: str) -> Word:
    if kind == "string":
        return re.sub(r"\\(.)", r"\1", word[1:-1], flags=re.DOTALL)
    if kind == "number":
        if len(word) > _LONGEST_NUMBER:
            raise ReadFailed("LVM metadata with an absurd number")
        return float(word) if "." in word else int(word)
    raise ReadFailed("LVM metadata that cannot be parsed")


def _array(tokens: Iterator[tuple[str, str]]) -> list[Word]:
    values: list[Word] = []
    for kind, word in tokens:
        if word == "]" and kind == "mark":
            return values
        if not (kind == "mark" and word == ","):
            values.append(_value(kind, word))
    raise ReadFailed("LVM metadata that ends too early")


def parse_text(text: str) -> Section:
    """The sections and values of a text in LVM's configuration format."""
    tokens = _tokens(text.rstrip("\0"))
    root: Section = {}
    stack = [root]
    for kind, word in tokens:
        if kind == "mark" and word == "}" and len(stack) > 1:
            stack.pop()
            continue
        if kind not in ("name", "number"):
            raise ReadFailed("LVM metadata that cannot be parsed")
        then = next(tokens, ("mark", "}"))
        if then == ("mark", "{"):
            if len(stack) == _MOST_NESTED:
                raise ReadFailed("LVM metadata nested too deeply")
            section: Section = {}
            stack[-1][word] = section
            stack.append(section)
        elif then == ("mark", "="):
            value = next(tokens, ("mark", "}"))
            stack[-1][word] = _array(tokens) if value == ("mark", "[") else _value(*value)
        else:
            raise ReadFailed("LVM metadata that cannot be parsed")
    if len(stack) != 1:
        raise ReadFailed("LVM metadata that ends too early")
    return root


# What is on a physical volume


def _label(source: Source) -> tuple[str, list[tuple[int, int]]]:
    """The UUID of a physical volume, and its metadata areas as (offset, size)."""
    start = source.read(0, min(_LABEL_SECTORS * _SECTOR, source.size))
    for at in range(0, len(start) - _SECTOR + 1, _SECTOR):
        sector = start[at : at + _SECTOR]
        magic, number, crc, header, kind = _LABEL.unpack_from(sector)
        if magic != b"LABELONE" or kind != b"LVM2 001":
            continue
        if number != at // _SECTOR or crc != _checksum(sector[20:]) or not 32 <= header <= 400:
            raise ReadFailed("an LVM label whose checksum is wrong")
        uuid = sector[header : header + 32].decode("ascii", "replace")
        places: list[tuple[int, int]] = []
        at_list = header + 40
        for _ in range(2):  # the data areas, then the metadata areas
            places = []
            while at_list + 16 <= _SECTOR:
                offset, size = struct.unpack_from("<QQ", sector, at_list)
                at_list += 16
                if not offset:
                    break
                places.append((offset, size))
        return uuid, places
    raise ReadFailed("no LVM label")


def _texts(source: Source, areas: Sequence[tuple[int, int]]) -> Iterator[str]:
    for offset, size in areas[:4]:
        header = source.read(offset, _SECTOR)
        crc, magic, version, start, length = _AREA_HEADER.unpack_from(header)
        if magic != _AREA_MAGIC or version != 1 or crc != _checksum(header[4:]):
            raise ReadFailed("an LVM metadata area whose checksum is wrong")
        if start != offset or length != size:
            raise ReadFailed("an LVM metadata area that is not where it says")
        at, text_size, text_crc, flags = _LOCATION.unpack_from(header, _AREA_HEADER.size)
        if not at or flags & _IGNORED:
            continue
        if not _SECTOR <= at < length or text_size > min(_LARGEST_TEXT, length - _SECTOR):
            raise ReadFailed("LVM metadata outside of its area")
        first = min(text_size, length - at)
        text = source.read(offset + at, first)
        if first < text_size:  # the area is a ring, without its header
            text += source.read(offset + _SECTOR, text_size - first)
        if _checksum(text) != text_crc:
            raise ReadFailed("LVM metadata whose checksum is wrong")
        yield text.decode("utf-8", "replace")


# Volume groups


def _whole(section: Section, key: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or value < 0:
        raise ReadFailed(f"LVM metadata without {key}")
    return value


def _section(section: Section, key: str) -> Section:
    value = section.get(key, {})
    if not isinstance(value, dict):
        raise ReadFailed(f"LVM metadata without {key}")
    return value


def _sections(section: Section, key: str) -> Iterator[tuple[str, Section]]:
    """The sections in a section; there may be nothing else in it."""
    found = _section(section, key)
    for name in found:
        yield name, _section(found, name)


def _text(section: Section, key: str) -> str:
    value = section.get(key)
    if not isinstance(value, str):
        raise ReadFailed(f"LVM metadata without {key}")
    return value


def _flags(section: Section, key: str = "status") -> Sequence[Value]:
    value = section.get(key, [])
    return value if isinstance(value, list) else [value]


def _extents(
    name: str, volume: Section, unit: int, places: dict[str, tuple[str, int, int]]
) -> tuple[Extent, ...]:
    found = []
    expected = 0
    for number in range(1, _whole(volume, "segment_count") + 1):
        segment = _section(volume, f"segment{number}")
        kind = _text(segment, "type")
        stripes = segment.get("stripes")
        if kind != "striped" or segment.get("stripe_count") != 1 or not isinstance(stripes, list):
            raise Unsupported(f"the logical volume {name} is not linear ({kind})")
        start, count = _whole(segment, "start_extent"), _whole(segment, "extent_count")
        if len(stripes) != 2 or stripes[0] not in places or not isinstance(stripes[1], int):
            raise ReadFailed(f"the logical volume {name} lies on no known physical volume")
        device, first, most = places[str(stripes[0])]
        if max(first, (expected + count) * unit, most * unit) > _LARGEST:
            raise ReadFailed(f"the logical volume {name} is of absurd size")
        if start != expected or not count or stripes[1] < 0 or stripes[1] + count > most:
            raise ReadFailed(f"the segments of the logical volume {name} do not fit")
        found.append(Extent(start * unit, count * unit, device, first + stripes[1] * unit))
        expected += count
    return tuple(found)


def _group(name: str, group: Section, devices: dict[str, str]) -> VolumeGroup:
    if "EXPORTED" in _flags(group):
        raise Unsupported(f"the volume group {name} is exported")
    if not all(_NAME.match(each) for each in (name, *_section(group, "logical_volumes"))):
        raise Unsupported("a volume group or a logical volume has an impossible name")
    if len(_section(group, "logical_volumes")) > _MOST_VOLUMES:
        raise Unsupported(f"the volume group {name} has too many logical volumes")
    unit = _whole(group, "extent_size") * _SECTOR
    if not unit:
        raise ReadFailed("LVM metadata without extent_size")
    places: dict[str, tuple[str, int, int]] = {}
    physical = []
    for key, section in _sections(group, "physical_volumes"):
        uuid = _text(section, "id")
        device = devices.get(uuid.replace("-", ""))
        if device is None or "MISSING" in _flags(section, "flags"):
            raise Unsupported(f"a physical volume of the volume group {name} is missing")
        count = _whole(section, "pe_count")
        if count * unit > _LARGEST:
            raise ReadFailed(f"a physical volume of the volume group {name} is of absurd size")
        places[key] = (device, _whole(section, "pe_start") * _SECTOR, count)
        physical.append(PhysicalVolume(with_dashes(uuid), device, count * unit))
    logical = []
    for key, section in sorted(_sections(group, "logical_volumes")):
        status = list(_flags(section))
        status += _flags(section, "flags")
        if "VISIBLE" not in status or "ACTIVATION_SKIP" in status:
            raise Unsupported(f"the volume group {name} holds more than linear volumes ({key})")
        extents = _extents(f"{name}/{key}", section, unit, places)
        size = sum(extent.length for extent in extents)
        logical.append(LogicalVolume(key, with_dashes(_text(section, "id")), size, extents))
    return VolumeGroup(
        name=name,
        uuid=with_dashes(_text(group, "id")),
        size=sum(volume.size for volume in physical),
        physical=tuple(physical),
        logical=tuple(logical),
    )


def volume_groups(volumes: Sequence[tuple[str, Source]]) -> tuple[VolumeGroup, ...]:
    """The volume groups on physical volumes, given as (device, its bytes), by name.

    Raises `ReadFailed` for damaged metadata, `Unsupported` for what is not linear and complete.
    """
    devices: dict[str, str] = {}
    newest: dict[str, tuple[int, str, Section]] = {}
    used = set()
    for device, source in volumes:
        uuid, areas = _label(source)
        if uuid in devices:
            raise Unsupported(f"two physical volumes have the UUID {with_dashes(uuid)}")
        devices[uuid] = device
        for text in _texts(source, areas):
            parsed = parse_text(text)
            groups = [(k, v) for k, v in parsed.items() if isinstance(v, dict)]
            if len(groups) != 1:
                raise ReadFailed("LVM metadata without a volume group")
            name, group = groups[0]
            identity = _text(group, "id")
            known = newest.get(name)
            if known is not None and known[1] != identity:
                raise Unsupported(f"two volume groups have the name {name}")
            if known is None or _whole(group, "seqno") > known[0]:
                newest[name] = (_whole(group, "seqno"), identity, group)
    found = tuple(_group(name, newest[name][2], devices) for name in sorted(newest))
    used = {volume.device for group in found for volume in group.physical}
    if unused := [device for device in devices.values() if device not in used]:
        raise Unsupported(f"the physical volume {unused[0]} belongs to no volume group")
    return found
