"""`chain show`: every link of a chain, and of a broken one as many as there are."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import time
from pathlib import Path

import pytest

from imgtool.image.locking import locks
from tests.support.chain_images import (
    BACKING_FORMAT,
    CORRUPT,
    INCOMPATIBLE,
    held_by_qemu,
    linear,
    patch,
    qcow2,
    qemu_img,
    raw,
    renamed_base,
    write,
)

HOSTILE = "new\nline \x1b[31mred\x1b]0;title\x07 <&\"'> \\ \u202e back"


@pytest.mark.parametrize("links", [1, 2, 5])
@pytest.mark.parametrize(
    ("absolute", "format"), [(False, "raw"), (True, "qcow2")], ids=["relative", "absolute"]
)
def test_every_link_is_shown_across_two_folders(links, absolute, format, tmp_path, imgtool_cli):
    folders = [tmp_path / "one", tmp_path / "two"]
    made = linear(folders, links, absolute=absolute, format=format)
    result = imgtool_cli("chain", "show", "-o", "json", "--backing-dir", tmp_path, made[-1])
    rows = json.loads(result.text)
    assert (result.status, result.err) == (0, "")
    assert [Path(row["path"]).resolve() for row in rows] == made[::-1]
    assert [row["format"] for row in rows] == ["qcow2"] * (links - 1) + [format]
    assert {row["virtual_size"] for row in rows} == {1 << 20}
    assert [row["actual_size"] for row in rows] == [
        path.stat().st_blocks * 512 for path in made[::-1]
    ]
    assert [row["backing"] is None for row in rows] == [False] * (links - 1) + [True]
    assert [row["in_use"] for row in rows] == [[]] * links
    assert [row["problems"] for row in rows] == [[]] * links


def test_fifty_links_in_half_a_second(tmp_path, imgtool_cli):
    template = qcow2(tmp_path / "0", "x" * 8).read_bytes()
    raw(tmp_path / "base")
    qcow2(tmp_path / "1", "base", "raw")
    for number in range(2, 50):
        (tmp_path / str(number)).write_bytes(renamed_base(template, str(number - 1)))
    started = time.process_time()
    result = imgtool_cli("chain", "show", tmp_path / "49")
    lines = result.text.splitlines()
    assert result.status == 0 and len(lines) == 51
    assert lines[1].startswith(f"{tmp_path}/49 ") and f"-> {tmp_path}/base " in lines[-1]
    assert time.process_time() - started < 0.5


def test_the_table_says_what_stands_on_what(tmp_path, imgtool_cli):
    raw(tmp_path / "base.raw")
    qcow2(tmp_path / "guest1.qcow2", "base.raw", "raw")
    top = qcow2(tmp_path / "snap1.qcow2", "guest1.qcow2")
    qemu_img("snapshot", "-c", "before upgrade", top)
    qemu_img("snapshot", "-c", "after", top)
    result = imgtool_cli("chain", "show", "-h", top)
    lines = result.text.splitlines()
    assert lines[0].split() == [
        *("IMAGE", "FORMAT", "SIZE", "ON", "DISK", "SNAPSHOTS", "IN", "USE"),
    ]
    assert "before upgrade,after" in lines[1] and " 1.0M " in lines[1]
    assert lines[2].startswith(f"-> {tmp_path}/guest1.qcow2 ")
    assert lines[3].startswith(f"  -> {tmp_path}/base.raw ")


def test_chain_broken_in_the_middle_shows_the_links_above(tmp_path, imgtool_cli):
    qcow2(tmp_path / "middle", "gone")
    top = qcow2(tmp_path / "top", "middle")
    result = imgtool_cli("chain", "show", "-o", "json", top)
    rows = json.loads(result.text)
    assert [Path(row["path"]).name for row in rows] == ["top", "middle"]
    assert "'gone' is missing" in rows[-1]["problems"][-1]
    assert "'gone' is missing" in result.err and f"should be at {tmp_path}/gone" in result.err
    assert result.status == 3


def test_a_damaged_link_in_the_middle(tmp_path, imgtool_cli):
    patch(qcow2(tmp_path / "base"), 4, struct.pack(">I", 99))
    qcow2(tmp_path / "middle", "base")
    result = imgtool_cli("chain", "show", qcow2(tmp_path / "top", "middle"))
    assert len(result.text.splitlines()) == 3 and result.status == 3
    assert f"({tmp_path}/base)" in result.err


def test_chain_that_leaves_its_folder_is_shown_as_far_as_may_be(tmp_path, imgtool_cli):
    raw(tmp_path / "elsewhere/base")
    top = qcow2(tmp_path / "here/top", "../elsewhere/base", "raw")
    result = imgtool_cli("chain", "show", top)
    assert len(result.text.splitlines()) == 2 and result.status == 4
    assert f"--backing-dir {tmp_path}/elsewhere" in result.err


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_loop_is_shown_once_round(length, tmp_path, imgtool_cli):
    for number in range(length):
        qcow2(tmp_path / str(number), str((number + 1) % length))
    result = imgtool_cli("chain", "show", "-o", "jsonl", tmp_path / "0")
    assert len(result.text.splitlines()) == length
    assert result.err.count("a loop") == 1 and result.status == 3


def test_problems_of_a_link_are_told(tmp_path, imgtool_cli):
    raw(tmp_path / "base.img", 2 << 20)
    top = qcow2(tmp_path / "top", "base.img", None)
    patch(top, INCOMPATIBLE, bytes([CORRUPT]))
    write(tmp_path / "base.img", format="raw")
    result = imgtool_cli("chain", "show", "-o", "json", top)
    problems = "\n".join(json.loads(result.text)[0]["problems"])
    for words in ("marked corrupt", "does not say which format", "hidden", "changed after it"):
        assert words in problems and words in result.err
    assert result.status == 0


def test_an_image_in_use_is_shown_with_its_process(tmp_path, imgtool_cli):
    raw(tmp_path / "base")
    top = qcow2(tmp_path / "top", "base", "raw")
    with held_by_qemu(top) as pid:
        result = imgtool_cli("chain", "show", "-o", "json", top)
        held = [row["in_use"] for row in json.loads(result.text)]
        assert held == [[f"qemu-nbd, process {pid}"]] * 2 and result.status == 0
        assert f"qemu-nbd, process {pid}" in imgtool_cli("chain", "show", top).text


def test_a_file_that_vanishes_while_it_is_looked_at(tmp_path, imgtool_cli, monkeypatch):
    def gone(path: Path) -> None:
        raise FileNotFoundError(2, "No such file", str(path))

    monkeypatch.setattr(locks, "holders", gone)
    result = imgtool_cli("chain", "show", "-o", "json", qcow2(tmp_path / "top"))
    assert json.loads(result.text)[0]["in_use"] == [] and result.status == 0


@pytest.mark.parametrize(
    "backing",
    [
        HOSTILE,
        "x" * 300,
        "file/below",
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}',
        "json:" + "[" * 1000,
        "nbd://127.0.0.1:1/\x1b[31m",
        "\x1b[31m:evil",
        b"not \xff utf-8",
        b"nul\0inside",
        b"\0",
        ".",
        "/",
        "/dev/tty",
        "/proc/self/mem",
        "fifo",
    ],
    ids=lambda name: repr(name)[:20],
)
def test_a_hostile_name_of_a_backing_file(backing, tmp_path, imgtool_cli):
    raw(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    template = qcow2(tmp_path / "template", "x" * 1000).read_bytes()
    top = tmp_path / "top"
    top.write_bytes(renamed_base(template, backing))
    for form in ("table", "json", "csv"):
        result = imgtool_cli("chain", "show", "-o", form, top)
        assert result.status in (3, 4)
        assert "\x1b" not in result.err and result.err.count("\n") <= 2
        assert "internal" not in result.err
        if form == "json":
            assert "\x1b" not in result.text
            json.loads(result.text)
        elif form == "table":
            assert "\x1b" not in result.text and len(result.text.splitlines()) in (0, 2)
        else:
            list(csv.reader(io.StringIO(result.text)))


@pytest.mark.parametrize("value", [b"\x7f" + b"\xff" * 7, b"\0" * 8])
def test_a_gigantic_or_empty_field_of_the_header(value, tmp_path, imgtool_cli):
    raw(tmp_path / "base")
    top = qcow2(tmp_path / "top", "base", "raw")
    whole = top.read_bytes()
    started = time.monotonic()
    for at, length in ((8, 8), (16, 4), (20, 4), (24, 8), (36, 4), (40, 8), (48, 8), (56, 4),
                       (60, 4), (64, 8), (72, 8), (96, 4), (100, 4)):  # fmt: skip
        top.write_bytes(whole[:at] + value[:length] + whole[at + length :])
        result = imgtool_cli("chain", "show", top)
        assert result.status in (0, 3, 4) and "internal" not in result.err, at
        quick = imgtool_cli("chain", "check", "--quick", top)
        assert quick.status in (0, 3, 4) and "internal" not in quick.err, at
        assert quick.status == 3 or result.status == 0, at
    assert time.monotonic() - started < 30


def test_a_sparse_file_of_terabytes(tmp_path, imgtool_cli):
    base = raw(tmp_path / "base", 4 << 40)
    top = qcow2(tmp_path / "top", base, "raw", size=4 << 40)
    started = time.monotonic()
    result = imgtool_cli("chain", "show", "-h", top)
    assert result.text.count(" 4.0T ") == 2 and time.monotonic() - started < 5


def test_snapshot_and_format_names_cannot_steer_the_terminal(tmp_path, imgtool_cli):
    raw(tmp_path / "base")
    top = qcow2(tmp_path / "top", "base", "raw")
    qemu_img("snapshot", "-c", "a\x1b[31m\nred", top)
    result = imgtool_cli("chain", "show", top)
    assert "a\\033[31m\\nred" in result.text and len(result.text.splitlines()) == 3
    at = top.read_bytes().index(BACKING_FORMAT)
    patch(top, at + 8, b"\x1b[m")
    result = imgtool_cli("chain", "show", top)
    assert "\x1b" not in result.text + result.err and result.status == 3


def test_an_image_whose_own_name_is_hostile(tmp_path, imgtool_cli):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    raw(folder / HOSTILE)
    top = qcow2(tmp_path / HOSTILE)
    result = imgtool_cli("chain", "show", top)
    assert "\x1b" not in result.text and len(result.text.splitlines()) == 2
    (row,) = json.loads(imgtool_cli("chain", "show", "-o", "json", top).text)
    assert row["path"] == str(top)
    odd = qcow2(folder / "odd")
    (row,) = json.loads(imgtool_cli("chain", "show", "-o", "json", odd).text)
    assert "\ufffd" in row["path"] and row["path_bytes"]
    for form in ("csv", "table"):
        assert imgtool_cli("chain", "show", "-o", form, odd).status in (0, 3)


def test_a_wrong_command_line(tmp_path, imgtool_cli):
    assert "a directory" in imgtool_cli("chain", "show", tmp_path).err
    result = imgtool_cli("chain", "show", tmp_path / "nowhere")
    assert (result.status, result.text) == (3, "") and "no such file" in result.err
    assert imgtool_cli("chain", "show").status == 2
    result = imgtool_cli("chain", "show", "-o", "json", tmp_path / "nowhere")
    assert json.loads(result.text) == [] and result.status == 3
