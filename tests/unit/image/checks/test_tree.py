"""`chain tree`: the images below some folders as a forest, in a table, JSON, DOT and SVG."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from imgtool.image import headers
from imgtool.image.checks.forest import forest
from tests.support.chain_images import (
    CORRUPT,
    DIRTY,
    INCOMPATIBLE,
    held_by_qemu,
    linear,
    named_format,
    patch,
    qcow2,
    qemu_img,
    raw,
    renamed_base,
    without_privileges,
    write,
)

HOSTILE = "new\nline \x1b[31mred\x1b]0;title\x07 <&\"'> ]]> \\N \\ &lt; \ufffe \u202e back"
SVG = "{http://www.w3.org/2000/svg}"


def rows_of(imgtool_cli, *words):
    result = imgtool_cli("chain", "tree", "-o", "json", *words)
    assert result.status == 0, result.err
    return {Path(row["path"]).name: row for row in json.loads(result.text)}


def many(folder: Path, count: int) -> None:
    """So many images: chains of ten links, all on one base."""
    raw(folder / "base.raw")
    bottom = qcow2(folder / "bottom", "base.raw", "raw").read_bytes()
    upper = qcow2(folder / "upper", "bottom").read_bytes()
    (folder / "bottom").unlink()
    (folder / "upper").unlink()
    for number in range(count - 1):
        header = renamed_base(upper, str(number - 1)) if number % 10 else bottom
        with (folder / str(number)).open("wb") as file:
            file.write(header[:4096])
            file.truncate(len(header))


def test_the_table_shows_bases_with_what_stands_on_them(tmp_path, imgtool_cli):
    raw(tmp_path / "base.raw")
    qcow2(tmp_path / "guest1.qcow2", "base.raw", "raw")
    qcow2(tmp_path / "snap1.qcow2", "guest1.qcow2")
    qcow2(tmp_path / "guest2.qcow2", "base.raw", "raw")
    qcow2(tmp_path / "sub/alone.qcow2")
    (tmp_path / "note.txt").write_text("no image")
    result = imgtool_cli("chain", "tree", "-h", tmp_path)
    lines = [line.split("  qcow2")[0].split("  raw")[0].rstrip() for line in
             result.text.splitlines()]  # fmt: skip
    assert lines[1:] == [
        f"{tmp_path}/base.raw",
        f"<- {tmp_path}/guest1.qcow2",
        f"  <- {tmp_path}/snap1.qcow2",
        f"<- {tmp_path}/guest2.qcow2",
        f"{tmp_path}/sub/alone.qcow2",
    ]
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize("links", [1, 2, 5, 50])
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_chains_across_two_folders(links, absolute, tmp_path, imgtool_cli):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    below = raw(folders[0] / "link0.raw")
    if links > 1:
        template = qcow2(tmp_path / "template", "x" * 64).read_bytes()
        (tmp_path / "template").unlink()
    for number in range(1, links):
        path = folders[number % 2] / f"link{number}"
        named = below if absolute else os.path.relpath(below, path.parent)
        path.write_bytes(renamed_base(template, str(named)))
        below = path
    for given in ([tmp_path], folders, [tmp_path, *folders, tmp_path]):
        result = imgtool_cli("chain", "tree", "-o", "json", *given)
        rows = json.loads(result.text)
        assert [row["depth"] for row in rows] == list(range(links))
        assert [row["base"] for row in rows][1:] == [row["path"] for row in rows][:-1]
        assert [row["overlays"] for row in rows] == [[row["path"]] for row in rows[1:]] + [[]]


def test_base_outside_of_the_folder_needs_permission(tmp_path, imgtool_cli):
    raw(tmp_path / "bases/base.raw")
    qcow2(tmp_path / "guests/top", "../bases/base.raw", "raw")
    rows = rows_of(imgtool_cli, tmp_path / "guests")
    assert list(rows) == ["top"] and "outside the folders" in rows["top"]["problem"]
    allowed = rows_of(imgtool_cli, tmp_path / "guests", "--backing-dir", tmp_path / "bases")
    assert list(allowed) == ["base.raw", "top"] and allowed["top"]["problem"] is None


def problem_rows(folder: Path) -> dict[str, str]:
    """Images with problems, and what is said of each."""
    raw(folder / "base.raw")
    qcow2(folder / "base.qcow2")
    qcow2(folder / "missing", "gone")
    qcow2(folder / "long", "x" * 300)
    qcow2(folder / "network", "nbd://127.0.0.1:1/\x1b[31m")
    qcow2(folder / "pseudo", "json:{}")
    qcow2(folder / "directory", ".")
    (folder / "circle").symlink_to("circle")
    qcow2(folder / "circular", "circle")
    patch(qcow2(folder / "damaged"), 4, struct.pack(">I", 99))
    (folder / "cut").write_bytes(b"QFI\xfb\0\0\0\3")
    patch(qcow2(folder / "corrupt"), INCOMPATIBLE, bytes([CORRUPT]))
    patch(qcow2(folder / "dirty"), INCOMPATIBLE, bytes([DIRTY]))
    qcow2(folder / "unnamed", "base.raw", None)
    qcow2(folder / "wrong", "base.raw", "qcow2")
    qcow2(folder / "container", "base.qcow2", "raw")
    qcow2(folder / "newer-base")
    qcow2(folder / "stale", "newer-base")
    write(folder / "newer-base")
    return {
        "missing": "gone is missing",
        "long": "is missing",
        "network": "is not a local file",
        "pseudo": "is not a local file",
        "directory": "neither a file nor a block device",
        "circular": "is missing",
        "damaged": "its header is damaged",
        "cut": "its header is damaged",
        "corrupt": "marked corrupt",
        "dirty": "not closed properly",
        "unnamed": "format of its backing file is not written",
        "wrong": "takes its base as qcow2, which is raw",
        "container": "takes its base as raw, which is qcow2",
        "stale": "its base is newer",
    }


def test_problems_are_told_in_a_line(tmp_path, imgtool_cli):
    expected = problem_rows(tmp_path)
    rows = rows_of(imgtool_cli, tmp_path)
    found = {name: row["problem"] for name, row in rows.items() if row["problem"]}
    assert set(found) == set(expected)
    assert [name for name in expected if expected[name] not in found[name]] == []
    table = imgtool_cli("chain", "tree", tmp_path)
    assert "\x1b" not in table.text and table.status == 0


def test_a_loop_and_what_stands_on_it_is_shown_once(tmp_path, imgtool_cli):
    """Whichever of them the file system lists first."""
    template = qcow2(tmp_path / "aside", "x").read_bytes()
    (tmp_path / "aside").unlink()
    for number, names in enumerate(("abcd", "dcba", "cadb")):
        folder = tmp_path / str(number)
        folder.mkdir()
        below = {"a": "b", "b": "a", "c": "a", "d": "c"}
        for name in names:
            (folder / name).write_bytes(renamed_base(template, below[name]))
        rows = json.loads(imgtool_cli("chain", "tree", "-o", "json", folder).text)
        assert sorted(Path(row["path"]).name for row in rows) == ["a", "b", "c", "d"]
        assert {row["problem"] for row in rows} == {"its chain is a loop"}
        dot = imgtool_cli("chain", "tree", "-o", "dot", folder).text
        assert dot.count(" -> ") == 4


def test_a_symlink_to_an_image_is_not_another_image(tmp_path, imgtool_cli):
    """And names in its header start in its own folder."""
    raw(tmp_path / "z/base.raw")
    top = qcow2(tmp_path / "z/top", "base.raw", "raw")
    for name in ("a", "zz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(top)
        (tmp_path / name / "loop").symlink_to("loop")
        (tmp_path / name / "up").symlink_to(tmp_path)
    rows = rows_of(imgtool_cli, tmp_path)
    assert list(rows) == ["base.raw", "top"] and rows["top"]["problem"] is None


def test_a_symlink_that_leads_in_a_circle_hides_nothing(tmp_path, imgtool_cli):
    for number in range(20):
        (tmp_path / f"circle{number}").symlink_to(f"circle{number}")
    qcow2(tmp_path / "image")
    assert list(rows_of(imgtool_cli, tmp_path)) == ["image"]


def test_images_in_use_are_shown_with_their_process(tmp_path, imgtool_cli):
    raw(tmp_path / "base.raw")
    qcow2(tmp_path / "top", "base.raw", "raw")
    qcow2(tmp_path / "other")
    with held_by_qemu(tmp_path / "top") as pid:
        rows = rows_of(imgtool_cli, tmp_path)
        held = [f"qemu-nbd, process {pid}"]
        assert [rows[name]["in_use"] for name in ("base.raw", "top", "other")] == [held, held, []]
        assert f"qemu-nbd, process {pid}" in imgtool_cli("chain", "tree", tmp_path).text
        imgtool_cli("chain", "tree", "--svg", tmp_path / "picture", tmp_path)
        picture = ElementTree.parse(tmp_path / "picture")
        assert len(picture.findall(f".//{SVG}rect[@class='use']")) == 2


def test_files_that_vanish_while_they_are_looked_at(tmp_path, imgtool_cli, monkeypatch):
    for number in range(6):
        qcow2(tmp_path / str(number), str(number - 1) if number else None)
    really_read = headers.read
    gone: list[Path] = []

    def read(path):
        if path.name in "135" and path not in gone:
            gone.append(path)
            path.unlink()
        return really_read(path)

    monkeypatch.setattr(headers, "read", read)
    rows = rows_of(imgtool_cli, tmp_path)
    assert sorted(rows) == ["0", "2", "4"] and len(gone) == 3


def test_what_may_not_be_read_is_said_and_the_rest_shown(imgtool_cli):
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/imgtool-XXXXXX"], text=True)[:-1])
    try:
        folder.chmod(0o755)
        qcow2(folder / "closed").chmod(0)
        qcow2(folder / "top", "closed")
        (folder / "shut").mkdir(mode=0)
        with without_privileges():
            result = imgtool_cli("chain", "tree", "-o", "json", folder)
            refused = imgtool_cli("chain", "tree", folder / "shut/below")
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)
    (row,) = json.loads(result.text)
    assert row["problem"] == "its backing file closed may not be read"
    assert result.err.count("permission denied") == 2 and result.status == 1
    assert "permission denied" in refused.err and refused.status == 3


@pytest.fixture
def hostile(tmp_path):
    """Images, and names in their headers, that nobody would choose."""
    folder = tmp_path / "hostile"
    base = qcow2(folder / HOSTILE)
    template = qcow2(folder / "template", "x" * 1000).read_bytes()
    (folder / "template").unlink()
    names: list[str | bytes] = [
        base.name,
        "nul\0inside",
        b"\xff\xfe",
        "\x1b[2J:x",
        "x" * 300,
        "json:" + "[" * 900,
    ]
    for number, name in enumerate(names):
        (folder / f"{number}\x01<{HOSTILE[:20]}").write_bytes(renamed_base(template, name))
    (folder / os.fsdecode(b"not\xffutf8")).write_bytes(renamed_base(template, "gone"))
    top = qcow2(folder / "format", base.name)
    named_format(top, b"\x1b]&<\xff")
    huge = qcow2(folder / "huge")
    patch(huge, 8, b"\x7f" * 12)
    patch(huge, 24, b"\xff" * 8)
    raw(folder / "sparse.raw", 4 << 40)
    os.mkfifo(folder / "fifo.qcow2")
    vmdk = b'# Disk DescriptorFile\nversion=1\nparentFileNameHint="%s"\n'
    (folder / "text.vmdk").write_bytes(vmdk % b"a\x1b[31m<&")
    (folder / "sparse.vmdk").write_bytes(b"KDMV" + b"\xff" * 508)
    qed = struct.pack("<4sIIIQQQQQII", b"QED\0", 4096, 1, 1, 1, 0, 0, 0, 1 << 62, 64, 12)
    (folder / "parent.qed").write_bytes(qed + b'x\x1b[31m<&"\\ \n')
    return folder


def test_hostile_headers_and_names_in_every_form(hostile, imgtool_cli):
    count = len(list(hostile.iterdir())) - 1  # the fifo
    table = imgtool_cli("chain", "tree", "-h", hostile)
    assert len(table.text.splitlines()) == count + 1 and table.status == 0
    rows = json.loads(imgtool_cli("chain", "tree", "-o", "json", hostile).text)
    assert len(rows) == count
    assert any(row["path"].endswith(HOSTILE) and row["overlays"] for row in rows)
    lines = imgtool_cli("chain", "tree", "-o", "jsonl", hostile).text.splitlines()
    assert [json.loads(line) for line in lines] == rows
    text = imgtool_cli("chain", "tree", "-o", "csv", hostile).text
    assert len(list(csv.reader(io.StringIO(text)))) == count + 1
    dot = imgtool_cli("chain", "tree", "-o", "dot", hostile).text
    for line in dot.splitlines()[3:-1]:
        word = r'"(?:[^"\\\n]|\\.)*"'
        assert re.fullmatch(rf"  {word} (\[label={word}(, color=red)?\]|-> {word});", line), line
    svg = imgtool_cli("chain", "tree", "--svg", "-", hostile).text
    picture = ElementTree.fromstring(svg)
    assert len(picture.findall(f".//{SVG}rect")) == count
    for said in (table.text, dot, svg):
        assert all(character.isprintable() or character == "\n" for character in said)


def test_every_number_in_a_header_at_its_worst(tmp_path, imgtool_cli):
    base = qcow2(tmp_path / "template", "base", "raw").read_bytes()
    for at in range(0, 112, 4):
        (tmp_path / f"{at}.img").write_bytes(base[:at] + b"\xff" * 4 + base[at + 4 :])
    started = time.process_time()
    assert len(rows_of(imgtool_cli, tmp_path)) == 29
    assert time.process_time() - started < 2


def test_dot_has_an_arrow_from_every_overlay_to_its_base(tmp_path, imgtool_cli):
    made = linear([tmp_path], 3, absolute=True, format="qcow2")
    text = imgtool_cli("chain", "tree", "-o", "dot", tmp_path).text
    assert text.startswith("digraph chains {\n") and text.endswith("}\n")
    assert re.findall(r'"(.*)" -> "(.*)";', text) == [
        (str(made[1]), str(made[0])),
        (str(made[2]), str(made[1])),
    ]


def test_the_picture_is_whole_and_said_to_be_written(tmp_path, imgtool_cli):
    linear([tmp_path / "images"], 3, absolute=False, format="raw")
    raw(tmp_path / "images/other.raw")
    picture = tmp_path / "forest.svg"
    result = imgtool_cli("chain", "tree", "--svg", picture, tmp_path / "images")
    assert (result.text, result.status) == ("", 0)
    assert result.err == f"imgtool: note: drawn: 4 images ({picture})\n"
    drawn = ElementTree.parse(picture).getroot()
    assert drawn.tag == f"{SVG}svg" and len(drawn.findall(f".//{SVG}rect")) == 4
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["forest.svg"]
    both = imgtool_cli("chain", "tree", "-o", "json", "--svg", picture, tmp_path / "images")
    assert len(json.loads(both.text)) == 4


def test_a_picture_never_overwrites_an_image(tmp_path, imgtool_cli):
    image = qcow2(tmp_path / "image")
    before = image.read_bytes()
    result = imgtool_cli("chain", "tree", "--svg", image, tmp_path)
    assert "would overwrite" in result.err and result.status == 4
    assert image.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, imgtool_cli):
    qcow2(tmp_path / "image")
    for where in (tmp_path, tmp_path / "missing/x.svg", "/proc/x.svg"):
        result = imgtool_cli("chain", "tree", "--svg", where, tmp_path)
        assert "cannot be written" in result.err and result.status == 1
    result = imgtool_cli("chain", "tree", "--svg", "/dev/full", tmp_path)
    assert "no space left" in result.err and result.status == 6
    assert len(list(tmp_path.iterdir())) == 1


def test_a_wrong_command_line(tmp_path, imgtool_cli):
    image = qcow2(tmp_path / "image")
    result = imgtool_cli("chain", "tree", image)
    assert "not a folder" in result.err and "chain show" in result.err
    assert str(tmp_path) in result.err and result.status == 3
    result = imgtool_cli("chain", "tree", tmp_path / "nowhere")
    assert "no such folder" in result.err and result.status == 3
    (tmp_path / "empty").mkdir()
    result = imgtool_cli("chain", "tree", tmp_path / "empty")
    assert (result.text, result.status) == ("", 0) and "no images below" in result.err
    assert imgtool_cli("chain", "tree").status == 2


def test_other_formats_and_their_parents(tmp_path, imgtool_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for format in ("vmdk", "qed", "vdi", "vhdx", "vpc"):
        qemu_img("create", "-f", format, f"base.{format}", "1M")
    for format in ("vmdk", "qed"):
        words = ("create", "-f", format, "-F", format, "-b", f"base.{format}", f"top.{format}")
        qemu_img(*words)
    qcow2(tmp_path / "pseudo", 'json:{"driver":"qed","file":{"driver":"file","filename":'
                               '"base.qed"}}', "qed")  # fmt: skip
    rows = rows_of(imgtool_cli, tmp_path)
    assert {name: row["format"] for name, row in rows.items() if "base" in name} == {
        f"base.{format}": format for format in ("vmdk", "qed", "vdi", "vhdx", "vpc")
    }
    for format in ("vmdk", "qed"):
        assert rows[f"top.{format}"]["base"] == str(tmp_path / f"base.{format}")
    assert rows["top.vmdk"]["problem"] is None and rows["pseudo"]["depth"] == 1


def test_a_chain_longer_than_pythons_stack(tmp_path, imgtool_cli):
    template = qcow2(tmp_path / "template", "x" * 8).read_bytes()[:4096]
    (tmp_path / "template").rename(tmp_path / "0.img")
    for number in range(1, 1100):
        (tmp_path / f"{number}.img").write_bytes(renamed_base(template, f"{number - 1}.img"))
    (root,) = forest([tmp_path])
    assert sum(1 for _ in root.walk()) == 1100
    assert len(imgtool_cli("chain", "tree", tmp_path).text.splitlines()) == 1101


def test_a_forest_of_hundreds(tmp_path, imgtool_cli):
    many(tmp_path, 500)
    started = time.process_time()
    rows = json.loads(imgtool_cli("chain", "tree", "-o", "json", tmp_path).text)
    assert len(rows) == 500 and max(row["depth"] for row in rows) == 10
    assert len(rows[0]["overlays"]) == 50 and not any(row["problem"] for row in rows)
    assert time.process_time() - started < 2


@pytest.mark.long
def test_a_forest_of_ten_thousand_in_ten_seconds(tmp_path, imgtool_cli):
    many(tmp_path, 10_000)
    for words in (["-o", "json"], ["-o", "dot"], ["--svg", tmp_path / "picture"], []):
        started = time.monotonic()
        result = imgtool_cli("chain", "tree", *words, tmp_path)
        assert result.status == 0 and time.monotonic() - started < 10
    assert len(result.text.splitlines()) == 10_001
    assert len(ElementTree.parse(tmp_path / "picture").findall(f".//{SVG}rect")) == 10_000
    quick = imgtool_cli("chain", "check", "--quick", "-o", "json", tmp_path)
    assert quick.status == 0
    assert {row["what"] for row in json.loads(quick.text)} == {"base-of-several"}
