"""Damaged directories and files: what precedes and follows the damage is given, with the error."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from imgtool import open_guest
from imgtool.engines.direct.parent.responses import Contents
from imgtool.engines.direct.worker.fs.base import Node, ReadFailed
from imgtool.engines.direct.worker.tree import Found, InodeRef
from imgtool.engines.direct.worker.tree_files import pieces
from imgtool.errors import EngineError
from imgtool.host.process import environment
from imgtool.transfer.copy_out import Report, copy_out, tar_out

BLOCK = 1024
NAMES = [f"name-{number:03}".encode() for number in range(200)]  # in several blocks
BAD_ENTRY = "a directory entry is damaged"


class Lines:
    """What was said, as it was said."""

    def __init__(self) -> None:
        self.problems: list[tuple[bytes, str]] = []
        self.report = Report(self.problem, lambda path, line: None)

    def problem(self, path: bytes, line: str) -> None:
        self.problems.append((path, line))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext2 without checksums, with a directory of several blocks."""
    folder = tmp_path_factory.mktemp("damaged")
    root = folder / "root"
    (root / "many").mkdir(parents=True)
    for name in NAMES:
        (root / "many" / name.decode()).write_bytes(name)
    (root / "beside").write_bytes(b"beside")
    (root / "mapped").write_bytes(os.urandom(300 * BLOCK))  # 12 blocks, and an indirect one
    image = folder / "sound.img"
    words = ("mke2fs", "-q", "-t", "ext2", "-b", str(BLOCK), "-O", "^dir_index", "-d", root, image)
    subprocess.run([*words, "8M"], check=True, env=environment(), capture_output=True)
    return image


def _blocks(image: Path, path: str) -> list[int]:
    words = ("debugfs", "-R", f"blocks {path}", image)
    said = subprocess.run(words, check=True, env=environment(), capture_output=True).stdout
    return [int(word) for word in said.split()]


def _changed(sound: Path, image: Path, at: int, data: bytes) -> Path:
    raw = bytearray(sound.read_bytes())
    raw[at : at + len(data)] = data
    image.write_bytes(raw)
    return image


def _entries(sound: Path) -> list[list[tuple[int, bytes]]]:
    """The places and names of the entries of each block of the directory."""
    raw = sound.read_bytes()
    found = []
    for block in _blocks(sound, "/many"):
        at, entries = block * BLOCK, []
        while at < (block + 1) * BLOCK:
            length, name = struct.unpack_from("<HB", raw, at + 4)
            entries.append((at, raw[at + 8 : at + 8 + name]))
            at += length
        found.append(entries)
    return found


def _listed(image: Path) -> tuple[list[bytes], list[tuple[bytes, str]]]:
    """What `ls` and `ls -R` list of the directory, and the problems; both say the same."""
    lines, deep = Lines(), Lines()
    with open_guest(image, engine="direct") as guest:
        names = [entry.name for entry in guest.entries("/many", on_problem=lines.problem)]
        walked = [entry.path for entry in guest.walk("/", on_problem=deep.problem)]
        assert [path[6:] for path in walked if path.startswith(b"/many/")] == names
        assert deep.problems == lines.problems
        assert b"/beside" in walked
        for name in names:
            assert guest.read_bytes(b"/many/" + name) == name
        if lines.problems:
            with pytest.raises(EngineError):
                list(guest.entries("/many"))
    return names, lines.problems


def test_a_sound_directory_has_all_of_its_names(sound: Path) -> None:
    assert _listed(sound) == (NAMES, [])


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"\xff\xff\xff\x7f"),  # an inode that cannot be
        (6, b"\xf0"),  # a name longer than its entry
        (8, b"a/b"),
        (8, b"a\0b"),
    ],
)
def test_one_bad_entry_takes_only_itself(sound: Path, tmp_path: Path, offset, data) -> None:
    at, lost = _entries(sound)[1][5]
    image = _changed(sound, tmp_path / "disk.img", at + offset, data)
    names = [name for name in NAMES if name != lost]
    assert _listed(image) == (names, [(b"/many", BAD_ENTRY)])


