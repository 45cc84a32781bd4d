"""Hostile images that chance does not make: each asks for endless work, or for a wrong step."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imgtool.engines.direct.wire.refusals import Unsupported
from imgtool.engines.direct.worker import lvm
from imgtool.engines.direct.worker.fs.base import ReadFailed
from imgtool.engines.direct.worker.fs.iso.records import Record
from imgtool.engines.direct.worker.fs.iso.rock import posix
from imgtool.engines.direct.worker.fs.xfs.directory import inline_names
from tests.hostile import seeds
from tests.hostile.mutations import Mutant
from tests.hostile.reading import Outcome, read
from tests.hostile.seeds import MIB, Region, Seed


def _outcome(content: bytes, scratch: Path) -> Outcome:
    seed = Seed("crafted", content, (Region("all", 0, len(content)),))
    return read(Mutant(0, seed, content, ()), scratch / "one")


def test_directories_with_two_names_are_not_walked_for_ever(tmp_path: Path) -> None:
    image = tmp_path / "ext2"
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext2", image, "4M"], check=True)
    lines, path = [], ""
    for _ in range(26):
        lines += [f"mkdir {path}/a", f"link {path}/a {path}/b"]
        path += "/a"
    script = "\n".join([*lines, ""]).encode()
    subprocess.run(
        ["debugfs", "-w", "-f", "-", image], input=script, check=True, capture_output=True
    )
    outcome = _outcome(image.read_bytes(), tmp_path)
    assert outcome.defects == ()
    assert "two names" in outcome.reason


def _nested(image: Path, depth: int, files: int) -> bytes:
    """A filesystem with directories of long names inside each other, and files in the last."""
    options = ("-t", "ext2", "-b", "1024", "-N", "2000")
    subprocess.run(["mke2fs", "-q", "-F", *options, image, "8M"], check=True)
    name = "d" * 250
    lines = [f"mkdir {name}\ncd {name}"] * depth
    lines += [f"write /dev/null {number}" for number in range(files)]
    script = "\n".join([*lines, ""]).encode()
    subprocess.run(
        ["debugfs", "-w", "-f", "-", image], input=script, check=True, capture_output=True
    )
    return image.read_bytes()


def test_many_long_paths_are_told_in_several_parts(tmp_path: Path) -> None:
    outcome = _outcome(_nested(tmp_path / "ext2", 64, 600), tmp_path)
    assert (outcome.how, outcome.defects) == ("read", ())
    assert outcome.entries is not None
    assert len(outcome.entries) == 64 + 600 + 1  # lost+found


def test_paths_that_only_grow_are_not_followed_for_ever(tmp_path: Path) -> None:
    outcome = _outcome(_nested(tmp_path / "ext2", 1600, 3), tmp_path)
    assert outcome.defects == ()
    assert "a path of more than" in outcome.reason
    assert outcome.seconds < 15


def test_a_table_of_ntfs_without_its_bitmap_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "ntfs"
    image.write_bytes(bytes(4 * MIB))
    subprocess.run(["mkntfs", "-q", "-Q", "-F", "-c", "4096", image], check=True)
    content = bytearray(image.read_bytes())
    for cluster in struct.unpack_from("<QQ", content, 48):
        record = cluster * 4096
        at = record + struct.unpack_from("<H", content, record + 20)[0]
        while content[at] != 0xB0:
            at += struct.unpack_from("<I", content, at + 4)[0]
        content[at] = 0xC0
    outcome = _outcome(bytes(content), tmp_path)
    assert outcome.defects == ()
    assert "lacks an attribute" in outcome.reason


def test_a_volume_larger_than_its_disk_is_refused(tmp_path: Path) -> None:
    text = seeds._LVM_TEXT
    changed = text.replace("extent_size = 128\n", "extent_size = 999\n")
    assert len(changed) == len(text)
    image = bytearray(seeds._lvm(bytes(MIB)).content)
    image[4608 : 4608 + len(text)] = changed.encode()
    seeds._lvm_repair(image, 0)
    outcome = _outcome(bytes(image), tmp_path)
    assert outcome.defects == ()
    assert "larger than its disks" in outcome.reason


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 400 + ".5"])
def test_absurd_numbers_of_lvm_are_damage(number: str) -> None:
    with pytest.raises(ReadFailed):
        lvm.parse_text(f"group {{\nextent_size = {number}\n}}\n")


@pytest.mark.parametrize("name", ["..", "a/b", "-x"])
def test_impossible_names_of_lvm_are_refused(name: str) -> None:
    group: dict[str, Any] = {"extent_size": 1, "logical_volumes": {name: {}}}
    with pytest.raises(Unsupported):
        lvm._group("group", group, {})


def test_more_volumes_than_can_be_looked_at_are_refused() -> None:
    volumes: lvm.Section = {f"volume{number}": {} for number in range(40_000)}
    with pytest.raises(Unsupported):
        lvm._group("group", {"extent_size": 1, "logical_volumes": volumes}, {})


def _posix(**fields: bytes) -> Any:
    """A record whose system use area has these fields of Rock Ridge."""
    area = b"".join(
        name.encode() + bytes([len(payload) + 4, 1]) + payload for name, payload in fields.items()
    )
    source: Any = None  # nothing is continued elsewhere
    return posix(source, Record(0, 0, 0, 0, 0, b"A", area))


def _both(number: int) -> bytes:
    return number.to_bytes(4, "little") + number.to_bytes(4, "big")


@pytest.mark.parametrize("mode", [0, 0o50644, 0x180000 | 0o100644])
def test_a_file_of_no_kind_on_iso_is_refused(mode: int) -> None:
    described = _both(mode) + _both(1) + _both(0) + _both(0)
    with pytest.raises(Unsupported):
        _posix(PX=described, NM=b"\0name")


def test_an_impossible_device_number_on_iso_is_refused() -> None:
    described = _both(0o20644) + _both(1) + _both(0) + _both(0)
    with pytest.raises(Unsupported):
        _posix(PX=described, NM=b"\0name", PN=_both(0xFFFFFFFF) + _both(5))


@dataclass(frozen=True)
class _Features:
    has_file_types: bool = True


@pytest.mark.parametrize("name", [b".", b".."])
def test_a_name_that_means_a_directory_itself_is_damage_on_xfs(name: bytes) -> None:
    entry = bytes([len(name), 0, 0]) + name + b"\1" + (131).to_bytes(4, "big")
    features: Any = _Features()
    with pytest.raises(ReadFailed):
        inline_names(features, 128, b"\1\0" + (128).to_bytes(4, "big") + entry)
