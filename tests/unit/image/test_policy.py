"""Where a base is looked for: beside the image itself, beside links to it, and by its name in a
folder that was given; and that nothing is written to a chain of which only we know where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import ImageError, Reason, RefusedError
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.change.overlays import plan_commit, plan_rebase
from imgtool.image.checks.dependants import overlays_on
from imgtool.image.checks.doubts import doubts_of
from imgtool.image.policy import folders_of
from imgtool.image.qemu.disk_reader import open_contents

MIB = 1 << 20


def qemu_img(*words: str | Path, cwd: Path | None = None) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, cwd=cwd).stdout


def raw(path: Path, byte: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([byte]) * MIB)
    os.utime(path, (1, 1))
    return path


def overlay(path: Path, base: str | Path, format: str = "raw") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    words = ["create", "-q", "-u", "-f", "qcow2", "-b", str(base), "-F", format]
    qemu_img(*words, path, "1M")
    return path


def first_byte(chain: Chain) -> int:
    with open_contents(chain) as (read, _):
        return read(0, 1)[0]


def backing_in(path: Path) -> str:
    return str(json.loads(qemu_img("info", "--output=json", path))["backing-filename"])


def by_qemu(path: Path) -> bytes:
    """What QEMU reads of an image, following the names in it by itself."""
    out = path.with_name("read")
    qemu_img("convert", "-O", "raw", path, out)
    content = out.read_bytes()
    out.unlink()
    return content


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A link in the folder `links` to an overlay in `images`, whose base it names relatively."""
    raw(tmp_path / "images/base.raw", 1)
    image = overlay(tmp_path / "images/disk.qcow2", "base.raw")
    link = tmp_path / "links/vm.qcow2"
    link.parent.mkdir()
    link.symlink_to(image)
    return link


# By links


def test_relative_name_starts_at_the_file_not_at_a_link(linked: Path) -> None:
    chain = open_chain(linked)
    assert chain.base.path == linked.parents[1] / "images/base.raw"
    assert first_byte(chain) == 1 and chain.safe_by_name and not chain.notes


def test_base_beside_the_link_alone_is_read_and_not_written_to(linked: Path) -> None:
    (linked.parents[1] / "images/base.raw").rename(linked.parent / "base.raw")
    chain = open_chain(linked)
    assert first_byte(chain) == 1 and not chain.safe_by_name
    with pytest.raises(RefusedError, match="not where the name in it leads") as caught:
        plan_commit(linked)
    assert_rebase(str(caught.value.hint), linked.resolve(), b"\1" * MIB)


def assert_rebase(hint: str, image: Path, content: bytes) -> None:
    """The hint, followed to the letter, makes an image that QEMU reads by itself."""
    words = hint[hint.index("imgtool") :].split()
    assert words[0] == "imgtool"
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    assert by_qemu(image) == content


def test_two_bases_of_one_name_are_told_apart_by_the_user(linked: Path, imgtool_cli: Any) -> None:
    raw(linked.parent / "base.raw", 2)
    with pytest.raises(RefusedError, match="one file beside the link") as caught:
        open_chain(linked)
    real = linked.resolve()
    assert str(caught.value.hint).endswith(str(real))
    assert first_byte(open_chain(real)) == 1
    for words in (["chain", "show"], ["overlay", "flatten"], ["compact"], ["df"], ["info"]):
        done = imgtool_cli(*words, linked)
        assert done.status == 4 and "beside the link" in done.err, words


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("place", ["images", "images/sub", "links", "elsewhere"])
def test_rebase_through_a_link_writes_a_name_seen_from_the_file(
    linked: Path, unsafe: bool, place: str, imgtool_cli: Any
) -> None:
    """Wherever the new base is, and whatever has its name beside the link."""
    folder = linked.parents[1]
    base = raw(folder / place / "new.raw", 1)
    if place != "links":
        raw(linked.parent / "new.raw", 9)
    words = ["overlay", "rebase", linked, base, "--base-format", "raw"]
    words += ["--backing-dir", folder, *(["--unsafe"] if unsafe else [])]
    done = imgtool_cli(*words)
    assert done.status == 0, done.err
    assert linked.is_symlink()
    real = linked.resolve()
    named = backing_in(real)
    assert os.path.samefile(real.parent / named, base)
    assert by_qemu(real) == b"\1" * MIB


def test_compact_through_a_link_keeps_the_base(linked: Path, imgtool_cli: Any) -> None:
    subprocess.run(["qemu-io", "-c", "write -P 5 0 64k", linked.resolve()], check=True)
    subprocess.run(["qemu-io", "-c", "write -z 0 64k", linked.resolve()], check=True)
    done = imgtool_cli("compact", linked)
    assert done.status == 0, done.err
    assert backing_in(linked.resolve()) == "base.raw"
    assert by_qemu(linked.resolve()) == bytes(64 << 10) + b"\1" * (MIB - (64 << 10))