@pytest.mark.parametrize("length", [0, 4, 13, 2048])
def test_an_entry_without_an_end_takes_the_rest_of_its_block(sound: Path, tmp_path, length) -> None:
    entries = _entries(sound)[1]
    image = _changed(sound, tmp_path / "disk.img", entries[5][0] + 4, struct.pack("<H", length))
    lost = {name for _, name in entries[5:]}
    names = [name for name in NAMES if name not in lost]
    assert _listed(image) == (names, [(b"/many", BAD_ENTRY)])


def test_an_entry_that_is_too_short_hides_nothing_after_it(sound: Path, tmp_path: Path) -> None:
    # Eight bytes of no entry before the names, as one of e2fsprogs' own images has them.
    (at, lost), (_, after) = _entries(sound)[1][:2]
    raw = sound.read_bytes()
    second = at + struct.unpack_from("<H", raw, at + 4)[0]
    moved = bytearray(raw[second : second + 16])
    struct.pack_into("<H", moved, 4, second + struct.unpack_from("<H", raw, second + 4)[0] - at - 8)
    image = _changed(sound, tmp_path / "disk.img", at, struct.pack("<IHH", 0, 8, 0) + moved)
    assert after == moved[8:]
    names = [name for name in NAMES if name != lost]
    assert _listed(image) == (names, [(b"/many", BAD_ENTRY)])


