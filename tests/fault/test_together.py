"""Several at one image: writers take turns or are refused, readers see all old or all new."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fault.runs import RUNS, imgtool, make, manifest, prepare, sound, start
from tests.support.chain_work import left_over

pytestmark = pytest.mark.appliance

_READERS = 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared") / "disk")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_of_two_writers_both_are_whole_or_one_is_refused(kind, disk, tmp_path):
    image = make(disk, kind, tmp_path / "images")
    names = ("one", "two")
    for name in names:
        (tmp_path / name).write_text(name * 100_000)
    processes = [start(("copy-in", image, tmp_path / name, "/srv")) for name in names]
    said = [process.communicate()[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert 0 in statuses, said
    for name, status, words in zip(names, statuses, said, strict=True):
        assert status in (0, 4), words
        done = imgtool("cat", image, f"/srv/{name}")
        assert (done.stdout == name * 100_000) is (status == 0)
        if status == 4:
            assert "in use" in words or "another imgtool" in words, words
    assert left_over(image.parent) == []
    sound(image, kind, tmp_path)


def test_twenty_readers_beside_a_writer_see_all_old_or_all_new(disk, tmp_path):
    image = make(disk, "qcow2", tmp_path / "images")
    old = manifest(image)
    process = start(RUNS["inject"].words(image, disk.parent))

    def reader(number: int) -> list[str]:
        seen = []
        for _ in range(3):
            time.sleep(random.Random(number).random() * 4)
            seen.append(manifest(image))
        process.wait()
        return [*seen, manifest(image)]

    with ThreadPoolExecutor(_READERS) as pool:
        everything = list(pool.map(reader, range(_READERS)))
    said = process.communicate()[1]
    assert process.returncode == 0, said
    new = manifest(image)
    assert new != old
    for seen in everything:
        assert set(seen) <= {old, new}
        assert seen == sorted(seen, key=[old, new].index), "new, and then old again"
        assert seen[-1] == new
    assert left_over(image.parent) == []


def test_clones_of_one_base_are_made_side_by_side_and_named(disk, tmp_path):
    image = make(disk, "qcow2", tmp_path / "images")
    before = hashlib.sha256(image.read_bytes()).hexdigest(), image.stat().st_mtime_ns
    new = [image.with_name(f"web{number}.qcow2") for number in range(3)]
    words = [word for path in new for word in ("--clone", path)]
    done = imgtool(*("inject", image, "--hostname", "{{ image }}", *words, "-P", "2", "-o", "json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["image"], row["status"]) for row in rows] == [
        (str(path), "changed") for path in new
    ]
    assert [imgtool("cat", path, "/etc/hostname").stdout for path in new] == [
        "web0\n",
        "web1\n",
        "web2\n",
    ]
    assert (hashlib.sha256(image.read_bytes()).hexdigest(), image.stat().st_mtime_ns) == before
    assert sum(path.stat().st_blocks for path in new) < image.stat().st_blocks
    assert left_over(image.parent) == []
    done = imgtool("inject", image, "--hostname", "x", "--clone", new[0])
    assert done.returncode == 4 and "exists already" in done.stderr


def test_a_base_of_overlays_is_not_written_to(disk, tmp_path):
    image = make(disk, "chain", tmp_path / "images")
    base = image.with_name("base.qcow2")
    before = base.read_bytes()
    for run in RUNS.values():
        done = imgtool(*run.words(base, disk.parent))
        assert done.returncode == 4
        assert "disk.qcow2" in done.stderr
    assert base.read_bytes() == before


@contextlib.contextmanager
def running(image: Path):
    """A virtual machine that has the image open, as a hypervisor has it."""
    words = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-machine", "accel=tcg"]
    process = subprocess.Popen(
        [*words, "-qmp", "stdio", "-drive", f"file={image},format=qcow2,if=virtio"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert b"QMP" in process.stdout.readline()  # which it says once its drives are open
        yield
    finally:
        process.kill()
        process.communicate()


def test_an_image_that_a_virtual_machine_runs_is_not_written_to(disk, tmp_path):
    image = make(disk, "qcow2", tmp_path / "images")
    before = image.read_bytes()
    with running(image):
        for run in RUNS.values():
            done = imgtool(*run.words(image, disk.parent))
            assert done.returncode == 4, done.stderr
            assert "in use" in done.stderr
    assert image.read_bytes() == before
    assert left_over(image.parent) == []
