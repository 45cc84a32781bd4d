"""Images as other makers leave them: with parents that QEMU does not read, footers, cut off."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imgtool import cli
from imgtool.errors import ExitStatus, ImageError, RefusedError
from imgtool.formats import vdi, vhd, vhdx, vmdk
from imgtool.image import headers
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.info import probe
from imgtool.image.change.guards import refuse_to_write
from imgtool.image.change.single import plan_convert, plan_new, plan_repair, plan_resize
from imgtool.image.checks.dependants import overlays_on
from imgtool.image.checks.forest import forest
from imgtool.image.qemu.qemu_img import same_content
from tests.support.checks import check_chain
from tests.support.format_images import (
    SIZE,
    Kind,
    cut,
    differencing_vdi,
    differencing_vhd,
    differencing_vhdx,
    patch,
    patch_footer,
    qemu_img,
    qemu_io,
)

EXACT = Kind("vpc", "force_size=on")
FIXED = Kind("vpc", "subformat=fixed,force_size=on")


def run(*words: object) -> int:
    try:
        return int(cli._run([str(word) for word in words]))
    except SystemExit as ended:
        return int(ended.code or 0)


# Each gives an image that stands on `parent`, and how it calls it.


def _vhd(folder: Path) -> tuple[Path, Path, str]:
    parent = EXACT.make(folder / "parent.vhd")
    return parent, differencing_vhd(folder / "delta.vhd", parent, "parent.vhd"), "parent.vhd"


def _vhd_of_windows(folder: Path) -> tuple[Path, Path, str]:
    parent = EXACT.make(folder / "parent.vhd")
    name = "C:\\VMs\\Grün\\parent.vhd"
    return parent, differencing_vhd(folder / "delta.avhd", parent, name), name


def _vhd_with_locator(folder: Path) -> tuple[Path, Path, str]:
    parent = EXACT.make(folder / "parent.vhd")
    name = ".\\parent.vhd"
    delta = differencing_vhd(folder / "delta.vhd", parent, "D:\\elsewhere.vhd", locator=name)
    return parent, delta, name


def _vhd_renamed(folder: Path) -> tuple[Path, Path, str]:
    parent, delta, name = _vhd(folder)
    return parent.rename(folder / "renamed.vhd"), delta, name


def _vdi(folder: Path) -> tuple[Path, Path, str]:
    parent = Kind("vdi").make(folder / "parent.vdi")
    return parent, differencing_vdi(folder / "delta.vdi", parent), "parent.vdi"


def _vhdx(folder: Path) -> tuple[Path, Path, str]:
    parent, name = Kind("vhdx").make(folder / "parent.vhdx"), "..\\base\\parent.vhdx"
    return parent, differencing_vhdx(folder / "delta.avhdx", parent, name), name


def _vhdx_renamed(folder: Path) -> tuple[Path, Path, str]:
    parent, delta, name = _vhdx(folder)
    return parent.rename(folder / "renamed.vhdx"), delta, name


def _vmdk(folder: Path) -> tuple[Path, Path, str]:
    """A VMDK that says that it has a parent, and does not name it."""
    parent = Kind("vmdk").make(folder / "parent.vmdk")
    delta = folder / "delta.vmdk"
    qemu_img("create", "-f", "vmdk", "-F", "vmdk", "-b", parent, delta)
    content = delta.read_bytes()
    at = content.index(b"parentFileNameHint")
    patch(delta, at, b"#")
    return parent, delta, "parent.vmdk"


MAKERS = [_vhd, _vhd_of_windows, _vhd_with_locator, _vhd_renamed, _vdi, _vhdx, _vhdx_renamed, _vmdk]
every_maker = pytest.mark.parametrize("make", MAKERS, ids=[m.__name__.strip("_") for m in MAKERS])
Make = Callable[[Path], tuple[Path, Path, str]]


@every_maker
def test_parent_that_qemu_ignores_is_refused_by_name(make: Make, tmp_path: Path):
    _, delta, name = make(tmp_path)
    with pytest.raises(ImageError, match="differencing") as caught:
        probe(delta)
    assert caught.value.status is ExitStatus.IMAGE_UNREADABLE
    assert f"'{name}'" in str(caught.value)
    with pytest.raises(ImageError, match="differencing"):
        open_chain(delta, format=headers.format_of(delta.read_bytes()[:512]))


COMMANDS = {
    "info": ["info", "IMAGE"],
    "ls": ["ls", "IMAGE", "/"],
    "check": ["check", "IMAGE"],
    "repair": ["check", "--repair", "all", "IMAGE"],
    "chain show": ["chain", "show", "IMAGE"],
    "chain check": ["chain", "check", "IMAGE"],
    "partitions": ["partitions", "IMAGE"],
    "filesystems": ["filesystems", "IMAGE"],
    "df": ["df", "IMAGE"],
    "cat": ["cat", "IMAGE", "/x"],
    "copy-out": ["copy-out", "IMAGE", "/x", "NEW"],
    "copy-in": ["copy-in", "IMAGE", "FILE", "/"],
    "edit": ["edit", "IMAGE", "/x", "-e", "s/a/b/"],
    "convert": ["convert", "IMAGE", "NEW"],
    "resize": ["resize", "IMAGE", "1G"],
    "compact": ["compact", "IMAGE"],
    "mount": ["mount", "IMAGE", "FOLDER"],
    "overlay": ["overlay", "create", "IMAGE", "NEW"],
    "snapshot": ["snapshot", "list", "IMAGE"],
    "diff": ["diff", "IMAGE", "OTHER"],
    "diff after": ["diff", "OTHER", "IMAGE"],
    "inspect": ["inspect", "IMAGE"],
    "inject": ["inject", "IMAGE", "--hostname", "x"],
    "mount to write": ["mount", "--rw", "IMAGE", "FOLDER"],
    "commit": ["overlay", "commit", "IMAGE"],
    "rebase": ["overlay", "rebase", "IMAGE", "OTHER"],
    "flatten": ["overlay", "flatten", "IMAGE"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_refuses_it(words, tmp_path, capfd):
    parent, delta, _ = _vhd(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    names = {"IMAGE": delta, "OTHER": parent, "NEW": tmp_path / "new"}
    names |= {"FILE": tmp_path / "file", "FOLDER": tmp_path / "folder"}
    before = delta.read_bytes()
    assert run(*(names.get(word, word) for word in words)) == ExitStatus.IMAGE_UNREADABLE
    said = capfd.readouterr()
    assert "'parent.vhd'" in said.out + said.err
    assert not (tmp_path / "new").exists()
    assert delta.read_bytes() == before


@every_maker
def test_the_parent_counts_as_a_base(make: Make, tmp_path: Path):
    parent, delta, _ = make(tmp_path)
    assert overlays_on(parent) == [delta]
    if parent.suffix != ".vhdx":  # which is not written to in any case
        with pytest.raises(RefusedError, match="it is the base of an overlay") as caught:
            refuse_to_write(open_chain(parent))
        assert delta.name in str(caught.value)
    trees = {tree.path: tree for tree in forest([tmp_path])}
    assert [tree.path for tree in trees[parent].overlays] == [delta]
    assert "differencing" in str(trees[parent].overlays[0].problem)


def test_another_image_is_no_base_of_it(tmp_path: Path):
    parent, _, _ = _vhd(tmp_path)
    other = EXACT.make(tmp_path / "other.vhd")
    copy = Path(shutil.copy(parent, tmp_path / "copy.vhd"))
    assert overlays_on(other) == []
    assert overlays_on(copy) == [], "what it stands on is there by its name"
    refuse_to_write(open_chain(copy))


def test_a_parent_that_is_not_there_is_told_by_its_id(tmp_path: Path):
    parent, delta, _ = _vdi(tmp_path)
    with parent.open("rb") as file:
        own = vdi.read(file)
    assert own is not None
    parent.unlink()
    with pytest.raises(ImageError, match=own.id.hex()):
        probe(delta)


def test_a_vmdk_whose_parent_is_not_found_is_refused_by_name(tmp_path: Path, capfd):
    base = Kind("vmdk").make(tmp_path / "base.vmdk")
    delta = tmp_path / "delta.vmdk"
    qemu_img("create", "-f", "vmdk", "-F", "vmdk", "-b", base, delta)
    assert same_content(open_chain(delta).filename(), open_chain(base).filename())
    base.unlink()
    assert run("info", delta) == ExitStatus.IMAGE_UNREADABLE
    assert "base.vmdk' is missing" in capfd.readouterr().err


def test_names_of_windows_are_looked_for_beside_the_image(tmp_path: Path):
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    parent = EXACT.make(tmp_path / "parent.vhd")
    delta = differencing_vhd(deltas / "delta.vhd", parent, "x", locator="..\\parent.vhd")
    found = headers.read(delta)
    assert found is not None and found.backing == "../parent.vhd"
    assert headers.base_of(found) == deltas / "../parent.vhd"


# Fixed VHDs


@pytest.mark.parametrize("creator", [b"qem2", b"win ", b"wa\0\0", b"tap\0"])
def test_a_fixed_vhd_is_known_by_its_end(creator: bytes, tmp_path: Path):
    image = FIXED.make(tmp_path / "disk.vhd")
    patch_footer(image, 28, creator)
    assert image.stat().st_size == SIZE + 512
    found = probe(image)
    assert (found.format, found.virtual_size, found.problems) == ("vpc", SIZE, ())
    header = headers.read(image)
    assert header is not None and (header.format, header.virtual_size) == ("vpc", SIZE)
    plan_convert(image, tmp_path / "new.qcow2").run()
    assert probe(tmp_path / "new.qcow2").virtual_size == SIZE
    raw = Kind("raw").make(tmp_path / "raw")
    assert same_content(open_chain(tmp_path / "new.qcow2").filename(), str(raw))
    before = image.read_bytes()
    with pytest.raises(ImageError, match="a vpc image cannot be resized"):
        plan_resize(image, "+8M", require_empty_tail=lambda chain, size, force: None)
    assert image.read_bytes() == before


def test_a_footer_that_is_not_right_is_content(tmp_path: Path):
    image = FIXED.make(tmp_path / "disk.img")
    content = image.read_bytes()
    for offset, value in ((0, b"x"), (63, b"\3"), (64, b"\0\0\0\0"), (48, b"\x7f")):
        image.write_bytes(content)
        patch(image, SIZE + offset, value)
        assert (probe(image).format, probe(image).virtual_size) == ("raw", SIZE + 512)


def test_where_the_name_says_raw_the_user_says_which(tmp_path: Path):
    image = FIXED.make(tmp_path / "disk.raw")
    with pytest.raises(RefusedError, match=r"named \.raw") as caught:
        probe(image)
    assert "--format raw or --format vpc" in str(caught.value.hint)
    assert probe(image, format="raw").virtual_size == SIZE + 512
    assert probe(image, format="vpc").virtual_size == SIZE


def test_an_overlay_may_take_a_fixed_vhd_as_either(tmp_path: Path):
    image = FIXED.make(tmp_path / "disk.vhd")
    for format in ("raw", "vpc"):
        overlay = tmp_path / f"{format}.qcow2"
        qemu_img("create", "-f", "qcow2", "-F", format, "-b", image, overlay)
        whats = {finding.what for finding in check_chain(overlay)}
        assert whats <= {"base-of-several"}


def _of_virtualbox(folder: Path) -> tuple[Path, int]:
    """A VHD of a size that its geometry rounds down, and that size."""
    image = Kind("vpc").make(folder / "disk.vhd")
    size = probe(image).virtual_size + 5120
    patch_footer(image, 28, b"vbox")
    patch_footer(image, 48, struct.pack(">Q", size))
    return image, size


def test_what_the_geometry_hides_is_said_and_not_written_to(tmp_path: Path, capfd):
    """As VirtualBox makes it: of a size that its geometry rounds down, which QEMU goes by."""
    image, size = _of_virtualbox(tmp_path)
    found = probe(image)
    if found.virtual_size == size:  # a newer QEMU goes by this maker's footer: nothing is hidden
        assert not found.problems
        refuse_to_write(open_chain(image))
        return
    assert found.virtual_size < size
    assert f"its footer says {size} bytes" in " ".join(found.problems)
    assert run("info", image) == 0
    assert capfd.readouterr().err.count("its footer says") == 1
    with pytest.raises(RefusedError, match="another size"):
        refuse_to_write(open_chain(image))
    with pytest.raises(ImageError, match="its footer says") as refused:
        plan_convert(image, tmp_path / "new.qcow2")
    hint = str(refused.value.hint)
    words = shlex.split(hint[hint.index("qemu-img") :])
    subprocess.run([*words[:-1], tmp_path / "new.qcow2"], check=True)
    assert probe(tmp_path / "new.qcow2").virtual_size == size


def test_a_vdi_with_a_gap_between_its_blocks_is_not_written_to(tmp_path: Path):
    """The next block would be given the place of the last one: QEMU counts them."""
    image = tmp_path / "disk.vdi"
    qemu_img("create", "-f", "vdi", image, "8M")
    for block in range(3):
        command = f"write -P {block + 1} {block}M 1M"
        subprocess.run(["qemu-io", "-f", "vdi", "-c", command, image], check=True)
    refuse_to_write(open_chain(image))
    with image.open("r+b") as file:
        header = vdi.read(file)
        assert header is not None and header.counted == 3
        file.seek(header.data_offset + 2 * header.block_size)
        last = file.read(header.block_size)
        file.seek(header.data_offset + 4 * header.block_size)
        file.write(last)
        file.seek(header.map_offset + 2 * 4)
        file.write(struct.pack("<I", 4))
    with pytest.raises(RefusedError, match="counts fewer blocks than its map has"):
        refuse_to_write(open_chain(image))


@pytest.mark.parametrize("size", [50 << 20, (1 << 30) + 512])
def test_a_vhd_is_made_as_large_as_it_should_be(size: int, tmp_path: Path):
    plan_new(tmp_path / "new.vhd", size, format="vpc").run()
    assert probe(tmp_path / "new.vhd").virtual_size == size
    qemu_img("create", "-f", "raw", tmp_path / "raw", str(size))
    plan_convert(tmp_path / "raw", tmp_path / "converted.vhd", to="vpc").run()
    assert probe(tmp_path / "converted.vhd").virtual_size == size


# What is made for others


@pytest.mark.parametrize("compress", [False, True])
def test_a_vmdk_says_its_own_name(compress: bool, tmp_path: Path):
    raw = Kind("raw").make(tmp_path / "raw")
    new = tmp_path / 'a "new" disk.vmdk'
    plan_convert(raw, new, to="vmdk", compress=compress).run()
    with new.open("rb") as file:
        descriptor, sparse = vmdk.read_descriptor(file), vmdk.read_sparse(file)
    assert descriptor is not None and sparse is not None
    assert [extent.name for extent in descriptor.extents] == [b"a new disk.vmdk"]
    assert sparse.compressed is compress
    assert same_content(open_chain(new).filename(), str(raw))
    plan_new(tmp_path / "empty.vmdk", 1 << 20, format="vmdk").run()
    with (tmp_path / "empty.vmdk").open("rb") as file:
        descriptor = vmdk.read_descriptor(file)
    assert descriptor is not None
    assert [extent.name for extent in descriptor.extents] == [b"empty.vmdk"]


# Repairs


def test_only_tables_that_qemu_mends_are_mended(tmp_path: Path):
    for kind in (Kind("vdi"), Kind("vmdk"), Kind("vhdx"), EXACT, Kind("raw")):
        image = kind.make(tmp_path / kind.format)
        with pytest.raises(RefusedError, match=r"cannot mend|no tables"):
            plan_repair(image, "all", format=kind.format)


# Cut off


CUT = {
    "vdi": Kind("vdi"),
    "vdi static": Kind("vdi", "static=on"),
    "vpc": EXACT,
    "vhdx": Kind("vhdx"),
    "vhdx fixed": Kind("vhdx", "subformat=fixed"),
    "vmdk": Kind("vmdk"),
}


@pytest.mark.parametrize("kind", CUT.values(), ids=CUT.keys())
def test_a_file_that_was_cut_off_says_where_it_ends(kind: Kind, tmp_path: Path):
    image = kind.make(tmp_path / "disk.img")
    assert probe(image).format == kind.format
    length = cut(image, 0.6).stat().st_size
    with pytest.raises(ImageError, match=f"truncated: the file is {length} bytes long") as caught:
        probe(image)
    findings = check_chain(image)
    assert [finding.what for finding in findings] == ["unreadable"]
    assert "truncated" in findings[0].means
    words = str(caught.value.hint).partition(": ")[2].replace("COPY", str(image)).split()
    subprocess.run(words, check=True)
    kept = probe(image)
    assert kept.virtual_size == SIZE


@pytest.mark.parametrize("name", ["disk-flat.vmdk", "disk-f001.vmdk", "disk-s001.vmdk"])
def test_the_files_of_a_vmdk_are_looked_at_too(name: str, tmp_path: Path):
    kinds = {"flat": "monolithicFlat", "f001": "twoGbMaxExtentFlat", "s001": "twoGbMaxExtentSparse"}
    image = tmp_path / "disk.vmdk"
    Kind("vmdk", f"subformat={kinds[name[5:-5]]}").make(image)
    assert probe(image).extents == (tmp_path / name,)
    cut(tmp_path / name, 0.6)
    with pytest.raises(ImageError, match="truncated") as caught:
        probe(image)
    assert str(caught.value.subject) == str(tmp_path / name)


@pytest.mark.parametrize("size", ["1M", "1536k", "10000384", "3G"])
@pytest.mark.parametrize("kind", CUT.values(), ids=CUT.keys())
def test_a_whole_file_is_not_taken_as_cut_off(kind: Kind, size: str, tmp_path: Path):
    if "fixed" in kind.options or "static" in kind.options:
        size = size.replace("3G", "30M")
    image = tmp_path / "disk.img"
    words = ["-o", kind.options] if kind.options else []
    qemu_img("create", "-f", kind.format, *words, image, size)
    probe(image, format=kind.format)
    end = probe(image, format=kind.format).virtual_size
    qemu_io(image, kind.format, "write 0 512", f"write {end - 512} 512")
    probe(image, format=kind.format)
    assert image.stat().st_size < 64 << 20


def test_a_part_of_a_vmdk_names_its_descriptor(tmp_path: Path):
    image = Kind("vmdk", "subformat=twoGbMaxExtentSparse").make(tmp_path / "disk.vmdk")
    with pytest.raises(ImageError, match="one of the files of a VMDK") as caught:
        probe(tmp_path / "disk-s001.vmdk")
    command = str(caught.value.hint).partition(": ")[2]
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(image)]


# Hostile headers


class Counted(io.FileIO):
    """A file that counts what is read of it, in bytes."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(-1 if size is None else size)
        self.count += len(found)
        return found


