"""Which overlays stand on an image, told by their headers alone, whatever is in the folder."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from imgtool.errors import RefusedError
from imgtool.image.chain.chain import open_chain
from imgtool.image.checks.dependants import overlays_on, refuse_if_base

MAGIC = b"QFI\xfb"


def overlay(path: Path, backing: bytes | str, *, offset: int = 104, length: int = -1) -> Path:
    """A file with a qcow2 header that names a backing file."""
    name = os.fsencode(backing)
    length = len(name) if length < 0 else length
    header = MAGIC + struct.pack(">IQI", 3, offset, length)
    path.write_bytes(header.ljust(104, b"\0") + name)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "base.raw"
    path.parent.mkdir()
    path.write_bytes(bytes(4096))
    return path


def test_nothing_stands_on_it(base):
    (base.parent / "note.txt").write_text("nothing")
    overlay(base.parent / "other.qcow2", "another.raw")
    (base.parent / "another.raw").write_bytes(b"")
    assert overlays_on(base) == []


@pytest.mark.parametrize(
    "named", ["base.raw", "./base.raw", "file:base.raw", "../images/base.raw", "{base}",
              "file:{base}", "link.raw", "hard.raw"]
)  # fmt: skip
def test_every_way_to_name_it(base, named):
    (base.parent / "link.raw").symlink_to("base.raw")
    (base.parent / "hard.raw").hardlink_to(base)
    above = overlay(base.parent / "above.qcow2", named.format(base=base))
    assert overlays_on(base) == [above]


def test_the_real_thing(base):
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F"]
    first, second = base.parent / "first.qcow2", base.parent / "second.qcow2"
    subprocess.run([*words, "raw", "-b", "base.raw", first], check=True)
    subprocess.run([*words, "qcow2", "-b", str(first), second], check=True)
    assert overlays_on(base) == [first]
    assert overlays_on(first) == [second]
    assert overlays_on(second) == []


def test_an_image_that_is_named_by_a_link(base, tmp_path):
    above = overlay(base.parent / "above.qcow2", "base.raw")
    link = base.parent / "alias.raw"
    link.symlink_to(base)
    assert overlays_on(link) == [above]


def test_folders_that_are_named(base, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    above = overlay(elsewhere / "above.qcow2", str(base))
    assert overlays_on(base) == []
    assert overlays_on(base, [elsewhere]) == [above]
    monkeypatch.setenv("IMGTOOL_BACKING_DIRS", str(elsewhere))
    assert overlays_on(base) == [above]
    assert overlays_on(base, [elsewhere, base.parent]) == [above]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        MAGIC,
        MAGIC + bytes(15),
        MAGIC + struct.pack(">IQI", 3, 0, 8),
        MAGIC + struct.pack(">IQI", 3, 104, 0),
        MAGIC + struct.pack(">IQI", 3, 104, 0xFFFFFFFF),
        MAGIC + struct.pack(">IQI", 3, 1 << 63, 8),
        MAGIC + struct.pack(">IQI", 3, (1 << 63) - 1, 8),
        MAGIC + struct.pack(">IQI", 3, (1 << 64) - 1, 1023),
        MAGIC + struct.pack(">IQI", 3, 1 << 40, 8),
    ],
)
def test_headers_that_make_no_sense(base, header):
    (base.parent / "odd.qcow2").write_bytes(header)
    assert overlays_on(base) == []


@pytest.mark.parametrize(
    "named",
    ["", "missing.raw", "base.raw\0", "x" * 1023, "nbd://host/x", "json:{}", b"\xff\xfe", "/"],
)
def test_names_that_lead_nowhere(base, named):
    overlay(base.parent / "odd.qcow2", named)
    assert overlays_on(base) == []


def test_what_is_no_file_is_not_opened(base):
    """A fifo would block for ever, and a folder or a dangling link is no overlay."""
    os.mkfifo(base.parent / "fifo.qcow2")
    (base.parent / "folder.qcow2").mkdir()
    (base.parent / "dangling.qcow2").symlink_to("nowhere")
    above = overlay(base.parent / "above.qcow2", "base.raw")
    assert overlays_on(base) == [above]


def test_a_folder_that_cannot_be_read(base, tmp_path):
    assert overlays_on(base, [tmp_path / "missing"]) == []


def test_refused_by_name(base):
    for number in range(12):
        overlay(base.parent / f"above-{number:02}.qcow2", "base.raw")
    with pytest.raises(RefusedError, match="the base of overlays") as refused:
        refuse_if_base(open_chain(base, format="raw"))
    assert str(refused.value).count("above-") == 8 and "and 4 more" in str(refused.value)
    assert refused.value.hint is not None


def test_the_top_of_a_chain_is_no_base(base):
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"]
    subprocess.run([*words, base.parent / "top.qcow2"], check=True)
    refuse_if_base(open_chain(base.parent / "top.qcow2"))
    with pytest.raises(RefusedError, match=r"an overlay: .*top\.qcow2"):
        refuse_if_base(open_chain(base, format="raw"))
