"""Chains: what is followed, what is refused, and that QEMU has nothing left to guess."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import ExitStatus, ImageError, NotInGuestError, RefusedError
from imgtool.image.chain.chain import Chain, open_chain

BACKING_FORMAT = bytes.fromhex("e2792aca")


def qemu_img(*words: str | Path) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True).stdout


def write(path: Path, pattern: int, where: str, format: str = "qcow2") -> None:
    command = ("qemu-io", "-f", format, "-c", f"write -P {pattern} {where}", path)
    subprocess.run(command, check=True, capture_output=True)


def overlay(path: Path, backing: str, *, format: str | None = "raw", size: str = "4M") -> Path:
    """An overlay whose header names `backing` as it is; no format in it if `format` is None."""
    qemu_img("create", "-f", "qcow2", "-u", "-b", backing, "-F", format or "raw", path, size)
    if format is None:
        header = path.read_bytes()
        path.write_bytes(header.replace(BACKING_FORMAT, b"\x12\x34\x56\x78", 1))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "vm" / "base.raw"
    path.parent.mkdir()
    path.write_bytes(b"base" * (1 << 20))
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "secret"
    path.parent.mkdir()
    path.write_bytes(b"secret" * 1000)
    return path


def names(chain: Chain) -> list[str]:
    return [link.path.name for link in chain.links]


def test_a_chain_is_listed_from_the_active_image_to_the_base(base: Path) -> None:
    (base.parent / "sub").mkdir()
    middle = overlay(base.parent / "sub" / "middle.qcow2", "../base.raw")
    active = overlay(base.parent / "active.qcow2", "sub/middle.qcow2", format="qcow2")
    chain = open_chain(active)
    assert names(chain) == ["active.qcow2", "middle.qcow2", "base.raw"]
    assert chain.active.path == active and chain.base.path.samefile(base)
    assert [link.probed for link in chain.links] == [True, False, False]
    assert chain.links[1].path.samefile(middle)
    assert chain.problems == ()


def test_a_relative_path_of_the_active_image_is_enough(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay(base.parent / "active.qcow2", "base.raw")
    monkeypatch.chdir(base.parent)
    assert names(open_chain("active.qcow2")) == ["active.qcow2", "base.raw"]


def test_file_colon_is_a_local_file(base: Path) -> None:
    active = overlay(base.parent / "active.qcow2", f"file:{base}")
    assert names(open_chain(active)) == ["active.qcow2", "base.raw"]


def test_missing_backing_file_is_named_with_its_link(base: Path) -> None:
    active = overlay(base.parent / "active.qcow2", "gone.raw")
    with pytest.raises(ImageError, match=r"gone\.raw.*missing.*active\.qcow2") as caught:
        open_chain(active)
    assert caught.value.status is ExitStatus.IMAGE_UNREADABLE


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_loop_is_found(length: int, tmp_path: Path) -> None:
    for number in range(length):
        overlay(tmp_path / f"{number}", f"{(number + 1) % length}", format="qcow2")
    with pytest.raises(ImageError, match="loop") as caught:
        open_chain(tmp_path / "0")
    assert caught.value.status is ExitStatus.IMAGE_UNREADABLE


def test_backing_file_outside_the_folder_needs_permission(
    base: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = overlay(base.parent / "active.qcow2", str(secret))
    with pytest.raises(RefusedError, match=re.escape(str(secret))) as caught:
        open_chain(active)
    assert caught.value.status is ExitStatus.REFUSED
    assert f"--backing-dir {secret.parent}" in str(caught.value.hint)
    assert names(open_chain(active, backing_dirs=[secret.parent])) == ["active.qcow2", "secret"]
    monkeypatch.setenv("IMGTOOL_BACKING_DIRS", f"/nowhere:{secret.parent.parent}")
    assert names(open_chain(active)) == ["active.qcow2", "secret"]


def test_a_refusal_does_not_tell_whether_the_file_is_there(base: Path, secret: Path) -> None:
    active = overlay(base.parent / "active.qcow2", str(secret.parent / "not-there"))
    with pytest.raises(RefusedError):
        open_chain(active)


def test_a_symlink_does_not_lead_out_of_the_folder(base: Path, secret: Path) -> None:
    (base.parent / "innocent").symlink_to(secret)
    active = overlay(base.parent / "active.qcow2", "innocent")
    with pytest.raises(RefusedError, match="innocent"):
        open_chain(active)
    (base.parent / "circle").symlink_to("circle")
    with pytest.raises(ImageError):
        open_chain(overlay(base.parent / "active2.qcow2", "circle"))


def test_a_symlinked_image_finds_its_base_by_absolute_name(base: Path, tmp_path: Path) -> None:
    active = overlay(base.parent / "active.qcow2", str(base))
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "vm"
    link.symlink_to(active)
    assert names(open_chain(link)) == ["vm", "base.raw"]


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"file","filename":"/etc/passwd"}',
        "nbd:unix:/run/x",
        "nbd://localhost/x",
        "http://localhost/x",
        "ssh://localhost/x",
        "fat:rw:/etc",
        "rbd:pool/image",
        "fd:3",
    ],
)
def test_what_is_no_local_file_is_refused(name: str, tmp_path: Path) -> None:
    # Created on a plain name of the same length: QEMU itself would try to open some of these.
    plain = "x" * len(name)
    active = overlay(tmp_path / "active.qcow2", plain)
    active.write_bytes(active.read_bytes().replace(plain.encode(), name.encode(), 1))
    with pytest.raises(RefusedError, match=re.escape(name)) as caught:
        open_chain(active)
    assert caught.value.status is ExitStatus.REFUSED


def test_a_hostile_name_stays_on_one_line(tmp_path: Path) -> None:
    active = overlay(tmp_path / "active.qcow2", "ab\n\x1b[2Jcd")
    with pytest.raises(ImageError) as caught:
        open_chain(active)
    assert str(caught.value).isprintable()


def test_a_base_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="neither a file nor"):
        open_chain(overlay(tmp_path / "active.qcow2", "fifo"))
    with pytest.raises(ImageError, match="vvfat"):
        bad = overlay(tmp_path / "bad.qcow2", "fifo", format="qcow2")
        bad.write_bytes(bad.read_bytes().replace(b"qcow2", b"vvfat", 1))
        open_chain(bad)


def test_raw_guest_with_a_qcow2_header_gets_no_file_of_the_host(base: Path, secret: Path) -> None:
    fake = overlay(base.parent / "fake", str(secret)).read_bytes()
    with base.open("r+b") as file:
        file.write(fake)
    # The disk itself, its format said, guessed, and guessed against its name:
    assert names(open_chain(base, format="raw")) == ["base.raw"]
    with pytest.raises(RefusedError, match=r"named \.raw"):
        open_chain(base)
    plain = base.rename(base.with_name("base.img"))
    with pytest.raises(RefusedError, match="secret") as caught:
        open_chain(plain)
    assert "--format raw" in str(caught.value.hint)
    # Below an overlay that says the format, and below one that does not:
    assert names(open_chain(overlay(base.parent / "a", "base.img"))) == ["a", "base.img"]
    with pytest.raises(RefusedError, match="secret"):
        open_chain(overlay(base.parent / "b", "base.img", format=None))


def test_a_guessed_backing_format_is_followed_and_told(base: Path) -> None:
    overlay(base.parent / "middle", "base.raw")
    active = overlay(base.parent / "active", "middle", format=None)
    chain = open_chain(active)
    assert [link.format for link in chain.links] == ["qcow2", "qcow2", "raw"]
    assert len(chain.problems) == 1 and "names no format" in chain.problems[0]
    raw_below = open_chain(overlay(base.parent / "other", "base.raw", format=None))
    assert [link.format for link in raw_below.links] == ["qcow2", "raw"]
    assert raw_below.problems == ()


def linked(folder: Path, links: int) -> Path:
    """The active image of a chain of that many links."""
    template = overlay(folder / "template", "link-000", format="qcow2", size="1M").read_bytes()
    qemu_img("create", "-f", "qcow2", folder / "link-000", "1M")
    for number in range(1, links):
        below = f"link-{number - 1:03}".encode()
        (folder / f"link-{number:03}").write_bytes(template.replace(b"link-000", below, 1))
    return folder / f"link-{links - 1:03}"


def test_a_longer_chain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgtool.image.chain.chain.MAX_LINKS", 5)
    with pytest.raises(RefusedError, match="more than 5 links"):
        open_chain(linked(tmp_path, 6))


def drivers(node: dict[str, Any]) -> list[str]:
    found = [node["driver"]]
    for child in ("file", "data-file", "backing"):
        if node.get(child) is not None:
            found += drivers(node[child])
    return found


def test_the_description_leaves_qemu_nothing_to_guess(base: Path) -> None:
    overlay(base.parent / "middle", "base.raw", format=None)
    chain = open_chain(overlay(base.parent / "active", "middle", format=None))
    node: Any = chain.blockdev()
    assert drivers(node) == ["qcow2", "file", "qcow2", "file", "raw", "file"]
    assert node["backing"]["backing"]["file"]["filename"] == str(base)
    base_of_its_own = base.parent / "alone"
    qemu_img("create", "-f", "qcow2", base_of_its_own, "1M")
    assert open_chain(base_of_its_own).blockdev()["backing"] is None


def test_name_that_qemu_guesses_or_finds_elsewhere_is_unsafe(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle = overlay(base.parent / "middle", "base.raw")
    assert open_chain(middle).safe_by_name
    assert open_chain(overlay(base.parent / "active", "middle", format="qcow2")).safe_by_name
    assert not open_chain(overlay(base.parent / "guess", "base.raw", format=None)).safe_by_name
    monkeypatch.chdir(tmp_path)
    for data_file, safe in ("data", False), (str(tmp_path / "absolute"), True):
        qemu_img("create", "-f", "qcow2", "-o", f"data_file={data_file}", "disk", "1M")
        assert open_chain("disk").safe_by_name is safe


def test_description_gives_qemu_what_it_reads_by_itself(base: Path) -> None:
    middle = overlay(base.parent / "middle", "base.raw")
    active = overlay(base.parent / "active", "middle", format="qcow2")
    write(middle, 1, "1M 1M")
    write(active, 2, "2M 1M")
    qemu_img("convert", "-O", "raw", active, base.parent / "expected")
    qemu_img("convert", "-O", "raw", open_chain(active).filename(), base.parent / "found")
    expected = (base.parent / "expected").read_bytes()
    assert (base.parent / "found").read_bytes() == expected
    assert {expected[0], expected[1 << 20], expected[2 << 20]} == {ord("b"), 1, 2}


@pytest.mark.parametrize("format", ["raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx"])
def test_every_format_opens_through_the_description(format: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", format, path, "8M")
    assert json.loads(qemu_img("map", "--output=json", open_chain(path).filename()))


def test_data_files_and_extents_open_through_the_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-f", "qcow2", "-o", "data_file=data", "disk", "1M")
    qemu_img("create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "disk.vmdk", "1M")
    write(tmp_path / "disk", 5, "0 64k")
    write(tmp_path / "disk.vmdk", 6, "0 64k", "vmdk")
    monkeypatch.chdir("/")
    for name, content in ("disk", 5), ("disk.vmdk", 6):
        chain = open_chain(tmp_path / name)
        qemu_img("convert", "-O", "raw", chain.filename(), tmp_path / "found")
        assert (tmp_path / "found").read_bytes()[:65536] == bytes([content]) * 65536
        assert len(chain.files) == 2


def test_snapshot_is_found_by_name_or_id_or_others_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", "qcow2", path, "1M")
    with pytest.raises(NotInGuestError) as caught:
        open_chain(path).snapshot("before")
    assert caught.value.hint == "it has no internal snapshots"
    qemu_img("snapshot", "-c", "2", path)
    qemu_img("snapshot", "-c", "before", path)
    chain = open_chain(path)
    assert chain.snapshot("before").id == "2"
    assert chain.snapshot("2").id == "1"
    assert chain.snapshot("1").name == "2"
    with pytest.raises(NotInGuestError) as caught:
        chain.snapshot("after")
    assert caught.value.status is ExitStatus.NOT_IN_GUEST
    assert caught.value.hint == "it has: 2, before"