@pytest.mark.parametrize("base", ["link", "link to a link", "file"])
def test_an_overlay_made_on_a_link_names_what_the_link_leads_to(
    linked: Path, base: str, imgtool_cli: Any
) -> None:
    """QEMU would look beside the link for what the overlay's base stands on."""
    if base == "link to a link":
        (linked.parent / "second.qcow2").symlink_to("vm.qcow2")
    below = {
        "link": linked,
        "link to a link": linked.parent / "second.qcow2",
        "file": linked.resolve(),
    }[base]
    new = linked.parents[1] / "clones/clone.qcow2"
    new.parent.mkdir()
    words = ["overlay", "create", below, new, "--backing-dir", linked.parents[1]]
    done = imgtool_cli(*words)
    assert done.status == 0, done.err
    assert by_qemu(new) == b"\1" * MIB


def test_new_overlay_at_a_linked_folder_finds_its_base(linked: Path, imgtool_cli: Any) -> None:
    folder = linked.parents[1]
    (folder / "door").symlink_to("images")
    done = imgtool_cli("overlay", "create", folder / "images/base.raw", folder / "door/new.qcow2",
                       "--base-format", "raw")  # fmt: skip
    assert done.status == 0, done.err
    assert backing_in(folder / "images/new.qcow2") == "base.raw"


# The guards


