"""`chain check`: every problem that it names, made for real; and silence where nothing is wrong."""

from __future__ import annotations

import ast
import inspect
import json
import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgtool.image.chain.chain import MAX_LINKS
from imgtool.image.checks import checking, findings
from imgtool.image.checks.checking import ChainCheck
from imgtool.image.intent.intent_log import open_record
from tests.support.chain_images import (
    CLUSTER,
    CORRUPT,
    INCOMPATIBLE,
    held_by_qemu,
    linear,
    named_format,
    older,
    patch,
    qcow2,
    qemu_img,
    raw,
    renamed_base,
    without_privileges,
    write,
)
from tests.support.checks import check_chain

Made = Callable[[Path], Path]


def refcounts(path: Path) -> int:
    """Where the first block of refcounts is; two bytes for each cluster."""
    header = path.read_bytes()
    (table,) = struct.unpack_from(">Q", header, 48)
    (block,) = struct.unpack_from(">Q", header, table)
    return int(block)


def sound(folder: Path) -> Path:
    return linear([folder], 3, absolute=False, format="raw")[-1]


def missing(folder: Path) -> Path:
    return qcow2(folder / "top", "gone")


def name_too_long(folder: Path) -> Path:
    return qcow2(folder / "top", "x" * 300)


def under_a_file(folder: Path) -> Path:
    raw(folder / "file")
    return qcow2(folder / "top", "file/base")


def own_base(folder: Path) -> Path:
    return qcow2(folder / "top", "top")


def symlinked_loop(folder: Path) -> Path:
    (folder / "link").symlink_to("top")
    return qcow2(folder / "top", "link")


def too_long(folder: Path) -> Path:
    template = qcow2(folder / "0", "x").read_bytes()
    (folder / "0").write_bytes(renamed_base(template, "1"))
    for number in range(1, MAX_LINKS + 1):
        (folder / str(number)).write_bytes(renamed_base(template, str(number + 1)))
        os.utime(folder / str(number), (1, 1))
    qcow2(folder / str(MAX_LINKS + 1))
    os.utime(folder / str(MAX_LINKS + 1), (1, 1))
    return folder / "0"


def taken_as_raw(folder: Path) -> Path:
    qcow2(folder / "base", size=1 << 20)
    return qcow2(folder / "top", "base", "raw", size=(folder / "base").stat().st_size)


def taken_as_qcow2(folder: Path) -> Path:
    raw(folder / "base")
    return qcow2(folder / "top", "base", "qcow2")


def taken_as_qed(folder: Path) -> Path:
    qcow2(folder / "base")
    top = qcow2(folder / "top", "base", "qcow2")
    named_format(top, b"qed")
    return top


def unknown_format(folder: Path) -> Path:
    qcow2(folder / "base")
    top = qcow2(folder / "top", "base", "qcow2")
    named_format(top, b"q\x1b[2")
    return top


def no_format(folder: Path) -> Path:
    qcow2(folder / "base")
    return qcow2(folder / "top", "base", None)


def no_format_of_raw(folder: Path) -> Path:
    raw(folder / "base")
    return qcow2(folder / "top", "base", None)


def no_format_of_forged(folder: Path) -> Path:
    qcow2(folder / "base.raw")
    return qcow2(folder / "top", "base.raw", None)


def smaller(folder: Path) -> Path:
    raw(folder / "base", 2 << 20)
    return qcow2(folder / "top", "base", "raw", size=1 << 20)


def larger(folder: Path) -> Path:
    raw(folder / "base", 1 << 20)
    return qcow2(folder / "top", "base", "raw", size=2 << 20)


def base_newer(folder: Path) -> Path:
    raw(folder / "base")
    top = qcow2(folder / "top", "base", "raw")
    write(folder / "base", format="raw")
    # Two writes within one tick of the kernel's clock have the same time.
    later = top.stat().st_mtime_ns + 10**9
    os.utime(folder / "base", ns=(later, later))
    return top


def corrupt(folder: Path) -> Path:
    image = qcow2(folder / "image")
    patch(image, INCOMPATIBLE, bytes([CORRUPT]))
    return image


