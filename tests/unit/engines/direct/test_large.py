"""Large files: the memory that the worker shares with its parent, and what comes through it."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest

from imgtool import open_guest
from imgtool.engines.direct.parent import guest as direct_guest
from imgtool.engines.direct.parent import questions, sandbox
from imgtool.engines.direct.parent.client import Client, WorkerFailed
from imgtool.engines.direct.parent.host_reader import PlainStream
from imgtool.engines.direct.parent.ring import Ring, ring
from imgtool.engines.direct.wire import requests
from imgtool.engines.direct.wire.extents import Extent
from imgtool.engines.direct.wire.frames import BadMessage
from imgtool.engines.direct.wire.messages import runs
from imgtool.engines.direct.wire.ring import SLOT
from imgtool.errors import EngineError
from imgtool.host.process import environment
from imgtool.image.chain.chain import open_chain
from imgtool.image.qemu.clusters import ByteRange, Clusters
from imgtool.transfer.copy_out import Report, copy_out
from tests.support.workers import client_of

_MIB = 1 << 20


def run_qemu_img(*words: object) -> None:
    command = ["qemu-img", *(str(word) for word in words)]
    subprocess.run(command, check=True, capture_output=True)


def pieces_of(seed: int, size: int) -> list[tuple[int, bytes]]:
    """Where a file with holes has data: small and large pieces, at odd places."""
    chance = random.Random(seed)
    found, at = [], 0
    while at < size:
        length = chance.choice((1, 4096, 5000, 70_000, 3 * _MIB + 17))
        found.append((at, chance.randbytes(min(length, size - at))))
        at += length + chance.choice((0, 4096, 9000, 300_000, 5 * _MIB))
    return found


@pytest.fixture(scope="module", params=["extents", "block map", "xfs"])
def large(request, tmp_path_factory) -> tuple[Path, Path]:
    """A qcow2 image with a large file in pieces, and one without a hole; and the folder of both."""
    folder = tmp_path_factory.mktemp("large")
    contents, image = folder / "contents", folder / "disk.img"
    contents.mkdir()
    size = 40 * _MIB + 1234
    with (contents / "holes").open("wb") as file:
        for at, data in pieces_of(1, size):
            file.seek(at)
            file.write(data)
        file.truncate(size)
    (contents / "whole").write_bytes(random.Random(2).randbytes(9 * _MIB + 5))
    (contents / "small").write_bytes(b"small")
    if request.param == "xfs":
        files = [f"{path.name} ---644 0 0 {path}" for path in contents.iterdir()]
        words = ["/none", "0 0", "d--755 0 0", *files, "$", "$"]
        (folder / "proto").write_text("\n".join(words) + "\n")
        image.touch()
        os.truncate(image, 320 * _MIB)
        mkfs = ["mkfs.xfs", "-q", "-p", folder / "proto", image]
    else:
        features = "^extents,^64bit" if request.param == "block map" else "extents"
        mkfs = ["mke2fs", "-q", "-t", "ext4", "-O", features, "-d", contents, image, "80M"]
    subprocess.run(mkfs, check=True, env=environment())
    disk = image.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", image, disk], check=True)
    return disk, contents


@pytest.fixture(params=["by the worker", "from the files"])
def way(request: pytest.FixtureRequest, monkeypatch) -> str:
    """Who reads: the worker and QEMU, or the parent, where that can be."""
    least = 0 if request.param == "from the files" else 1 << 62
    monkeypatch.setattr(direct_guest, "_LARGE", least)
    return str(request.param)


def test_large_files_are_read_to_the_byte(large, way):
    image, contents = large
    with open_guest(image, engine="direct") as guest:
        for name in ("holes", "whole"):
            expected = (contents / name).read_bytes()
            with guest.open(f"/{name}") as stream:
                assert stream.read() == expected
            for offset, length in (
                *((0, 4 * _MIB), (1, 5 * _MIB), (SLOT - 1, 6 * _MIB + 2)),
                *((len(expected) - 4 * _MIB, 1 << 40), (len(expected), 1 << 40), (77, 1000)),
            ):
                with guest.open_range(f"/{name}", offset, length) as stream:
                    assert stream.read() == expected[offset : offset + length]
            digest = hashlib.sha256(expected).hexdigest()
            assert guest.checksum("sha256", f"/{name}") == digest


def test_large_files_are_copied_out_with_their_holes(large, way, tmp_path):
    image, contents = large
    said: list[str] = []

    def problem(path: bytes, line: str) -> None:
        said.append(line)

    with open_guest(image, engine="direct") as guest:
        copy_out(guest, "/", tmp_path, Report(problem, problem))
        with guest.tar("/") as stream:
            names = subprocess.run(["tar", "-t"], input=stream.read(), capture_output=True)
    assert not said
    assert b"./holes\n" in names.stdout
    assert not names.stderr
    for name in ("holes", "whole", "small"):
        assert (tmp_path / name).read_bytes() == (contents / name).read_bytes()
    assert (tmp_path / "holes").stat().st_blocks * 512 < 40 * _MIB


def test_what_is_left_unread_does_not_reach_the_next_answer(large, way):
    image, contents = large
    expected = (contents / "whole").read_bytes()
    with open_guest(image, engine="direct") as guest:
        for read in (0, 1, 100, SLOT, 3 * SLOT + 5):
            with guest.open("/holes") as stream:
                stream.read(read)
            with guest.open("/whole") as stream:
                assert stream.read() == expected
            assert guest.read_bytes("/small") == b"small"


def asked_of_the_worker(monkeypatch) -> list[str]:
    """What is asked of it from now on."""
    words: list[str] = []
    frames = Client.frames

    def noted(self, asked):
        words.append(requests.name_of(asked))
        return frames(self, asked)

    monkeypatch.setattr(Client, "frames", noted)
    return words


def test_plain_parts_of_files_are_not_asked_of_the_worker(large, monkeypatch, tmp_path):
    image, contents = large
    expected = (contents / "whole").read_bytes()
    monkeypatch.setattr(direct_guest, "_LARGE", 1 << 20)
    words = asked_of_the_worker(monkeypatch)
    overlay = tmp_path / "overlay.qcow2"
    run_qemu_img("create", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay)
    for disk in (image, overlay):
        with (
            open_guest(disk, engine="direct", backing_dirs=[image.parent]) as guest,
            guest.open("/whole") as stream,
        ):
            assert stream.read() == expected
    assert words.count("runs") == 2
    assert "read" not in words


def test_where_clusters_are_compressed_the_worker_takes_over(large, monkeypatch, tmp_path):
    image, contents = large
    expected = (contents / "whole").read_bytes()
    monkeypatch.setattr(direct_guest, "_LARGE", 1 << 20)
    packed, overlay = tmp_path / "packed.qcow2", tmp_path / "overlay.qcow2"
    run_qemu_img("convert", "-c", "-O", "qcow2", image, packed)
    run_qemu_img("create", "-f", "qcow2", "-b", packed, "-F", "qcow2", overlay)
    with open_guest(image, engine="direct") as guest:
        guest.lstat("/whole")
        found = client_of(guest).call(questions.runs("/whole", 0, 1 << 40, [1 << 40]))
    assert found is not None
    # The first of it is written again, and so is no longer compressed.
    start, end, _, at = found[0]
    first = expected[start : min(end, start + 2 * _MIB)]
    (tmp_path / "first").write_bytes(first)
    words = ["write", "-s", tmp_path / "first", at, len(first)]
    line = " ".join(str(word) for word in words)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", line, overlay], check=True, capture_output=True)
    asked = asked_of_the_worker(monkeypatch)
    with open_guest(overlay, engine="direct") as guest:
        with guest.open("/whole") as stream:
            assert stream.read(5000) == expected[:5000]
            assert stream.read() == expected[5000:]
        assert asked.count("runs") == asked.count("read") == 1
        with guest.open_range("/whole", 4 * _MIB, 3 * _MIB) as stream:
            assert stream.read() == expected[4 * _MIB : 7 * _MIB]


@pytest.mark.parametrize(
    "rows",
    [
        *([[0, 10, 1, 0]], [[0, 10, 0, 91]], [[0, 10, 0, -1]], [[5, 5, 0, 0]], [[9, 5, 0, 0]]),
        *([[0, 10, 0, 0], [9, 20, 0, 50]], [[10, 20, 0, 0], [0, 5, 0, 50]], [[0, 10, 0]], 7, [7]),
        *([["0", 10, 0, 0]], [[0.0, 10, 0, 0]], [[0, 1 << 70, 0, 0]]),
    ],
)
def test_a_file_that_lies_nowhere_is_nonsense(rows):
    with pytest.raises(BadMessage):
        runs(rows, [100])
    assert runs([[0, 10, 0, 90], [10, 20, 0, 0]], [100]) == [
        Extent(0, 10, 0, 90),
        Extent(10, 20, 0, 0),
    ]


def test_image_that_becomes_shorter_or_unreadable_is_an_error(tmp_path):
    file = tmp_path / "disk"
    file.write_bytes(bytes(8192))

    class Plain(Clusters):
        def __init__(self, descriptor: int) -> None:
            super().__init__([])
            self._descriptor = descriptor

        def at(self, offset: int, length: int) -> ByteRange:
            return ByteRange(self._descriptor, offset, length)

    def no_worker(at: int) -> BinaryIO:
        raise AssertionError("the worker was asked")

    with file.open("rb") as opened:
        stream = PlainStream([Extent(0, 9000, 0, 0)], [Plain(opened.fileno())], 0, 9000, no_worker)
        buffer = bytearray(8192)
        assert stream.readinto(buffer) == 8192
        with pytest.raises(EngineError, match="become shorter"):
            stream.readinto(buffer)
        unreadable = PlainStream([Extent(0, 9, 0, 0)], [Plain(1 << 20)], 0, 9, no_worker)
        with pytest.raises(EngineError, match="cannot be read: Bad file descriptor"):
            unreadable.readinto(buffer)


@pytest.mark.parametrize("length", [0, SLOT - 1, SLOT + 1, 8 * SLOT, 8 * SLOT + 1])
def test_the_shared_memory_keeps_its_size(length):
    with ring() as shared:
        with pytest.raises(PermissionError):  # the one, or the other where that changes nothing
            os.ftruncate(shared.descriptor, length)
            os.pwrite(shared.descriptor, b"x", 8 * SLOT)
        assert os.fstat(shared.descriptor).st_size == 8 * SLOT


@pytest.mark.parametrize(
    ("offset", "length"),
    [(8 * SLOT, 1), (8 * SLOT - 1, 2), (0, 0), (0, SLOT + 1), (0xFFFFFFFF, 0xFFFFFFFF)],
)
def test_a_place_outside_of_the_shared_memory_is_nonsense(offset, length):
    with ring() as shared:
        with pytest.raises(BadMessage):
            shared.lent(offset.to_bytes(4, "big") + length.to_bytes(4, "big"))
        assert len(shared.lent((8 * SLOT - 1).to_bytes(4, "big") + (1).to_bytes(4, "big"))) == 1


def test_one_unreadable_cluster_is_damage_of_what_is_in_it(way, tmp_path):
    """QEMU ends a connection on which a read that it answers in fragments fails."""
    contents, image = tmp_path / "contents", tmp_path / "disk.img"
    contents.mkdir()
    chance = random.Random(3)
    expected = {}
    for number in range(10):
        data = b"".join(bytes([chance.randrange(65, 91)]) * 64 for _ in range(_MIB // 64))
        # By pieces, and by several requests at once.
        expected[f"f{number}"] = data * (5 if number % 2 else 1)
        (contents / f"f{number}").write_bytes(expected[f"f{number}"])
    words = ["mke2fs", "-q", "-t", "ext4", "-d", contents, image, "64M"]
    subprocess.run(words, check=True, env=environment())
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", image, disk], check=True)
    size = disk.stat().st_size
    with disk.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * 3000)
    bad, problems = [], []
    with open_guest(disk, engine="direct") as guest:
        for name, data in expected.items():
            try:
                assert guest.read_bytes(f"/{name}") == data
            except EngineError as error:
                assert error.message == "a part of the image cannot be read"
                bad.append(f"/{name}".encode())
        listed = list(guest.walk("/", checksum="md5", on_problem=lambda p, _: problems.append(p)))
    assert 1 <= len(bad) <= 2 and problems == bad
    summed = {entry.path for entry in listed if entry.checksum}
    assert len(summed) == len(expected) - len(bad)


def failure(image: Path, monkeypatch: pytest.MonkeyPatch, program: str, memory: Ring | None) -> str:
    monkeypatch.setattr(sandbox, "_START", program + " # {paths!r}")
    images = sandbox.Images([open_chain(image)])
    with sandbox.start_worker(images) as process:
        client = Client(process, image=str(image), silence=4.0, ring=memory)
        with pytest.raises(WorkerFailed) as failed:
            for _ in client.frames(requests.Read("/whole", 0, 1)):
                pass
    images.close()
    return failed.value.message


_TELL = "import sys; put = sys.stdout.buffer.write; "


def test_a_worker_that_lends_what_is_not_there_fails(large, monkeypatch):
    image, _ = large
    lend = _TELL + "put(b'L\\0\\0\\0\\x08' + bytes(7) + b'\\1'); sys.stdout.flush()"
    with ring() as memory:
        assert "nothing is shared" in failure(image, monkeypatch, lend, None)
        outside = lend.replace("bytes(7)", "b'\\xff' * 7")
        assert "outside of the shared" in failure(image, monkeypatch, outside, memory)
        short = _TELL + "put(b'L\\0\\0\\0\\1x'); sys.stdout.flush()"
        assert "no place" in failure(image, monkeypatch, short, memory)


def test_a_worker_that_lends_for_ever_and_does_not_listen_fails(large, monkeypatch):
    image, _ = large
    endless = _TELL + "[put(b'L\\0\\0\\0\\x08' + bytes(7) + b'\\1') for _ in iter(int, 1)]"
    with ring() as memory:
        assert "does not listen" in failure(image, monkeypatch, endless, memory)