@pytest.mark.parametrize("beside", ["images", "links", "middle"])
def test_overlays_beside_every_link_to_a_base_are_seen(tmp_path: Path, beside: str) -> None:
    base = raw(tmp_path / "images/base.raw", 1)
    for folder, target in (("middle", base), ("links", tmp_path / "middle/base.raw")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base.raw").symlink_to(target)
    above = overlay(tmp_path / beside / "above.qcow2", "base.raw")
    assert overlays_on(tmp_path / "links/base.raw") == [above]
    assert folders_of(tmp_path / "links/base.raw") == (
        *(tmp_path / "links", tmp_path / "middle", tmp_path / "images"),
    )


def test_linked_overlay_counts_at_its_file_and_at_the_link(
    tmp_path: Path,
) -> None:
    base, other = raw(tmp_path / "a/base.raw", 1), raw(tmp_path / "b/base.raw", 2)
    (tmp_path / "a/link.qcow2").symlink_to(overlay(tmp_path / "b/above.qcow2", "base.raw"))
    assert overlays_on(base) == [tmp_path / "a/link.qcow2"]
    assert overlays_on(other) == [tmp_path / "b/above.qcow2"]


def test_a_commit_sees_the_overlays_beside_its_own(tmp_path: Path) -> None:
    base = raw(tmp_path / "bases/base.raw", 1)
    mine, other = (overlay(tmp_path / "mine" / name, base) for name in ("mine", "other"))
    with pytest.raises(RefusedError, match="base of an overlay") as caught:
        plan_commit(mine, backing_dirs=[base.parent])
    assert caught.value.reason is Reason.IS_BASE and str(other) in str(caught.value)


# By its name


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """An overlay on an overlay on a raw image, copied elsewhere: none is where the header says."""
    raw(tmp_path / "copy/base", 1)
    middle = overlay(tmp_path / "copy/middle.qcow2", "/srv/images/base")
    subprocess.run(["qemu-img", "rebase", "-u", "-b", "/srv/images/base", "-F", "raw", middle])
    return overlay(tmp_path / "top/disk.qcow2", "../gone/middle.qcow2", "qcow2")


def test_chain_is_found_by_its_names_in_a_given_folder(copied: Path) -> None:
    folder = copied.parents[1] / "copy"
    before = copied.read_bytes()
    with pytest.raises(RefusedError, match="outside the folders") as refused:
        open_chain(copied)
    assert "--backing-dir FOLDER" in str(refused.value.hint)
    with pytest.raises(ImageError, match="missing") as caught:
        open_chain(overlay(copied.parent / "other", "base.raw"))
    assert "--backing-dir FOLDER" in str(caught.value.hint)
    chain = open_chain(copied, backing_dirs=[folder])
    assert [link.path.name for link in chain.links] == ["disk.qcow2", "middle.qcow2", "base"]
    assert [link.format for link in chain.links] == ["qcow2", "qcow2", "raw"]
    assert first_byte(chain) == 1 and not chain.safe_by_name
    assert len(chain.notes) == 2
    assert "../gone/middle.qcow2' is not there" in chain.notes[0]
    assert str(folder / "middle.qcow2") in chain.notes[0]
    assert set(chain.notes) <= set(doubts_of(chain))
    assert copied.read_bytes() == before


def test_so_it_is_by_the_environment(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGTOOL_BACKING_DIRS", str(copied.parents[1] / "copy"))
    assert first_byte(open_chain(copied)) == 1


def test_file_where_the_header_says_is_not_sought_elsewhere(linked: Path) -> None:
    other = raw(linked.parents[1] / "other/base.raw", 9)
    chain = open_chain(linked, backing_dirs=[other.parent])
    assert first_byte(chain) == 1 and not chain.notes
    outside = overlay(linked.parents[1] / "far/disk.qcow2", linked.resolve().parent / "base.raw")
    with pytest.raises(RefusedError, match="outside the folders"):
        open_chain(outside, backing_dirs=[other.parent])


def test_several_of_that_name_are_for_the_user_to_choose_from(copied: Path) -> None:
    folder = copied.parents[1]
    overlay(folder / "second/middle.qcow2", folder / "copy/base")
    with pytest.raises(RefusedError, match="several"):
        open_chain(copied, backing_dirs=[folder / "copy", folder / "second"])
    (folder / "third").symlink_to("copy")
    assert open_chain(copied, backing_dirs=[folder / "copy", folder / "third"])


def test_a_link_in_that_folder_does_not_lead_out_of_it(copied: Path) -> None:
    folder = copied.parents[1]
    secret = raw(folder / "secret", 7)
    (folder / "copy/base").unlink()
    (folder / "copy/base").symlink_to(secret)
    with pytest.raises(RefusedError, match="leads out"):
        open_chain(copied, backing_dirs=[folder / "copy"])


def test_every_command_that_reads_finds_it_and_says_so_once(
    copied: Path, imgtool_cli: Any, tmp_path: Path
) -> None:
    folder = copied.parents[1] / "copy"
    given = ["--backing-dir", folder]
    new = tmp_path / "new.raw"
    for words, status in (
        (["chain", "show", copied], 0),
        (["chain", "check", copied], 0),
        (["info", copied], 0),
        (["partitions", copied], 0),
        (["convert", copied, new, "--to", "raw"], 0),
        (["df", copied, "--engine", "direct"], 1),
    ):
        done = imgtool_cli(*words, *given)
        said = done.text + done.err
        assert done.status == status, (words, said)
        assert (
            said.count("middle.qcow2' is not there") + said.count("middle.qcow2 is not there") == 1
        ), (words, said)
    assert new.read_bytes() == b"\1" * MIB


def test_it_is_not_written_to_and_the_hint_helps(copied: Path, imgtool_cli: Any) -> None:
    folder = copied.parents[1] / "copy"
    before = {path: path.read_bytes() for path in (copied, *folder.iterdir())}
    for words in (
        ["overlay", "commit", copied],
        ["overlay", "flatten", copied],
        ["compact", copied],
        ["resize", copied, "2M"],
        ["snapshot", "create", copied, "s"],
        ["overlay", "create", copied, folder / "new.qcow2"],
        ["copy-in", copied, folder / "base", "/"],
    ):
        done = imgtool_cli(*words, "--backing-dir", folder)
        assert done.status == 4 and "overlay rebase --unsafe" in done.err, (words, done.err)
    assert {path: path.read_bytes() for path in before} == before
    hints = []
    for image in (folder / "middle.qcow2", copied):
        done = imgtool_cli("overlay", "flatten", image, "--backing-dir", folder)
        line = done.err.splitlines()[-1]
        hints += [line[line.index("overlay rebase") :].split()]
        done = imgtool_cli(*hints[-1], "--backing-dir", folder)
        assert done.status == 0, done.err
    assert by_qemu(copied) == b"\1" * MIB


def test_rebase_puts_it_on_the_base_that_was_found(copied: Path) -> None:
    folder = copied.parents[1] / "copy"
    plan = plan_rebase(
        copied, folder / "middle.qcow2", base_format="qcow2", unsafe=True, backing_dirs=[folder]
    )
    plan.run()
    chain = open_chain(copied, backing_dirs=[folder])
    assert len(chain.notes) == 1 and chain.links[1].found is None


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two overlays on a filesystem, copied with it to another folder; one holds a file more."""
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "file").write_bytes(b"content")
    base = tmp_path / "copy/base.raw"
    base.parent.mkdir()
    subprocess.run(["mke2fs", "-q", "-d", folder, base, "1M"], check=True)
    os.utime(base, (1, 1))
    found = [overlay(tmp_path / "copy" / name, base) for name in ("one", "two")]
    (tmp_path / "more").write_bytes(b"more")
    full = tmp_path / "full.raw"
    full.write_bytes(base.read_bytes())
    argv = ("debugfs", "-w", "-R", f"write {tmp_path}/more more", full)
    subprocess.run(argv, check=True, capture_output=True)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-B", base, "-F", "raw", full, found[1])
    for path in found:
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/gone/base.raw", path)
    return found[0], found[1]


def test_diff_and_cat_read_what_was_found(pair: tuple[Path, Path], imgtool_cli: Any) -> None:
    one, two = pair
    given = ["--backing-dir", one.parent]
    done = imgtool_cli("diff", one, two, "-m", "/dev/sda", "--engine", "direct", *given)
    assert done.status == 0, done.err
    assert "/more" in done.text and "/file" not in done.text
    assert done.err.count("is not there") == 2
    done = imgtool_cli("cat", one, "/file", "--engine", "direct", *given)
    assert (done.status, done.out) == (0, b"content"), done.err
    assert imgtool_cli("cat", one, "/file", "--engine", "direct").status == 4
