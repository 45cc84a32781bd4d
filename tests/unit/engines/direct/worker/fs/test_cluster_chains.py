"""FAT and exFAT: a chain of clusters that is damaged is an error for its file, and for no other."""

from __future__ import annotations

import os
import struct
import subprocess
from functools import partial
from pathlib import Path

import pytest

from imgtool import open_guest
from imgtool.engines.direct.worker.fs import cluster_users
from imgtool.engines.direct.worker.fs.base import Filesystem, ReadFailed
from imgtool.engines.direct.worker.fs.cluster_chains import END_OF_CHAIN, Chain, follow
from imgtool.engines.direct.worker.fs.cluster_users import Owners
from imgtool.engines.direct.worker.fs.exfat.reader import ExfatFilesystem
from imgtool.engines.direct.worker.fs.fat.reader import FatFilesystem
from imgtool.host.process import environment
from imgtool.transfer.copy_out import Report, copy_out
from tests.support.exfat_images import ENTRY, Exfat

CLUSTER = 4096
WHOLE = os.urandom(4 * CLUSTER)
CIRCLE = "runs in a circle"
SHARED = "in use by another file"
SHORT = "too short"
BROKEN = "is broken"


class Bytes:
    """A volume in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise ReadFailed("past the end")
        return self.data[offset : offset + length]


@pytest.mark.parametrize(
    ("table", "wanted", "pieces", "problem"),
    [
        ({2: 3, 3: 4}, 3, [(2, 3)], None),
        ({2: 3, 3: 4, 4: 5}, 2, [(2, 2)], None),  # longer than the file
        ({2: 3}, 3, [(2, 2)], SHORT),
        ({2: 3, 3: 0}, 3, [(2, 2)], BROKEN),
        ({2: 3, 3: 99}, 3, [(2, 2)], BROKEN),
        ({2: 2}, 3, [(2, 1)], CIRCLE),
        ({2: 7, 7: 8, 8: 2}, 4, [(2, 1), (7, 2)], CIRCLE),
        ({5: 6, 6: 7, 7: 4, 4: 5}, 6, [(5, 3), (4, 1)], CIRCLE),
        ({5: 6, 6: 7, 7: 6}, 4, [(5, 3)], CIRCLE),
        ({2: 3, 3: 2}, 1 << 40, [(2, 2)], CIRCLE),
    ],
)
def test_a_chain_is_followed_as_far_as_it_is_sound(table, wanted, pieces, problem) -> None:
    found = follow(2 if 2 in table else 5, wanted, 20, lambda at: table.get(at, END_OF_CHAIN))
    assert found.pieces == pieces
    assert (found.problem or "").endswith(problem or "")
    assert (found.problem is None) == (problem is None)


def test_chain_is_sound_up_to_a_cluster_of_another_file() -> None:
    owners = Owners(20)
    one, other = Chain([(2, 3), (9, 2)], None), Chain([(12, 1), (10, 1)], None)
    owners.claim(one.pieces)
    assert owners.check(one) == one
    owners.claim(other.pieces)
    assert owners.check(one).pieces == [(2, 3), (9, 1)]
    assert owners.check(other).pieces == [(12, 1)]
    assert SHARED in str(owners.check(other).problem)


@pytest.fixture(autouse=True, params=["of one file", "of the volume"])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a file is looked at alone first, as in a volume with many names."""
    monkeypatch.setattr(cluster_users, "_FEW_NAMES", 0)
    monkeypatch.setattr(cluster_users, "_FEW_FILES", 99 if request.param == "of one file" else 0)
    return str(request.param)


