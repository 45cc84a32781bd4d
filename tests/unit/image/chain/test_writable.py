"""What can be written to in place, and what is refused before anything begins, with a next step."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from imgtool import cli
from imgtool.engines.libguestfs.appliance import launch
from imgtool.errors import ExitStatus, ImageError, RefusedError
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.info import FORMATS
from imgtool.image.change import transaction
from imgtool.image.change.guards import refuse_to_write
from imgtool.image.change.overlays import plan_commit, plan_flatten
from imgtool.image.change.single import plan_convert
from imgtool.image.qemu.qemu_img import same_content
from tests.support.format_images import UNWRITABLE, WRITABLE, Kind, qemu_img, qemu_io, subformats

unwritable = pytest.mark.parametrize("kind", UNWRITABLE.values(), ids=UNWRITABLE.keys())


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_formats_and_subformats_of_qemu_are_each_in_one_list():
    known = [*WRITABLE.values(), *UNWRITABLE.values()]
    assert {kind.format for kind in known} == set(FORMATS)
    for format in FORMATS:
        options = " ".join(kind.options for kind in known if kind.format == format)
        for name in subformats(format):
            assert f"subformat={name}" in options, f"{format} {name} was not tried"


@unwritable
def test_what_cannot_be_written_in_place_is_refused_untouched(kind: Kind, tmp_path: Path):
    image = kind.make(tmp_path / "disk.img")
    before = files(tmp_path)
    chain = open_chain(image)
    with pytest.raises(RefusedError, match="cannot be written to in place") as caught:
        refuse_to_write(chain)
    assert caught.value.status is ExitStatus.REFUSED
    with pytest.raises(RefusedError, match="cannot be written to in place"), \
            transaction.transaction([chain], notice=lambda line: None):  # fmt: skip
        pytest.fail("it was begun")
    assert files(tmp_path) == before


@unwritable
def test_the_next_step_works(kind: Kind, tmp_path: Path):
    image = kind.make(tmp_path / "disk.img")
    before = image.read_bytes()
    chain = open_chain(image)
    plan_convert(image, tmp_path / "new.qcow2").run()
    new = open_chain(tmp_path / "new.qcow2")
    refuse_to_write(new)
    assert same_content(chain.filename(), new.filename())
    with transaction.clone(chain, tmp_path / "clone.qcow2") as writing:
        qemu_io(writing.chains[0].active.path, "qcow2", "write -P 9 1M 64k")
        writing.commit()
    assert not same_content(chain.filename(), open_chain(tmp_path / "clone.qcow2").filename())
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", WRITABLE.values(), ids=WRITABLE.keys())
def test_what_can_be_written_is_not_refused(kind: Kind, tmp_path: Path):
    refuse_to_write(open_chain(kind.make(tmp_path / "disk.img"), format=kind.format))


@pytest.mark.parametrize("format", ["vmdk", "qed", "qcow"])
def test_an_overlay_of_another_format_stays_what_it_is(format: str, tmp_path: Path):
    """Flattened it would be a qcow2 by the name of another, and a commit cut off had no way out."""
    base_format = "qcow2" if format == "qcow" else format
    base = Kind(base_format).make(tmp_path / "base.img")
    overlay = tmp_path / "over.img"
    qemu_img("create", "-f", format, "-F", base_format, "-b", base, overlay)
    qemu_io(overlay, format, "write -P 9 1M 64k")
    before = overlay.read_bytes()
    for plan in (plan_commit, plan_flatten):
        with pytest.raises(ImageError, match=f"no qcow2 overlay but {format}") as caught:
            plan(overlay)
        assert "imgtool convert" in str(caught.value.hint)
    assert overlay.read_bytes() == before
    plan_convert(overlay, tmp_path / "new.qcow2").run()
    assert same_content(
        open_chain(overlay).filename(), open_chain(tmp_path / "new.qcow2").filename()
    )


def test_a_flat_vmdk_of_esx_is_written_to(tmp_path: Path):
    image = Kind("vmdk", "subformat=monolithicFlat").make(tmp_path / "disk.vmdk")
    text = image.read_text().replace('createType="monolithicFlat"', 'createType="vmfs"')
    image.write_text(re.sub(r' FLAT ("[^"]*") 0', r" VMFS \1", text))
    chain = open_chain(image)
    refuse_to_write(chain)
    assert same_content(chain.filename(), str(Kind("raw").make(tmp_path / "wanted")))


COMMANDS = {
    "copy-in": ["copy-in", "IMAGE", "FILE", "/root"],
    "edit": ["edit", "IMAGE", "/etc/hostname", "-e", "s/a/b/"],
    "edit, dry run": ["edit", "IMAGE", "/etc/hostname", "-e", "s/a/b/", "--dry-run"],
    "inject": ["inject", "IMAGE", "--write", "/etc/motd:x"],
    "mount": ["mount", "IMAGE", "FOLDER", "--rw"],
    "commit": ["overlay", "commit", "OVERLAY"],
    "repair": ["check", "--repair", "all", "IMAGE"],
}
UNSUPPORTED = {
    "resize": ["resize", "IMAGE", "+1M"],
    "snapshot": ["snapshot", "create", "IMAGE", "one"],
    "compact": ["compact", "IMAGE"],
}


def _guest(raw: Path, image: Path) -> None:
    """A guest of which a part can be read, in what is written once."""
    tree = raw.with_name("tree")
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "hostname").write_text("a\n")
    argv = ("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, raw, "8M")
    subprocess.run(argv, check=True, capture_output=True)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, image)


def run(words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """A command on an image that cannot be written to; it is as it was."""
    image = folder / "disk.vmdk"
    _guest(folder / "guest", image)
    overlay = folder / "over.qcow2"
    if "OVERLAY" in words:
        qemu_img("create", "-f", "qcow2", "-F", "vmdk", "-b", image, overlay)
        qemu_io(overlay, "qcow2", "write -P 9 1M 64k")
    (folder / "file").touch()
    (folder / "folder").mkdir()
    names = {"IMAGE": image, "FILE": folder / "file", "FOLDER": folder / "folder"}
    names["OVERLAY"] = overlay
    before = image.read_bytes()
    try:
        status = int(cli._run([str(names.get(word, word)) for word in words]))
    except SystemExit as ended:  # a command that may have several failures
        status = int(ended.code or 0)
    assert image.read_bytes() == before
    assert not [path for path in folder.iterdir() if "imgtool" in path.name]
    return status, capfd.readouterr().err


@pytest.fixture(autouse=True)
def no_appliance(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*arguments: object, **options: object) -> None:
        raise AssertionError("an appliance was started")

    monkeypatch.setattr(launch, "launch_appliance", launched)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_that_writes_asks_first(words, tmp_path, capfd):
    status, said = run(words, tmp_path, capfd)
    assert status == ExitStatus.REFUSED, said
    assert "cannot be written to in place" in said or "QEMU cannot mend" in said
    assert "imgtool convert" in said


@pytest.mark.parametrize("words", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_operations_of_some_formats_are_refused_for_others(words, tmp_path, capfd):
    status, said = run(words, tmp_path, capfd)
    assert status == ExitStatus.IMAGE_UNREADABLE, said
    assert "imgtool convert" in said
