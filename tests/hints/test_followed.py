"""Hints, each followed to the letter on an image that brings it up: it helps, and harms nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgtool.image.chain.chain import MAX_LINKS
from imgtool.text import typed
from tests.hints.following import commands_in
from tests.unit.image.checks.test_doubts import SIZE, damage, overlay, qemu_img, qemu_io

MIB = 1 << 20
Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint is typed where the user is: names in it that are to be chosen are of this folder. A
    shell would take its name apart."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)


def image(name: str = "disk.qcow2", *commands: str) -> Path:
    """A qcow2 in which something was written."""
    path = Path(name).absolute()
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    qemu_io(path, *(commands or ("write -P 1 0 64k",)))
    return path


def pattern(path: Path, byte: int, at: int = 0) -> bool:
    """Whether the guest sees this byte at a place of the image."""
    done = subprocess.run(
        ["qemu-io", "-r", "-U", "-c", f"read -P {byte} {at} 4k", path],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0 and b"Pattern verification failed" not in done.stdout


def hint(done: Any) -> str:
    """The hint that a command ended with."""
    assert done.status != 0, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("  hint: ")]
    assert len(lines) == 1, done.err
    return str(lines[0]).removeprefix("  hint: ")


def follow(cli: Cli, text: str, **chosen: str | Path) -> None:
    """Type the commands of a hint, with the names in capitals replaced by what one chooses."""
    found = commands_in(text, **chosen)
    assert found, text
    for command in found:
        words = shlex.split(command)
        if words[0] == "imgtool":
            done = cli(*words[1:])
            assert done.status == 0, f"{command}: {done.err}"
        else:
            subprocess.run(command, shell=True, check=True, capture_output=True)


def finding(cli: Cli, path: Path, what: str) -> str:
    """What `chain check` says is to be done about a finding."""
    text: str = cli("chain", "check", path).text
    matched = re.search(rf": \w+: {what}\n.*\n    to do: (.*)\n", text)
    assert matched is not None, text
    return matched[1]


def sound(cli: Cli, path: Path) -> bool:
    return bool(cli("chain", "check", path).status == 0)


def test_a_base_that_was_only_touched(imgtool_cli):
    base = image("base.qcow2")
    top = overlay(Path("top.qcow2").absolute(), base)
    later = top.stat().st_mtime_ns + 10**9
    os.utime(base, ns=(later, later))
    follow(imgtool_cli, finding(imgtool_cli, top, "base-newer"))
    assert sound(imgtool_cli, top) and pattern(top, 1)


def _zero_refcount(path: Path) -> None:
    """Have the refcounts say that the last cluster, which holds data, is free."""
    with path.open("r+b") as file:
        last = path.stat().st_size // 65536 - 1
        file.seek(48)
        file.seek(struct.unpack(">Q", file.read(8))[0])
        file.seek(struct.unpack(">Q", file.read(8))[0] + 2 * last)
        file.write(b"\0\0")


@pytest.mark.parametrize("mends", [True, False], ids=["refcounts", "tables"])
def test_damaged_tables(imgtool_cli, mends):
    disk = image("disk.qcow2", "write -P 1 0 64k", "write -P 2 6M 64k")
    _zero_refcount(disk) if mends else damage(disk)
    before = disk.read_bytes()
    refused = hint(imgtool_cli("resize", disk, "16M"))
    mended, saved = finding(imgtool_cli, disk, "damaged-tables").split("; ")
    assert f"{mended}; {saved};" in refused
    if mends:
        follow(imgtool_cli, mended)
        assert imgtool_cli("check", "COPY").status == 0 and pattern(Path("COPY"), 2, 6 << 20)
    else:  # then it says what to do instead
        shutil.copy(disk, "COPY")
        done = imgtool_cli("check", "--repair", "all", "COPY")
        assert "qemu-img convert --salvage" in hint(done)
        assert not [path for path in os.listdir() if "imgtool" in path]
    follow(imgtool_cli, saved)
    assert Path("NEW").stat().st_size == SIZE
    assert disk.read_bytes() == before


def test_an_image_that_qemu_marked(imgtool_cli):
    disk = image()
    with disk.open("r+b") as file:
        file.seek(79)
        file.write(b"\2")
    before = disk.read_bytes()
    step = finding(imgtool_cli, disk, "corrupt")
    assert step == hint(imgtool_cli("resize", disk, "16M"))
    follow(imgtool_cli, step)
    assert imgtool_cli("resize", "COPY", "16M").status == 0 and pattern(Path("COPY"), 1)
    assert disk.read_bytes() == before


def test_an_image_with_a_data_file(imgtool_cli):
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "disk.qcow2", str(SIZE))
    qemu_io(Path("disk.qcow2"), "write -P 1 0 64k")
    step = hint(imgtool_cli("overlay", "create", "disk.qcow2", "top.qcow2"))
    assert "rebase" not in step
    follow(imgtool_cli, step)
    assert pattern(Path("NEW"), 1)
    assert imgtool_cli("overlay", "create", "NEW", "top.qcow2").status == 0


def test_an_overlay_without_the_format_of_its_base(imgtool_cli):
    base = image("base.qcow2")
    top = overlay(Path("top.qcow2").absolute(), base)
    data = top.read_bytes()
    at = data.index(bytes.fromhex("e2792aca"))  # the header extension that names the format
    with top.open("r+b") as file:
        file.seek(at)
        file.write(b"\x11\x11\x11\x11")
    step = hint(imgtool_cli("overlay", "create", top, "higher.qcow2"))
    assert finding(imgtool_cli, top, "no-backing-format").split(": ", 1)[1] in step
    follow(imgtool_cli, step)
    assert sound(imgtool_cli, top) and pattern(top, 1)
    assert imgtool_cli("overlay", "create", top, "higher.qcow2").status == 0


def test_an_overlay_with_the_wrong_format(imgtool_cli):
    base = image("base.qcow2")
    top = Path("top.qcow2").absolute()
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", base.name, top, str(SIZE))
    follow(imgtool_cli, finding(imgtool_cli, top, "wrong-backing-format"))
    assert sound(imgtool_cli, top) and pattern(top, 1)


def test_a_base_that_was_moved(imgtool_cli):
    base = image("base.qcow2")
    top = overlay(Path("top.qcow2").absolute(), base)
    moved = base.rename(base.with_name("moved.qcow2"))
    missing = hint(imgtool_cli("info", top))
    assert str(base) in missing
    follow(imgtool_cli, finding(imgtool_cli, top, "missing-backing-file"), NEWBASE=moved)
    assert sound(imgtool_cli, top) and pattern(top, 1)


def test_a_base_behind_a_protocol(imgtool_cli):
    copy = image("copy.qcow2")
    qemu_img(
        *("create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "nbd://localhost:1/x"),
        *("top.qcow2", str(SIZE)),
    )
    refused = imgtool_cli("info", "top.qcow2")
    assert refused.status == 4
    text = hint(refused).split(": ", 1)[1]
    follow(imgtool_cli, text, COPY=copy)
    assert sound(imgtool_cli, Path("top.qcow2")) and pattern(Path("top.qcow2"), 1)


def test_a_chain_that_is_too_long(imgtool_cli):
    last = image("0000.qcow2")
    for number in range(1, MAX_LINKS + 1):
        new = Path(f"{number:04}.qcow2").absolute()
        # With the same file but for the name in it; qemu-img would open all that is below.
        if number == 1:
            overlay(new, last)
        else:
            data = last.read_bytes()
            old = f"{number - 2:04}.qcow2".encode()
            new.write_bytes(data.replace(old, last.name.encode(), 1))
        last = new
    refused = imgtool_cli("info", last)
    assert refused.status == 4
    assert finding(imgtool_cli, last, "too-long") == hint(refused)
    follow(imgtool_cli, hint(refused))
    assert imgtool_cli("info", last).status == 0


def test_a_truncated_image(imgtool_cli):
    disk = image("disk.qcow2", "write -P 1 0 64k", "write -P 2 4M 64k")
    os.truncate(disk, disk.stat().st_size - 65536)
    before = disk.read_bytes()
    step = hint(imgtool_cli("info", disk))
    shutil.copy(disk, "COPY")
    follow(imgtool_cli, step)
    assert imgtool_cli("info", "COPY").status == 0 and pattern(Path("COPY"), 1)
    assert disk.read_bytes() == before


def test_a_protected_file(imgtool_cli):
    disk = image()
    disk.chmod(0o444)
    follow(imgtool_cli, hint(imgtool_cli("resize", disk, "16M")))
    assert imgtool_cli("resize", disk, "16M").status == 0


def test_a_file_with_several_names(imgtool_cli):
    disk = image()
    Path("other").hardlink_to(disk)
    assert hint(imgtool_cli("compact", disk)).startswith("remove the other names first")
    Path("other").unlink()
    assert imgtool_cli("compact", disk).status == 0 and pattern(disk, 1)


def test_a_file_with_several_names_is_written_to(imgtool_cli):
    from imgtool.errors import RefusedError
    from imgtool.image.chain.chain import open_chain
    from imgtool.image.change.transaction import transaction

    disk = image()
    Path("other").hardlink_to(disk)
    with pytest.raises(RefusedError) as refused, transaction([open_chain(disk)], notice=print):
        pass
    follow(imgtool_cli, str(refused.value.hint))
    with transaction([open_chain(disk)], notice=print):
        pass
    assert pattern(disk, 1) and pattern(Path("other"), 1)


def test_an_overlay_smaller_than_its_base(imgtool_cli):
    base = image("base.qcow2")
    top = Path("top.qcow2").absolute()
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, top, str(SIZE // 2))
    step = hint(imgtool_cli("overlay", "commit", top))
    assert step.split(": ", 1)[1] in finding(imgtool_cli, top, "smaller-than-base")
    follow(imgtool_cli, step)
    assert imgtool_cli("overlay", "commit", top).status == 0 and pattern(base, 1)


def test_snapshots_in_the_way(imgtool_cli):
    base = image("base.qcow2")
    top = overlay(Path("top.qcow2").absolute(), base)
    qemu_img("snapshot", "-c", "mine", top)
    assert "imgtool snapshot delete" in hint(imgtool_cli("overlay", "flatten", top))
    assert imgtool_cli("snapshot", "delete", top, "mine").status == 0
    assert imgtool_cli("overlay", "flatten", top).status == 0 and pattern(top, 1)


def test_an_overlay_that_is_a_base(imgtool_cli):
    middle = overlay(Path("middle.qcow2").absolute(), image("base.qcow2"))
    overlay(Path("top.qcow2").absolute(), middle)
    refused = imgtool_cli("overlay", "commit", middle, "--remove")
    assert hint(refused) == "commit it without --remove"
    assert imgtool_cli("overlay", "commit", middle).status == 0


def test_a_state_that_is_in_no_snapshot(imgtool_cli):
    disk = image()
    assert imgtool_cli("snapshot", "create", disk, "first").status == 0
    qemu_io(disk, "write -P 2 0 64k")
    refused = imgtool_cli("snapshot", "revert", disk, "first")
    assert "--save-as NAME" in hint(refused) and "--discard" in hint(refused)
    assert imgtool_cli("snapshot", "revert", disk, "first", "--save-as", "NAME").status == 0
    assert pattern(disk, 1)
    assert imgtool_cli("snapshot", "revert", disk, "NAME", "--discard").status == 0
    assert pattern(disk, 2)


def test_a_format_that_cannot_be_resized(imgtool_cli):
    disk = image()
    qemu_img("convert", "-O", "vdi", disk, "disk.vdi")
    for command in (("resize", "disk.vdi", "16M"), ("compact", "disk.vdi")):
        assert "imgtool convert makes a qcow2 image of it" in hint(imgtool_cli(*command))
    assert imgtool_cli("convert", "disk.vdi", "new.qcow2").status == 0
    assert imgtool_cli("resize", "new.qcow2", "16M").status == 0 and pattern(Path("new.qcow2"), 1)


def test_lost_space(imgtool_cli):
    disk = image()
    with disk.open("r+b") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        file.truncate(20 << 16)
        file.seek(block + 2 * 19)
        file.write(b"\0\1")
    follow(imgtool_cli, finding(imgtool_cli, disk, "leaks"))
    assert sound(imgtool_cli, disk) and pattern(disk, 1)


def test_a_raw_name_with_a_header(imgtool_cli):
    base = image("base.qcow2")
    top = overlay(Path("top.raw").absolute(), base)
    text = hint(imgtool_cli("info", top))
    formats = re.findall(r"--format (\w+)", text)
    assert formats == ["raw", "qcow2"]
    assert all(imgtool_cli("info", top, "--format", format).status == 0 for format in formats)


def test_a_base_in_another_folder(imgtool_cli):
    Path("bases").mkdir()
    Path("guests").mkdir()
    base = image("bases/base.qcow2")
    top = Path("guests/top.qcow2").absolute()
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    text = re.search(r"--backing-dir .*(?= \()", hint(imgtool_cli("info", top)))
    assert text is not None
    assert imgtool_cli("info", top, *shlex.split(text[0])).status == 0


def test_a_disk_with_nothing_on_it(imgtool_cli):
    Path("disk.raw").write_bytes(b"x" * MIB)
    step = hint(imgtool_cli("info", "disk.raw"))
    assert step.endswith("is read with --format raw")
    assert imgtool_cli("info", "disk.raw", "--format", "raw").status == 0


def test_a_name_that_is_taken(imgtool_cli):
    disk = image()
    Path("new.qcow2").write_bytes(b"mine")
    assert hint(imgtool_cli("convert", disk, "new.qcow2")).startswith("choose another name")
    assert Path("new.qcow2").read_bytes() == b"mine"
    assert imgtool_cli("convert", disk, "another.qcow2").status == 0


def test_a_name_of_a_snapshot_that_is_taken(imgtool_cli):
    disk = image()
    assert imgtool_cli("snapshot", "create", disk, "one").status == 0
    assert "choose another name" in hint(imgtool_cli("snapshot", "create", disk, "one"))
    assert imgtool_cli("snapshot", "delete", disk, "one").status == 0
    assert imgtool_cli("snapshot", "create", disk, "one").status == 0


def test_snapshots_of_one_name(imgtool_cli):
    disk = image()
    for _ in range(2):
        qemu_img("snapshot", "-c", "same", disk)
    found = re.fullmatch(r"delete (\S+) first", hint(imgtool_cli("snapshot", "delete", disk, "2")))
    assert found is not None
    assert imgtool_cli("snapshot", "delete", disk, found[1]).status == 0
    assert imgtool_cli("snapshot", "delete", disk, "2").status == 0 and pattern(disk, 1)


def test_a_snapshot_of_what_can_have_none(imgtool_cli):
    disk = image()
    qemu_img("convert", "-O", "vdi", disk, "disk.vdi")
    text = hint(imgtool_cli("snapshot", "create", "disk.vdi", "one"))
    assert "imgtool overlay create" in text and "convert" in text
    assert imgtool_cli("convert", "disk.vdi", "new.qcow2").status == 0
    assert imgtool_cli("snapshot", "create", "new.qcow2", "one").status == 0
    assert imgtool_cli("overlay", "create", "disk.vdi", "top.qcow2").status == 0
    assert pattern(Path("top.qcow2"), 1) and imgtool_cli("snapshot", "create", "top.qcow2", "a")


def _table(path: Path, size: int, label: str, lines: str) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    words = f"label: {label}\n{lines}".encode()
    subprocess.run(["/sbin/sfdisk", "-q", path], input=words, check=True)


def test_a_partition_at_the_end(imgtool_cli):
    _table(Path("disk.raw"), 16 * MIB, "dos", "start=2048, size=8192, type=83\n")
    found = re.match(r"not below (\d+) bytes", hint(imgtool_cli("resize", "disk.raw", "4M")))
    assert found is not None
    assert imgtool_cli("resize", "disk.raw", found[1]).status == 0


def test_a_gpt_that_lost_its_end(imgtool_cli):
    _table(Path("disk.raw"), 16 * MIB, "gpt", "start=2048, size=8192, type=L\n")
    step = hint(imgtool_cli("resize", "disk.raw", "12M"))
    assert step.startswith("in the guest, ")
    assert imgtool_cli("resize", "disk.raw", "12M", "--force", "shrink").status == 0
    sgdisk = shutil.which("sgdisk", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if sgdisk is None:
        pytest.skip("sgdisk, which the guest would run, is not installed")
    subprocess.run([sgdisk, "--move-second-header", "disk.raw"], check=True, capture_output=True)
    assert imgtool_cli("partitions", "disk.raw").err == ""


def test_a_name_that_qemu_does_not_take(imgtool_cli):
    disk = image()
    strange = os.fsencode(disk.parent) + b"/\xff.qcow2"
    os.rename(disk, strange)
    assert "make a symlink to it with a plain name" in hint(
        imgtool_cli("info", os.fsdecode(strange))
    )
    Path("plain.qcow2").symlink_to(os.fsdecode(strange))
    assert imgtool_cli("info", "plain.qcow2").status in (0, 3)
    Path("plain.qcow2").unlink()
    os.rename(strange, disk)
    assert imgtool_cli("info", disk).status == 0


def test_a_base_is_left_alone(imgtool_cli):
    base = image("base.qcow2")
    top = overlay(Path("top.qcow2").absolute(), base)
    other = overlay(Path("other.qcow2").absolute(), base)
    said = hint(imgtool_cli("resize", base, "16M"))
    assert "or write to the overlay" in said
    assert imgtool_cli("resize", top, "16M").status == 0
    assert f"first: imgtool overlay flatten {typed(other)}, and each of the others" in said
    said = hint(imgtool_cli("overlay", "commit", top))
    assert said.startswith(f"let it stand alone first: imgtool overlay flatten {typed(other)};")
    assert imgtool_cli("overlay", "flatten", other).status == 0
    assert imgtool_cli("overlay", "commit", "--remove", top).status == 0


def _ext4(path: Path, content: str) -> None:
    tree = path.with_suffix(".tree")
    tree.mkdir()
    (tree / "name").write_text(content)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, path, "4M"], check=True)


def test_several_data_filesystems(imgtool_cli):
    _table(Path("disk.raw"), 16 * MIB, "dos", "start=2048,size=8192\nstart=10240,size=8192\n")
    for number, at in enumerate((1, 5)):
        part = Path(f"part{number}")
        _ext4(part, f"{number}")
        with Path("disk.raw").open("r+b") as file:
            file.seek(at * MIB)
            file.write(part.read_bytes())
    words = ("cat", Path("disk.raw").absolute(), "/name", "--engine", "direct")
    choices = re.findall(r"-m (\S+)", hint(imgtool_cli(*words)))
    assert len(choices) == 2
    shown = [imgtool_cli(*words, "-m", choice).text for choice in choices]
    assert shown == ["0", "1"]


def test_a_folder_that_is_not_there(imgtool_cli):
    _ext4(Path("disk.raw"), "text")
    words = ("copy-out", Path("disk.raw").absolute(), "/name", "no/such/", "--engine", "direct")
    follow(imgtool_cli, hint(imgtool_cli(*words)))
    assert imgtool_cli(*words).status == 0 and Path("no/such/name").read_text() == "text"


def test_a_file_that_is_there(imgtool_cli):
    _ext4(Path("disk.raw"), "text")
    Path("name").write_text("mine")
    words = ("copy-out", Path("disk.raw").absolute(), "/name", ".", "--engine", "direct")
    assert hint(imgtool_cli(*words)) == "replace it: --overwrite"
    assert Path("name").read_text() == "mine"
    assert imgtool_cli(*words, "--overwrite").status == 0 and Path("name").read_text() == "text"


def test_a_new_base_that_is_another(imgtool_cli):
    base, other = image("base.qcow2", "write -P 1 0 64k"), image("other.qcow2", "write -P 2 0 64k")
    top = overlay(Path("top.qcow2").absolute(), base)
    refused = imgtool_cli("overlay", "rebase", "--unsafe", top, other)
    assert refused.status == 4
    assert hint(refused).startswith("rebase without --unsafe to keep the content")
    assert imgtool_cli("overlay", "rebase", top, other).status == 0
    assert sound(imgtool_cli, top) and pattern(top, 1)


def test_a_name_of_a_base_that_leads_nowhere(imgtool_cli):
    base = image("base.qcow2", "write -P 1 0 64k")
    Path("circle").symlink_to("circle")
    top = overlay(Path("top.qcow2").absolute(), base)
    words = ("rebase", "-u", "-F", "qcow2", "-b", "circle")
    subprocess.run(["qemu-img", *words, top], check=True)
    text = finding(imgtool_cli, top, "bad-backing-name")
    assert (
        text
        == "'imgtool overlay rebase --unsafe' writes another name, if the data is elsewhere now"
    )
    assert imgtool_cli("overlay", "rebase", "--unsafe", top, base).status == 0
    assert sound(imgtool_cli, top) and pattern(top, 1)