class Fat:
    """A volume with `first`, `second`, `third` of four clusters each, side by side, and a folder
    with a file.
    """

    def __init__(self, path: Path, bits: int) -> None:
        size = {12: 4, 16: 40, 32: 300}[bits] << 20
        with path.open("wb") as file:
            file.truncate(size)
        sectors = str(CLUSTER // 512)
        env = environment({"MTOOLS_SKIP_CHECK": "1"})
        words = ["mkfs.vfat", "-F", str(bits), "-s", sectors, str(path)]
        subprocess.run(words, check=True, env=env, capture_output=True)
        source = path.with_suffix(".source")
        (source / "folder").mkdir(parents=True)
        for name in ("first", "second", "third"):
            (source / name).write_bytes(WHOLE)
        (source / "folder/inner").write_bytes(WHOLE)
        words = ["mcopy", "-s", "-i", str(path), *(str(source / name) for name in _ORDER), "::/"]
        subprocess.run(words, check=True, env=env, capture_output=True)
        self.bits = bits
        self.path = path
        self.size = size
        self.head = path.open("rb").read(4 << 20)

    @property
    def table(self) -> int:
        return int(struct.unpack_from("<H", self.head, 14)[0]) * 512

    def start(self, name: bytes) -> int:
        """The first cluster of a file in the root directory."""
        at = self.head.index(name.upper().ljust(11))
        return int.from_bytes(self.head[at + 26 : at + 28], "little")

    def linked(self, cluster: int, following: int) -> bytes:
        """The volume with one entry of its table changed."""
        head = bytearray(self.head)
        if self.bits == 12:
            at = self.table + cluster * 3 // 2
            (pair,) = struct.unpack_from("<H", head, at)
            pair = pair & 0xF | following << 4 if cluster & 1 else pair & 0xF000 | following
            struct.pack_into("<H", head, at, pair)
        else:
            width = self.bits // 8
            at = self.table + cluster * width
            head[at : at + width] = following.to_bytes(width, "little")
        return bytes(head)


_ORDER = ("first", "second", "third", "folder")


@pytest.fixture(scope="module", params=[12, 16, 32])
def fat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fat:
    return Fat(tmp_path_factory.mktemp("fat") / "volume.img", request.param)


class Padded(Bytes):
    """The head of a volume, and zeros after it."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length].ljust(length, b"\0")


def _contents(filesystem: Filesystem, names: tuple[str, ...] = _ORDER) -> dict[str, object]:
    """What is read of each file, and how it ends."""
    found: dict[str, object] = {}
    listed = dict(filesystem.names(filesystem.root))
    for name in names:
        inode = listed[name.encode()]
        if name == "folder":
            inode = dict(filesystem.names(inode))[b"inner"]
        data = b""
        try:
            while part := filesystem.read(inode, len(data), 1 << 20):
                data += part
            found[name] = data == WHOLE
        except ReadFailed as error:
            assert WHOLE.startswith(data)
            found[name] = (len(data) // CLUSTER, str(error))
    return found


SOUND = dict.fromkeys(_ORDER, True)


def _damaged(name: str, clusters: int, problem: str) -> dict[str, object]:
    reason = f"the file's chain of clusters {problem}"
    return {**SOUND, name: (clusters, reason)}


def test_sound_chains_are_read_to_their_end(fat: Fat) -> None:
    assert _contents(FatFilesystem.open(Padded(fat.head, fat.size))) == SOUND


@pytest.mark.parametrize(
    ("at", "to", "clusters", "problem"),
    [
        (2, 1, 3, CIRCLE),
        (0, 0, 1, CIRCLE),
        (1, None, 2, BROKEN),
        (2, -1, 3, "is too short"),
    ],
)
def test_a_damaged_chain_on_fat_is_an_error_for_its_file(fat: Fat, at, to, clusters, problem):
    first = fat.start(b"first")
    end = {12: 0xFFF, 16: 0xFFFF, 32: 0x0FFFFFFF}[fat.bits]
    following = 0 if to is None else end if to < 0 else first + to
    found = FatFilesystem.open(Padded(fat.linked(first + at, following), fat.size))
    assert _contents(found) == _damaged("first", clusters, problem)


def test_circle_after_the_end_of_the_file_changes_nothing(fat: Fat) -> None:
    first = fat.start(b"first")
    found = FatFilesystem.open(Padded(fat.linked(first + 3, first), fat.size))
    assert _contents(found) == SOUND


def test_fat_files_that_share_a_cluster_are_errors_from_there(fat: Fat) -> None:
    first, second = fat.start(b"first"), fat.start(b"second")
    found = FatFilesystem.open(Padded(fat.linked(first, second + 1), fat.size))
    reason = f"its clusters are {SHARED}"
    wrong = {"first": (1, reason), "second": (1, reason)}
    for _ in range(2):  # whichever is read first
        assert _contents(found) == {**SOUND, **wrong}
        assert _contents(found, ("second", "first")) == wrong


def test_a_chain_on_fat_that_enters_a_folder_is_an_error(fat: Fat) -> None:
    first, folder = fat.start(b"first"), fat.start(b"folder")
    found = FatFilesystem.open(Padded(fat.linked(first + 2, folder), fat.size))
    assert _contents(found) == {**SOUND, "first": (3, f"its clusters are {SHARED}")}


def test_two_entries_with_one_chain_on_fat_are_errors(fat: Fat) -> None:
    head = bytearray(fat.head)
    at = fat.head.index(b"SECOND".ljust(11)) + 26
    head[at : at + 2] = fat.start(b"first").to_bytes(2, "little")
    reason = f"its clusters are {SHARED}"
    wrong = {"first": (0, reason), "second": (0, reason)}
    found = FatFilesystem.open(Padded(bytes(head), fat.size))
    assert _contents(found) == {**SOUND, **wrong}


def test_volumes_with_too_many_files_have_no_list_of_owners(fat, monkeypatch) -> None:
    monkeypatch.setattr(cluster_users, "MOST_NAMES", 2)
    first, second = fat.start(b"first"), fat.start(b"second")
    found = FatFilesystem.open(Padded(fat.linked(first + 2, first), fat.size))
    assert _contents(found) == _damaged("first", 3, CIRCLE)
    found = FatFilesystem.open(Padded(fat.linked(first, second), fat.size))
    assert _contents(found, ("second", "third", "folder")) == dict.fromkeys(
        ("second", "third", "folder"), True
    )


@pytest.fixture(scope="module")
def exfat(tmp_path_factory: pytest.TempPathFactory) -> Exfat:
    volume = Exfat(tmp_path_factory.mktemp("exfat") / "volume.img", 4 << 20, CLUSTER)
    volume.fill({"chained": WHOLE, "plain": WHOLE, "folder": {"inner": WHOLE}})
    return volume


_EXFAT = ("chained", "plain", "folder")


def _start(volume: Exfat, name: str) -> int:
    name_entry = volume.image.index(name.encode("utf-16-le")) - 2
    return int.from_bytes(volume.image[name_entry - 12 : name_entry - 8], "little")


def _linked(volume: Exfat, cluster: int, following: int) -> Bytes:
    image = bytearray(volume.image)
    struct.pack_into("<I", image, volume.table + cluster * ENTRY // 8, following)
    return Bytes(bytes(image))


@pytest.mark.parametrize(
    ("at", "to", "clusters", "problem"),
    [
        (2, 0, 2, "the file's chain of clusters runs in a circle"),
        (2, None, 2, f"its clusters are {SHARED}"),
    ],
)
def test_a_damaged_chain_on_exfat_is_an_error_for_its_file(exfat, at, to, clusters, problem):
    first, plain = _start(exfat, "chained"), _start(exfat, "plain")
    source = _linked(exfat, first + at, plain if to is None else first + to)
    wrong: dict[str, object] = {"chained": (clusters, problem)}
    if to is None:
        wrong["plain"] = (0, problem)
    sound = dict.fromkeys(_EXFAT, True)
    assert _contents(ExfatFilesystem.open(source), _EXFAT) == {**sound, **wrong}


def test_tree_goes_on_and_what_precedes_a_circle_is_kept(fat: Fat, tmp_path) -> None:
    first = fat.start(b"first")
    image = tmp_path / "disk.img"
    image.write_bytes(fat.linked(first + 2, first + 1))
    os.truncate(image, fat.size)
    said: list[tuple[bytes, str]] = []
    report = Report(lambda path, line: said.append((path, line)), lambda path, line: None)
    with open_guest(image, engine="direct") as guest:
        names = [entry.name for entry in guest.walk("/", checksum="md5", on_problem=report.problem)]
        assert sorted(names) == [b"first", b"folder", b"inner", b"second", b"third"]
        assert said == [(b"/first", "the file's chain of clusters runs in a circle")]
        copy_out(guest, "/", tmp_path, report)
        assert not (tmp_path / "first").exists()
        assert (tmp_path / "second").read_bytes() == WHOLE
        copy_out(guest, "/first", tmp_path, report, keep_partial=True)
    assert (tmp_path / "first").read_bytes() == WHOLE[: 3 * CLUSTER]


def test_files_with_one_long_chain_end_the_search_for_owners() -> None:
    owners = Owners(20)
    for _ in range(4):
        assert not owners.is_futile
        owners.claim([(2, 10)])
    owners.claim([(2, 10)])
    assert owners.is_futile


def test_sound_files_are_read_without_a_look_at_all_others(fat, exfat, look, monkeypatch) -> None:
    for found, names in (
        (FatFilesystem.open(Padded(fat.head, fat.size)), tuple(SOUND)),
        (ExfatFilesystem.open(Bytes(exfat.image)), _EXFAT),
    ):
        surveyed: list[Filesystem] = []
        monkeypatch.setattr(found._sharing, "_survey", partial(surveyed.append, found))
        assert _contents(found, names) == dict.fromkeys(names, True)
        assert surveyed == ([] if look == "of one file" else [found])


def test_upper_bits_of_fat32_lead_nowhere_else(fat: Fat) -> None:
    if fat.bits != 32:
        pytest.skip("only FAT32 has them")
    first, second = fat.start(b"first"), fat.start(b"second")
    found = FatFilesystem.open(Padded(fat.linked(first, 0xF0000000 | second + 1), fat.size))
    reason = f"its clusters are {SHARED}"
    assert _contents(found) == {**SOUND, "first": (1, reason), "second": (1, reason)}