def test_hole_in_a_directory_is_an_error_and_the_rest_is_listed(sound: Path, tmp_path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(sound.read_bytes())
    words = ["debugfs", "-w", "-R", "set_inode_field /many block[1] 0", image]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    lost = {name for _, name in _entries(sound)[1]}
    names = [name for name in NAMES if name not in lost]
    assert _listed(image) == (names, [(b"/many", "a directory has a hole")])


def test_name_not_found_in_a_damaged_directory_may_be_there(sound: Path, tmp_path):
    at, lost = _entries(sound)[1][5]
    image = _changed(sound, tmp_path / "disk.img", at, b"\xff\xff\xff\x7f")
    with open_guest(image, engine="direct") as guest:
        assert guest.lstat(b"/many/" + NAMES[-1]).size == len(NAMES[-1])
        with pytest.raises(EngineError, match=BAD_ENTRY):
            guest.lstat(b"/many/" + lost)


@pytest.mark.parametrize("keep", [False, True])
def test_a_copy_of_a_damaged_directory_has_what_could_be_read(sound, tmp_path, keep) -> None:
    at, lost = _entries(sound)[1][5]
    image = _changed(sound, tmp_path / "disk.img", at, b"\xff\xff\xff\x7f")
    lines = Lines()
    with open_guest(image, engine="direct") as guest:
        copy_out(guest, "/many", tmp_path, lines.report, keep_partial=keep)
        copy_out(guest, "/", tmp_path / "all", lines.report, keep_partial=keep)
    assert lines.problems == [(b"/many", BAD_ENTRY)] * 2
    for folder in (tmp_path / "many", tmp_path / "all/many"):
        found = {os.fsencode(path.name): path.read_bytes() for path in folder.iterdir()}
        assert found == {name: name for name in NAMES if name != lost}


def test_damaged_indirect_block_takes_only_its_own_part(sound: Path, tmp_path) -> None:
    # Its last pointer leads out of the volume: the kernel takes the whole block for damaged.
    blocks = _blocks(sound, "/mapped")
    words = ("debugfs", "-R", "stat /mapped", sound)
    said = subprocess.run(words, check=True, env=environment(), capture_output=True).stdout
    indirect = int(said.split(b"(IND):")[1].split(b",")[0])
    pointers = struct.unpack("<256I", sound.read_bytes()[indirect * BLOCK :][:BLOCK])
    assert pointers[0] in blocks
    image = _changed(sound, tmp_path / "disk.img", indirect * BLOCK + 255 * 4, b"\xff\xff\xff\x7f")
    lines = Lines()
    with open_guest(image, engine="direct") as guest:
        with open_guest(sound, engine="direct") as other:
            whole = other.read_bytes("/mapped")
        with guest.open_range("/mapped", 268 * BLOCK, BLOCK) as stream:
            assert stream.read() == whole[268 * BLOCK : 269 * BLOCK]
        copy_out(guest, "/mapped", tmp_path, lines.report)
        assert not (tmp_path / "mapped").exists()
        copy_out(guest, "/mapped", tmp_path, lines.report, keep_partial=True)
    reason = "cannot be read (a part of the file's block map is damaged); "
    assert lines.problems == [
        (b"/mapped", reason + "it was left out"),
        (b"/mapped", reason + "what could be read was kept"),
    ]
    assert (tmp_path / "mapped").read_bytes() == whole[: 12 * BLOCK]


def test_file_that_cannot_be_read_is_kept_as_an_empty_one(sound, tmp_path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(sound.read_bytes())
    words = ["debugfs", "-w", "-R", f"set_inode_field /mapped block[0] {1 << 30}", image]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    lines = Lines()
    with open_guest(image, engine="direct") as guest:
        copy_out(guest, "/mapped", tmp_path, lines.report, keep_partial=True)
    assert lines.problems == [
        (b"/mapped", "cannot be read (a block map is damaged); what could be read was kept")
    ]
    assert (tmp_path / "mapped").read_bytes() == b""


def _unmapped(image: Path, path: str) -> None:
    """Have a file's first block lie past the end of the filesystem."""
    words = ("debugfs", "-w", "-R", f"set_inode_field {path} block[0] {1 << 30}", image)
    subprocess.run(words, check=True, env=environment(), capture_output=True)


def test_tar_stream_has_all_that_can_be_read_and_names_the_rest(sound, tmp_path) -> None:
    at, lost = _entries(sound)[1][5]
    image = _changed(sound, tmp_path / "disk.img", at, b"\xff\xff\xff\x7f")
    words: list[str | Path] = ["debugfs", "-w", "-R", "link /mapped /other", image]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    words = ["debugfs", "-w", "-R", "set_inode_field /mapped links_count 2", image]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    _unmapped(image, "/mapped")
    lines, stream = Lines(), io.BytesIO()
    damaged = "a block map is damaged"
    with open_guest(image, engine="direct") as guest:
        tar_out(guest, "/", stream, lines.problem)
        assert lines.problems == [
            *((b"/many", BAD_ENTRY), (b"/mapped", damaged), (b"/other", damaged)),
        ]
        with pytest.raises(EngineError, match="a directory entry is damaged") as failed:
            tar_out(guest, "/", io.BytesIO())
        assert failed.value.subject == "/many"
    done = subprocess.run(["tar", "-tf", "-"], input=stream.getvalue(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    names = {f"./many/{name.decode()}" for name in NAMES if name != lost}
    assert set(done.stdout.decode().split()) == names | {
        *("./", "./beside", "./lost+found/", "./many/"),
    }
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as archive:
        assert archive.extractfile("./beside").read() == b"beside"  # type: ignore[union-attr]


@pytest.mark.parametrize("block", [0, 5])
def test_large_unreadable_file_ends_a_tar_stream_within_it(tmp_path, block) -> None:
    root, image = tmp_path / "root", tmp_path / "disk.img"
    root.mkdir()
    (root / "large").write_bytes(os.urandom(2 << 20))
    (root / "small").write_bytes(b"small")
    words = ["mke2fs", "-q", "-t", "ext2", "-b", str(BLOCK), "-d", root, image, "8M"]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    words = ["debugfs", "-w", "-R", f"set_inode_field /large block[{block}] {1 << 30}", image]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    words = [sys.executable, "-m", "imgtool", "copy-out", "--engine", "direct", image, "/", "-"]
    done = subprocess.run(words, capture_output=True)
    assert done.returncode == 1
    assert done.stderr == b"imgtool: error: a block map is damaged (/large)\n"
    told = subprocess.run(["tar", "-tf", "-"], input=done.stdout, capture_output=True)
    assert told.returncode == 2 and b"Unexpected EOF" in told.stderr


def test_damaged_xfs_directory_block_takes_only_its_own_names(tmp_path: Path) -> None:
    names = [f"name-{number:03}-{'x' * 20}".encode() for number in range(400)]
    lines = ["/", "0 0", "d--755 0 0", "many d--755 0 0"]
    lines += [f"{name.decode()} ---644 0 0 /dev/null" for name in names] + ["$", "$"]
    (tmp_path / "proto").write_text("\n".join(lines) + "\n")
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    # mkfs.xfs makes a filesystem below 300 MB only for its own test suite.
    env = environment({"TEST_DIR": "/", "TEST_DEV": "none", "QA_CHECK_FS": "1"})
    words = ("mkfs.xfs", "-q", "-p", tmp_path / "proto", image)
    subprocess.run(words, check=True, env=env, capture_output=True)
    raw = image.read_bytes()
    starts = [at for at in range(0, len(raw), 4096) if raw[at : at + 4] == b"XDD3"]
    assert len(starts) >= 3
    lost = {name for name in names if name in raw[starts[1] : starts[1] + 4096]}
    assert 0 < len(lost) < len(names)
    with image.open("r+b") as file:
        file.seek(starts[1] + 100)
        file.write(b"\xff")
    said = Lines()
    with open_guest(image, engine="direct") as guest:
        found = [entry.name for entry in guest.entries("/many", on_problem=said.problem)]
    assert found == [name for name in names if name not in lost]
    ((path, line),) = said.problems
    assert path == b"/many" and line.endswith("has a wrong checksum")


def test_names_that_a_damaged_directory_lacks_are_not_removed(sound, tmp_path) -> None:
    at, _ = _entries(sound)[1][5]
    image = _changed(sound, tmp_path / "disk.img", at, b"\xff\xff\xff\x7f")
    for pair in ((sound, image), (image, sound)):
        words = [sys.executable, "-m", "imgtool", "diff", *pair, "--engine", "direct"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert BAD_ENTRY in done.stderr and "(/many)" in done.stderr


@pytest.mark.parametrize("end", [0, 511, 512, 5000, (1 << 20) + 1, (3 << 20) - 512])
def test_a_file_is_given_up_to_the_sector_that_cannot_be_read(end: int) -> None:
    class Broken:
        def read(self, inode: int, offset: int, length: int) -> bytes:
            if offset + length > end:
                raise ReadFailed("a bad sector")
            return bytes(length)

    node = Node(1, 0o100644, 0, 0, 3 << 20, 0, 0, 1, 0)
    given = 0
    with pytest.raises(ReadFailed, match="a bad sector"):
        for piece in pieces(Broken(), Found(b"/f", InodeRef(0, 1), node, None), 0, 3 << 20):  # type: ignore[arg-type]
            given += len(piece)
    assert given == end // 512 * 512


def test_what_precedes_an_error_is_read_before_it_comes() -> None:
    class Raw(io.RawIOBase):
        def __init__(self, *parts: bytes) -> None:
            self.parts = list(parts)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            if not self.parts:
                raise EngineError("it breaks off")
            part = self.parts[0][: len(buffer)]
            self.parts[0] = self.parts[0][len(part) :]
            if not self.parts[0]:
                del self.parts[0]
            buffer[: len(part)] = part
            return len(part)

    stream = Contents(Raw(b"a" * 1000, b"b" * 10))
    assert stream.read(5) == b"a" * 5
    assert stream.read(1 << 20) == b"a" * 995 + b"b" * 10
    for _ in range(2):
        with pytest.raises(EngineError, match="breaks off"):
            stream.read(1 << 20)
    with pytest.raises(EngineError, match="breaks off"):  # who asks for all is not told of a part
        Contents(Raw(b"c")).read()
