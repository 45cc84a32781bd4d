"""Hints that say to give the same command with other options, or to look at something first: each
is brought up and followed, as it stands, in a folder whose name a shell would take apart."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.guestmaker import disks
from tests.hints import images
from tests.hints.following import (
    Done,
    Row,
    added,
    commands_in,
    each,
    imgtool,
    instead,
    matching,
    run,
    type_in,
    typed,
    without,
)
from tests.hints.images import ext, overlay, plain, qcow2, qemu_img, system

AS_IT_IS = "--hostname dead-guest"


def _two_of_one_name() -> None:
    ext("a.raw", {"name": "first\n"})
    ext("b.raw", {"name": "second!\n"})


def _overlay_with_a_change() -> None:
    qemu_img("convert", "-O", "qcow2", ext("base.raw"), "base.qcow2")
    overlay("top.qcow2", "base.qcow2")


def _disks_on_two_formats() -> None:
    _overlay_with_a_change()
    plain("data.raw", "raw")
    overlay("data.qcow2", "data.raw", "raw")


def _unfindable_mount() -> None:
    system(files={"etc/fstab": "LABEL=none /srv ext4 defaults 0 2\n", "srv/below": "hidden\n"})


def _overlay_named_raw(snapshots: bool = True) -> None:
    """An overlay with a snapshot, if not without, whose name says that it is a raw disk."""
    plain("base.qcow2")
    plain("other.qcow2")
    overlay("disk.raw", "base.qcow2")
    if snapshots:
        qemu_img("snapshot", "-c", "before", "disk.raw")
    images.write("disk.raw", "write -P 2 64k 64k")


def _vhd_named_raw() -> None:
    qemu_img("create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", "disk.raw", "8M")


def _snapshots_of_a_file_that_changed() -> None:
    """Each of two snapshots has one of two filesystems."""
    _two_of_one_name()
    qemu_img("convert", "-O", "qcow2", "a.raw", "disk.qcow2")
    qemu_img("snapshot", "-c", "one", "disk.qcow2")
    qemu_img("convert", "-n", "-O", "qcow2", "b.raw", "disk.qcow2")
    qemu_img("snapshot", "-c", "two", "disk.qcow2")


def _a_spec() -> None:
    system()
    Path("SPEC.yaml").write_text("steps:\n  - hostname: dead-guest\n")


def _swap_alone() -> None:
    disks.blank(Path("disk.raw"), 8 << 20)
    run("mkswap", "-q", "disk.raw")


def _folder_of_images() -> None:
    plain()
    Path("notes.txt").write_text("mine")


def _vmdk_of_several() -> None:
    plain()
    options = ("-o", "subformat=twoGbMaxExtentSparse")
    qemu_img("convert", "-O", "vmdk", *options, "disk.qcow2", "disk.vmdk")


def _qed_overlay() -> None:
    plain("base.qed", "qed")
    qemu_img("create", "-q", "-f", "qed", "-F", "qed", "-b", "base.qed", "top.qed")
    images.write("top.qed", "write -P 2 64k 64k")


def _one_base_beside_the_link() -> None:
    for folder in (Path(), Path("apart")):
        folder.mkdir(exist_ok=True)
        plain(str(folder / "base.qcow2"))
    overlay("apart/disk.qcow2", "base.qcow2")
    Path("link.qcow2").symlink_to("apart/disk.qcow2")


def _base_in_two_folders() -> None:
    for folder in ("one", "two"):
        Path(folder).mkdir()
        plain(f"{folder}/base.qcow2")
    images.unbased()


def _base_behind_a_link() -> None:
    for folder in ("one", "../else where"):
        Path(folder).mkdir()
    plain("../else where/base.qcow2")
    Path("one/base.qcow2").symlink_to("../../else where/base.qcow2")
    images.unbased()


def _of_the_file_that_grep_names(words: list[str], text: str) -> Done:
    (command,) = commands_in(text)
    name = type_in(command).text.strip()
    return imgtool("info", name)


def _by_its_own_name(words: list[str], text: str) -> Done:
    return imgtool("info", *shlex.split(text.partition(": ")[2]))


def _each_alone(words: list[str], text: str) -> Done:
    return each(r"--backing-dir (?:(?! or ).)+")(words[:2], text)


ROWS = (
    Row(
        "leave -o out",
        _two_of_one_name,
        "diff a.raw b.raw --text -o json",
        without("-o json"),
        "+second!",
    ),
    Row(
        "leave out the second image and the snapshots",
        _overlay_with_a_change,
        "diff --against-base top.qcow2 base.qcow2",
        without("base.qcow2", "second image"),
    ),
    Row(
        "name a second image, another snapshot, or give --against-base",
        _overlay_with_a_change,
        "diff top.qcow2",
        added("--against-base"),
    ),
    Row(
        "name a second image, another snapshot, or give --against-base",
        _snapshots_of_a_file_that_changed,
        "diff disk.qcow2 --snapshot one --snapshot-b one --text",
        instead("diff disk.qcow2 --snapshot one --snapshot-b two --text", says="another snapshot"),
        "+second",
    ),
    Row(
        "name the image to compare it with: imgtool diff BEFORE AFTER",
        _two_of_one_name,
        "diff --against-base b.raw --text",
        typed(again=False, BEFORE="a.raw", AFTER="b.raw"),
        "/name",
    ),
    Row(
        "leave -A out, and compare the first disk alone",
        _disks_on_two_formats,
        "diff --against-base top.qcow2 -A data.qcow2",
        without("-A data.qcow2"),
    ),
    Row(
        "leave --engine out: what is only read is read directly where that can be",
        system,
        f"inject --engine direct disk.raw {AS_IT_IS}",
        without("--engine direct"),
        "unchanged",
    ),
    Row(
        "name a SPEC.yaml, or give steps as options",
        _a_spec,
        "inject disk.raw",
        instead("inject disk.raw SPEC.yaml", f"inject disk.raw {AS_IT_IS}", says="SPEC.yaml"),
        "unchanged",
    ),
    Row(
        "IMAGE... SPEC.yaml",
        _a_spec,
        "inject SPEC.yaml",
        instead("inject disk.raw SPEC.yaml", says="IMAGE... SPEC.yaml"),
        "unchanged",
    ),
    Row(
        "'imgtool filesystems --all' shows what the image holds",
        ext,
        "inspect disk.raw --engine direct",
        instead("filesystems --all disk.raw --engine direct", says="imgtool filesystems --all"),
        "ext4",
    ),
    Row(
        "'imgtool partitions' and 'imgtool info' show what it is",
        _swap_alone,
        "ls disk.raw / --engine direct",
        instead("partitions disk.raw", "info disk.raw", says="'imgtool partitions'"),
        "raw",
    ),
    Row(
        "'{} --help' lists the arguments and options",
        ext,
        "ls disk.raw --no-such-option",
        typed(again=False),
        "--engine",
    ),
    Row(
        "'{} --help' lists the commands",
        ext,
        "help chain tre",
        typed(again=False),
        "tree",
    ),
    Row(
        "name another file, or remove this one",
        _folder_of_images,
        "chain tree . --svg notes.txt",
        instead("chain tree . --svg another.svg", "chain tree . --svg gone.svg"),
        lambda: Path("notes.txt").read_text() == "mine" and Path("another.svg").exists(),
    ),
    Row(
        "what it stands on: imgtool chain show {}; and what stands on it: imgtool chain tree {}",
        _overlay_with_a_change,
        "chain tree base.qcow2",
        typed(again=False),
        "top.qcow2",
    ),
    Row(
        "what stands on what is shown by: imgtool chain tree {}",
        _overlay_with_a_change,
        "overlay flatten base.qcow2",
        typed(again=False),
        "top.qcow2",
    ),
    Row(
        "add {}",
        images.two_systems,
        "cat disk.raw /etc/motd --engine direct",
        each(r"--root \S+"),
        "2",
    ),
    Row(
        "operating systems in the image: {}",
        images.two_systems,
        "cat disk.raw /etc/motd --engine direct --root /dev/sda7",
        instead(
            "cat disk.raw /etc/motd --engine direct --root /dev/sda1",
            "cat disk.raw /etc/motd --engine direct --root /dev/sda2",
            says="/dev/sda1, /dev/sda2",
        ),
        "2",
    ),
    Row(
        "what lies in the folder itself: -m {}",
        _unfindable_mount,
        "cat disk.raw /srv/below --engine direct",
        matching("-m .*"),
        "hidden",
    ),
    Row(
        "say which it is: --format raw or --format vpc",
        _vhd_named_raw,
        "info disk.raw",
        added("--format raw", "--format vpc"),
    ),
    Row(
        "say which it is: --format raw or --format {}",
        _overlay_named_raw,
        "snapshot create disk.raw after",
        added("--format qcow2"),
        lambda: "after" in imgtool("snapshot", "list", "disk.raw", "--format", "qcow2").text,
        ("disk.raw",),
        loses=True,  # it has one more
    ),
    Row(
        "say which it is: --format raw or --format {}",
        _overlay_named_raw,
        "snapshot delete disk.raw before",
        added("--format qcow2"),
        lambda: images.reads("disk.raw", 2, 65536),
        ("disk.raw",),
        loses=True,
    ),
    Row(
        "say which it is: --format raw or --format {}",
        lambda: _overlay_named_raw(snapshots=False),
        "overlay commit disk.raw",
        added("--format qcow2"),
        lambda: images.reads("base.qcow2", 2, 65536),
        ("disk.raw", "base.qcow2"),
    ),
    Row(
        "say which it is: --format raw or --format {}",
        _overlay_named_raw,
        "overlay rebase disk.raw other.qcow2 --force snapshots",
        added("--format qcow2"),
        lambda: images.reads("disk.raw", 1) and images.reads("disk.raw", 2, 65536),
        ("disk.raw",),
    ),
    Row(
        "give the text file that names it: grep -l {} {}/*.vmdk",
        _vmdk_of_several,
        "info disk-s001.vmdk",
        _of_the_file_that_grep_names,
        "vmdk",
    ),
    Row(
        "'imgtool convert' makes a new image of what can be read",
        lambda: qemu_img("convert", "-O", "vmdk", plain(), "disk.vmdk"),
        "check --repair all disk.vmdk",
        instead("convert disk.vmdk new.qcow2", says="imgtool convert"),
        lambda: images.reads("new.qcow2", 1),
    ),
    Row(
        "'imgtool convert' makes one qcow2 image of it and what it stands on",
        _qed_overlay,
        "overlay flatten top.qed",
        instead("convert top.qed new.qcow2", says="imgtool convert"),
        lambda: images.reads("new.qcow2", 1) and images.reads("new.qcow2", 2, 65536),
    ),
    Row(
        "delete its snapshots first: imgtool snapshot delete",
        lambda: qcow2("disk.qcow2", "-o", "compat=0.10"),
        "resize disk.qcow2 16M",
        instead(
            "snapshot delete disk.qcow2 before",
            "resize disk.qcow2 16M",
            says="imgtool snapshot delete",
        ),
        lambda: images.reads("disk.qcow2", 1) and images.reads("disk.qcow2", 2, 65536),
        ("disk.qcow2",),
        loses=True,
    ),
    Row(
        "for the latter, give the image by its own name: {}",
        _one_base_beside_the_link,
        "info link.qcow2",
        _by_its_own_name,
        "apart/base.qcow2",
    ),
    Row(
        "give one alone: {}",
        _base_in_two_folders,
        "info top.qcow2 --backing-dir one --backing-dir two",
        _each_alone,
        "one/base.qcow2",
    ),
    Row(
        "if you trust it: --backing-dir {}",
        _base_behind_a_link,
        "info top.qcow2 --backing-dir one",
        matching("--backing-dir .*"),
        "base.qcow2",
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.hint[:50])
def test_what_it_says_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    row.follow()