def dirty(folder: Path) -> Path:
    """Its QEMU is killed; until it is mended the tables look damaged, which they are not."""
    image = qcow2(folder / "image", options="lazy_refcounts=on")
    command = ("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "abort", image)
    assert subprocess.run(command, capture_output=True).returncode != 0
    return image


def damaged_tables(folder: Path) -> Path:
    image = qcow2(folder / "image")
    write(image)
    patch(image, refcounts(image), bytes(2 * 8))
    return image


def noise(folder: Path) -> Path:
    image = folder / "image.img"
    image.write_bytes(bytes(range(1, 256)) * 100)
    return image


def leaks(folder: Path) -> Path:
    image = qcow2(folder / "image")
    number = -(-image.stat().st_size // CLUSTER)
    with image.open("r+b") as file:
        file.truncate((number + 1) * CLUSTER)
    patch(image, refcounts(image) + 2 * number, b"\0\1")
    return image


def bad_version(folder: Path) -> Path:
    image = qcow2(folder / "image")
    patch(image, 4, struct.pack(">I", 99))
    return image


def cut_off(folder: Path) -> Path:
    image = qcow2(folder / "image")
    write(image)
    os.truncate(image, image.stat().st_size // 2)
    return image


def base_cut_off(folder: Path) -> Path:
    """The right format, and damaged: not a wrong format."""
    image = qcow2(folder / "base")
    write(image)
    os.truncate(image, image.stat().st_size // 2)
    return qcow2(folder / "top", "base")


def damaged_snapshot(folder: Path) -> Path:
    """A snapshot whose table of clusters cannot be: the header does not tell."""
    image = qcow2(folder / "image")
    qemu_img("snapshot", "-c", "before", image)
    (table,) = struct.unpack_from(">Q", image.read_bytes(), 64)
    patch(image, table, b"\x7f" * 8 + b"\xff" * 4)
    return image


def several(folder: Path) -> Path:
    raw(folder / "base")
    qcow2(folder / "other", "base", "raw")
    return qcow2(folder / "top", "base", "raw")


def outside(folder: Path) -> Path:
    raw(folder / "elsewhere" / "base")
    return qcow2(folder / "here" / "top", "../elsewhere/base", "raw")


def over_the_network(folder: Path) -> Path:
    return qcow2(folder / "top", "nbd://127.0.0.1:1/x", "raw")


def pseudo_name(folder: Path) -> Path:
    return qcow2(folder / "top", 'json:{"driver":"null-co"}', "raw")


def left_behind(folder: Path) -> Path:
    image = qcow2(folder / "top")
    with open_record(image, create=True) as record:
        assert record is not None
        record.note(operation="resize")
    return image


def half_written(folder: Path) -> Path:
    image = qcow2(folder / "top")
    with open_record(image, create=True) as record:
        assert record is not None
        record.note(operation="write", step="begun")
    return image


def nul_in_name(folder: Path) -> Path:
    top = qcow2(folder / "top", "base-with-a-name")
    top.write_bytes(top.read_bytes().replace(b"base-with-a-name", b"base-with\0a-name"))
    return top


def symlink_circle(folder: Path) -> Path:
    (folder / "circle").symlink_to("circle")
    return qcow2(folder / "top", "circle")


PROBLEMS: list[tuple[Made, str, str, int]] = [
    (missing, "missing-backing-file", "risk", 3),
    (name_too_long, "missing-backing-file", "risk", 3),
    (under_a_file, "missing-backing-file", "risk", 3),
    (own_base, "loop", "risk", 3),
    (symlinked_loop, "loop", "risk", 3),
    (too_long, "too-long", "risk", 3),
    (taken_as_raw, "wrong-backing-format", "risk", 3),
    (taken_as_qcow2, "wrong-backing-format", "risk", 3),
    (taken_as_qed, "wrong-backing-format", "risk", 3),
    (unknown_format, "unknown-backing-format", "risk", 3),
    (no_format, "no-backing-format", "warning", 0),
    (no_format_of_raw, "no-backing-format", "warning", 0),
    (no_format_of_forged, "no-backing-format", "risk", 3),
    (smaller, "smaller-than-base", "warning", 0),
    (larger, "larger-than-base", "note", 0),
    (base_newer, "base-newer", "risk", 3),
    (corrupt, "corrupt", "risk", 3),
    (dirty, "dirty", "warning", 0),
    (damaged_tables, "damaged-tables", "risk", 3),
    (leaks, "leaks", "note", 0),
    (noise, "not-a-disk", "warning", 0),
    (bad_version, "unreadable", "risk", 3),
    (cut_off, "unreadable", "risk", 3),
    (base_cut_off, "unreadable", "risk", 3),
    (damaged_snapshot, "damaged-tables", "risk", 3),
    (several, "base-of-several", "note", 0),
    (outside, "outside", "warning", 4),
    (over_the_network, "not-local", "warning", 4),
    (pseudo_name, "not-local", "warning", 4),
    (left_behind, "interrupted", "warning", 0),
    (half_written, "interrupted", "risk", 3),
    (nul_in_name, "bad-backing-name", "risk", 3),
    (symlink_circle, "bad-backing-name", "risk", 3),
]


@pytest.mark.parametrize(
    ("make", "what", "severity", "status"), PROBLEMS, ids=[made[0].__name__ for made in PROBLEMS]
)
def test_a_problem_is_named_with_what_it_means_and_what_to_do(
    make, what, severity, status, tmp_path, imgtool_cli
):
    image = make(tmp_path)
    result = imgtool_cli("chain", "check", "-o", "json", "--quick" if what == "too-long" else "-v",
                         image)  # fmt: skip
    rows = json.loads(result.text)
    assert [(row["what"], row["severity"]) for row in rows] == [(what, severity)]
    assert rows[0]["means"] and rows[0]["do"]
    assert Path(rows[0]["path"]).exists()
    assert "\x1b" not in result.text and result.status == status


def test_every_problem_that_the_code_names_is_made_here():
    named = {
        word.value
        for module in (checking, findings)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding"
        for word in ast.walk(node.args[2])
        if isinstance(word, ast.Constant)
    }
    elsewhere = {"in-use", "base-in-use", "base-found-by-name"}  # QEMU runs, or an option is given
    assert named == {what for _, what, _, _ in PROBLEMS} | elsewhere


@pytest.mark.parametrize("links", [1, 2, 5])
@pytest.mark.parametrize(
    ("absolute", "format"), [(False, "qcow2"), (True, "raw")], ids=["relative", "absolute"]
)
def test_a_sound_chain_is_sound(links, absolute, format, tmp_path, imgtool_cli):
    """Not a word of the base being as new as its overlay: they were made in one moment."""
    folders = [tmp_path / "one", tmp_path / "two"]
    top = linear(folders, links, absolute=absolute, format=format)[-1]
    there = [folder for folder in folders if folder.exists()]
    backing = [word for folder in there for word in ("--backing-dir", folder)]
    result = imgtool_cli("chain", "check", *backing, top)
    images = "1 image" if links == 1 else f"{links} images"
    first, rest = result.text.splitlines()
    assert (first, result.err, result.status) == (f"{images}: nothing wrong", "", 0)
    assert rest.startswith("not looked at: the filesystems in them")
    assert ("the tables of 1 image (raw" in rest) == (format == "raw")


def test_an_image_of_its_own_that_nothing_can_be_said_of(tmp_path, imgtool_cli):
    assert imgtool_cli("chain", "check", raw(tmp_path / "disk")).status == 0


def test_loop_is_found_from_every_image_and_without_a_top(tmp_path, imgtool_cli):
    for name, below in (("a", "b"), ("b", "c"), ("c", "a"), ("above", "a")):
        os.utime(qcow2(tmp_path / name, below), (1, 1))
    for image in [*tmp_path.iterdir(), tmp_path]:
        result = imgtool_cli("chain", "check", "-o", "json", image)
        found = [row["what"] for row in json.loads(result.text)]
        assert sorted(set(found)) == ["base-of-several", "loop"] and result.status == 3


def test_every_image_is_looked_at_once(tmp_path):
    """Also what stands below a chain that is broken further up, and bases that many stand on."""
    raw(tmp_path / "base.raw")
    middle = qcow2(tmp_path / "sub/middle", "../base.raw", "raw")
    for number in range(4):
        qcow2(tmp_path / f"top{number}", middle)
    leaking = leaks(tmp_path / "sub")
    assert older(leaking).name == "image"
    top = qcow2(tmp_path / "sub" / "broken", "image")
    patch(top, 4, struct.pack(">I", 99))
    seen: list[str] = []
    check = ChainCheck(backing_dirs=[tmp_path], on_link=lambda path: seen.append(path.name))
    found = []
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            found += [finding.what for finding in check.chain(path)]
    assert sorted(seen) == ["base.raw", "image", "middle", "top0", "top1", "top2", "top3"]
    assert sorted(found) == ["base-of-several", "leaks", "unreadable"]
    assert len(check.looked_at) == 8


def test_overlays_in_other_folders_count_where_a_tree_is_given(tmp_path, imgtool_cli):
    raw(tmp_path / "bases/base.raw")
    for name in ("one", "two"):
        qcow2(tmp_path / "guests" / name / "disk", "../../bases/base.raw", "raw")
    result = imgtool_cli("chain", "check", "-o", "json", tmp_path)
    assert [row["what"] for row in json.loads(result.text)] == ["base-of-several"]
    assert result.status == 0
    alone = imgtool_cli("chain", "check", "-o", "json", tmp_path / "guests/one/disk")
    assert [row["what"] for row in json.loads(alone.text)] == ["outside"] and alone.status == 4


def test_a_base_that_is_written_within_the_same_second_is_newer(tmp_path):
    top = base_newer(tmp_path)
    assert [finding.what for finding in check_chain(top)] == ["base-newer"]


def test_times_without_fractions_are_compared_as_seconds(tmp_path):
    """A file system or a copy that keeps whole seconds makes no overlay older than its base."""
    base = raw(tmp_path / "base")
    top = qcow2(tmp_path / "top", "base", "raw")
    now = time.time_ns() // 10**9 * 10**9
    os.utime(base, ns=(now, now + 700_000_000))
    os.utime(top, ns=(now, now))
    assert check_chain(top) == ()
    os.utime(base, ns=(now, now + 10**9))
    assert [finding.what for finding in check_chain(top)] == ["base-newer"]


def test_the_data_file_of_a_base_counts_as_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # QEMU makes the file there
    base = qcow2(tmp_path / "base", options="data_file=base.data")
    top = qcow2(tmp_path / "top", "base")
    assert check_chain(top) == ()
    (tmp_path / "base.data").touch()
    assert base.stat().st_mtime_ns < top.stat().st_mtime_ns
    assert [finding.what for finding in check_chain(top)] == ["base-newer"]


def test_an_image_in_use_is_a_note_and_a_base_in_use_a_risk(tmp_path, imgtool_cli):
    base = raw(tmp_path / "base")
    top = qcow2(tmp_path / "top", "base", "raw")
    with held_by_qemu(top) as pid:
        (row,) = json.loads(imgtool_cli("chain", "check", "-o", "json", top).text)
        assert (row["what"], row["severity"]) == ("in-use", "note")
        assert f"qemu-nbd, process {pid}" in row["means"]
    with held_by_qemu(base, format="raw") as pid:
        result = imgtool_cli("chain", "check", "-o", "json", top)
        found = {row["what"]: row for row in json.loads(result.text)}
        assert found["base-in-use"]["severity"] == "risk" and result.status == 3
        assert f"qemu-nbd, process {pid}" in found["base-in-use"]["means"]
        assert "end that process" in found["base-in-use"]["do"]


def test_a_block_device_as_base_tells_no_time(tmp_path, imgtool_cli):
    image = raw(tmp_path / "image.raw")
    done = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("no loop devices here")
    device = Path(done.stdout.strip())
    try:
        qcow2(tmp_path / "top", device, "raw")
        device.touch()
        result = imgtool_cli("chain", "check", "--backing-dir", "/dev", tmp_path / "top")
        assert result.text.startswith("2 images: nothing wrong\n") and result.status == 0
        tree = imgtool_cli("chain", "tree", "-o", "json", "--backing-dir", "/dev", tmp_path)
        rows = {row["path"]: row for row in json.loads(tree.text)}
        assert rows[str(tmp_path / "top")]["base"] == str(device)
        assert rows[str(tmp_path / "top")]["problem"] is None
        assert rows[str(device)]["virtual_size"] == 1 << 20
        assert rows[str(image)]["in_use"] == [f"the loop device {device}"]
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_quick_reads_no_tables(tmp_path, imgtool_cli, monkeypatch):
    image = damaged_tables(tmp_path)
    monkeypatch.setattr(checking, "check_metadata", lambda link: pytest.fail("tables were read"))
    result = imgtool_cli("chain", "check", "--quick", image)
    said = "1 image: nothing wrong in the headers\n"
    assert result.text == f"{said}not looked at: the filesystems in them, their tables\n"
    assert result.status == 0


def test_nothing_is_changed(tmp_path, imgtool_cli):
    image = dirty(tmp_path)
    before = image.read_bytes(), image.stat().st_mtime_ns
    imgtool_cli("chain", "check", tmp_path)
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def test_what_is_typed_after_a_hostile_name_is_one_word(tmp_path, imgtool_cli):
    image = base_newer(tmp_path).rename(tmp_path / "x; touch y $(z)\n\x1b[31m")
    result = imgtool_cli("chain", "check", image)
    assert f"touch -r {tmp_path}/base '{tmp_path}/x; touch y $(z)" in result.text
    assert "\x1b" not in result.text and len(result.text.splitlines()) == 5


def test_a_wrong_command_line(tmp_path, imgtool_cli):
    top = sound(tmp_path)
    result = imgtool_cli("chain", "check", tmp_path / "nowhere", top)
    assert result.status == 3 and "no such file" in result.err and "nothing wrong" in result.text
    for name in ("x" * 300, top / "below"):
        result = imgtool_cli("chain", "check", tmp_path / name)
        assert result.status == 3 and "internal" not in result.err and result.text == ""
    result = imgtool_cli("chain", "check", "--format", "raw", tmp_path)
    assert result.status == 2 and "--format is for images" in result.err
    (tmp_path / "empty").mkdir()
    result = imgtool_cli("chain", "check", tmp_path / "empty")
    assert (result.status, result.text) == (0, "") and "no images below" in result.err


def test_every_file_that_is_there_is_in_the_count(tmp_path, imgtool_cli):
    qcow2(tmp_path / "sound.qcow2")
    raw(tmp_path / "blank.img")
    raw(tmp_path / "empty.qcow2", 0)
    (tmp_path / "noise.img").write_bytes(bytes(range(1, 256)) * 100)
    (tmp_path / "README").write_text("notes")
    result = imgtool_cli("chain", "check", tmp_path)
    found = {line.partition(": ")[0]: line for line in result.text.splitlines()}
    assert found[str(tmp_path / "empty.qcow2")].endswith("risk: unreadable")
    assert found[str(tmp_path / "noise.img")].endswith("warning: not-a-disk")
    assert "4 images: 1 risk, 1 warning" in result.text and result.status == 3
    assert found["not looked at"].endswith(
        "the tables of 2 images (raw, which has no check), 1 other file (no images)"
    )


@pytest.mark.parametrize(
    ("make", "sound", "shown"),
    [(qcow2, True, "yes"), (damaged_tables, False, "NO"), (raw, None, "not looked at")],
)
def test_sound_damaged_and_not_looked_at_are_three_words(tmp_path, imgtool_cli, make, sound, shown):
    image = make(tmp_path) if make is damaged_tables else make(tmp_path / "disk")
    (row,) = json.loads(imgtool_cli("check", "-o", "json", image).text)
    assert (row["sound"], row["not_looked_at"] is None) == (sound, sound is not None)
    result = imgtool_cli("check", image)
    assert f"  {shown}  " in result.text
    assert ("not looked at: its tables: raw has none" in result.err) == (make is raw)


def test_tables_of_an_image_in_use_are_not_looked_at(tmp_path, imgtool_cli):
    image = qcow2(tmp_path / "disk.qcow2")
    with held_by_qemu(image):
        (row,) = json.loads(imgtool_cli("check", "-o", "json", image).text)
        assert imgtool_cli("check", image).status == 1
        folder = imgtool_cli("chain", "check", tmp_path).text
    assert row["sound"] is None and "it is being written by" in row["not_looked_at"]
    assert "the tables of 1 image (in use)" in folder


def test_what_may_not_be_read_is_said(open_folder, imgtool_cli):
    qcow2(open_folder / "closed").chmod(0)
    (open_folder / "folder").mkdir(mode=0)
    qcow2(open_folder / "open")
    with without_privileges():
        result = imgtool_cli("chain", "check", open_folder)
    assert result.text.startswith("1 image: nothing wrong\n")
    assert result.err.count("permission denied") == 2 and result.status == 1


def test_a_base_that_may_not_be_read_is_no_missing_base(open_folder, imgtool_cli):
    raw(open_folder / "base").chmod(0)
    top = qcow2(open_folder / "top", "base", "raw")
    with without_privileges():
        result = imgtool_cli("chain", "check", "-o", "json", top)
    assert [row["what"] for row in json.loads(result.text)] == ["unreadable"]
    assert "permission denied" in result.text and "as a user who may read it" in result.text


@pytest.fixture
def open_folder(tmp_path_factory):
    """A folder that every user reaches."""
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/imgtool-XXXXXX"], text=True)[:-1])
    folder.chmod(0o755)
    yield folder
    subprocess.run(["rm", "-rf", folder], check=True)


def test_formats_without_a_check_and_parents_of_vmdk(tmp_path, imgtool_cli):
    qemu_img("create", "-f", "vmdk", tmp_path / "base.vmdk", "1M")
    words = ["create", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk"]
    subprocess.run(["qemu-img", *words, "top.vmdk"], cwd=tmp_path, check=True, capture_output=True)
    qemu_img("create", "-f", "qed", tmp_path / "base.qed", "1M")
    qemu_img("create", "-f", "vpc", tmp_path / "disk.vpc", "1M")
    result = imgtool_cli("chain", "check", tmp_path)
    assert result.text == (
        "4 images: nothing wrong\n"
        "not looked at: the filesystems in them, the tables of 1 image (vpc, which has no check)\n"
    )
    assert result.status == 0