def test_huge_tables_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Headers that speak of tables of many gigabytes, in sparse files that could hold them."""
    monkeypatch.setattr(vhd, "_LARGEST_TABLE", 1 << 20)
    monkeypatch.setattr(vdi, "_LARGEST_MAP", 1 << 20)
    image = EXACT.make(tmp_path / "disk.vhd")
    with image.open("rb") as file:
        footer = vhd.read_footer(file)
        assert footer is not None
        header = vhd.read_dynamic(file, footer)
        assert header is not None
    patch(image, 512 + 28, b"\xff\xff\xff\xff")
    os.truncate(image, 1 << 36)
    with Counted(image) as file:
        assert vhd.size_needed(file, footer) <= 1 << 42
        assert 1 << 20 <= file.count < 2 << 20
    disk = Kind("vdi").make(tmp_path / "disk.vdi")
    patch(disk, 0x180, b"\xff\xff\xff\x7f")
    os.truncate(disk, 1 << 36)
    with Counted(disk) as file:
        found = vdi.read(file)
        assert found is not None
        vdi.size_needed(file, found)
        assert 1 << 20 <= file.count < 2 << 20
    sparse = Kind("vmdk").make(tmp_path / "disk.vmdk")
    patch(sparse, 12, struct.pack("<QQ", 1 << 60, 8))
    with Counted(sparse) as file:
        extent = vmdk.read_sparse(file)
        assert extent is not None
        assert vmdk.size_needed(file, extent) == 0
        assert file.count < 1 << 20
    other = Kind("vhdx").make(tmp_path / "disk.vhdx")
    content = other.read_bytes()
    for place in (192 << 10, 256 << 10):
        patch(other, place + 8, b"\xff\xff\xff\xff")
    assert content != other.read_bytes()
    with Counted(other) as file:
        vhdx.read(file)
        assert file.count < 1 << 20


@pytest.mark.parametrize("kind", [EXACT, FIXED, Kind("vdi"), Kind("vhdx"), Kind("vmdk")])
def test_headers_that_end_early_are_no_error_of_ours(kind: Kind, tmp_path: Path):
    whole = kind.make(tmp_path / "whole").read_bytes()
    image = tmp_path / "disk"
    for length in (1, 64, 300, 511, 512, 600, 1500, 65600, 196700, 1048700, len(whole) - 1):
        image.write_bytes(whole[:length])
        headers.read(image)
        try:
            probe(image)
        except ImageError as error:
            assert "\n" not in str(error)


def test_info_in_json_says_what_is_wrong_once(tmp_path: Path, capfd):
    image, size = _of_virtualbox(tmp_path)
    hidden = probe(image).virtual_size != size  # not by QEMU 10
    assert run("info", "-o", "json", image) == 0
    rows = json.loads(capfd.readouterr().out)
    assert len(rows[0]["problems"]) == int(hidden)
