"""A guest's whole layout, nested, and guests that want to be mounted over the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from imgtool.mount import mounting, plan
from imgtool.mount.mounter import MountRequest
from imgtool.mount.mounting import mount, unmount
from tests.mount.host import (
    as_the_engine_reads_it,
    good,
    here,
    imgtool,
    mount_at,
    mounts,
    run,
    state_of,
    tree,
)
from tests.mount.images import blank, divide, make_filesystem, put, to_qcow2

MIB = 1 << 20
ROOT_UUID = "0f0c7a52-1111-4000-8000-0000000000a1"
BOOT_UUID = "0f0c7a52-1111-4000-8000-0000000000a2"
HOME_UUID = "0f0c7a52-1111-4000-8000-0000000000a3"
FSTAB = f"""\
UUID={ROOT_UUID} / ext4 defaults 0 1
UUID={HOME_UUID} /home xfs defaults 0 2
UUID={BOOT_UUID} /boot ext4 ro 0 2
proc /proc proc defaults 0 0
"""


def a_root(fstab: str, *, links: Mapping[str, str] | None = None) -> Callable[[Path], None]:
    """What makes a root filesystem with this fstab; `links` instead of folders."""

    def fill(folder: Path) -> None:
        for name in ("etc", "boot", "home", "usr", "var"):
            if name not in (links or {}):
                (folder / name).mkdir()
        for name, target in (links or {}).items():
            (folder / name).symlink_to(target)
        (folder / "etc" / "os-release").write_text('ID=debian\nPRETTY_NAME="Debian 12"\n')
        (folder / "etc" / "fstab").write_text(fstab)
        (folder / "etc" / "hostname").write_text("guest\n")

    return fill


def _with(name: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / name).mkdir()
        (folder / name / f"{name}.txt").write_text(f"{name}\n")
        (folder / "out").symlink_to("/etc")

    return fill


def a_guest(path: Path, fill_root: Callable[[Path], None]) -> Path:
    """A raw disk with a root, a /boot and a /home on a GPT."""
    parts = (
        make_filesystem(path.with_suffix(".root"), "ext4", fill_root, uuid=ROOT_UUID),
        make_filesystem(path.with_suffix(".boot"), "ext4", _with("grub"), uuid=BOOT_UUID),
        make_filesystem(path.with_suffix(".home"), "xfs", _with("alice"), uuid=HOME_UUID),
    )
    blank(path, sum(part.stat().st_size for part in parts) + 8 * MIB)
    lines, start = ["label: gpt"], MIB
    for part in parts:
        lines.append(f"start={start // 512},size={part.stat().st_size // 512}")
        put(part, path, start)
        start += part.stat().st_size
        part.unlink()
    divide(path, lines)
    return path


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    return a_guest(tmp_path_factory.mktemp("guest") / "guest.raw", a_root(FSTAB))


@pytest.mark.parametrize("words", [(), ("--whole",), ("-m", "/dev/sda1", "-m", "/dev/sda3:/home")])
@pytest.mark.parametrize("via", ["loop", "export"])
def test_the_whole_guest(guest, place, via, words):
    before = state_of([guest])
    here("mount", guest, place, "--via", via, *words)
    targets = [row.target for row in mounts() if row.target.startswith(str(place))]
    options = [row.options for row in mounts() if row.target in targets]
    (row,) = here("mounts", "-o", "jsonl").rows
    found = tree(place)
    here("umount", place)
    nested = [place, place / "home"] if "-m" in words else [place, place / "boot", place / "home"]
    assert sorted(targets) == sorted(map(str, nested))
    assert len(row["devices"]) == len(nested)
    assert all({"ro", "nosuid", "nodev", "noexec"} <= each for each in options)
    assert found == as_the_engine_reads_it(guest, *[word for word in words if word != "--whole"])
    assert found[b"/home/alice/alice.txt"].type == "file"
    assert state_of([guest]) == before


def test_the_whole_guest_is_written_to(guest, place, tmp_path):
    image = to_qcow2(guest, tmp_path / "guest.qcow2")
    here("mount", image, place, "--via", "export", "--rw")
    (place / "boot" / "new").write_text("boot\n")
    (place / "home" / "new").write_text("home\n")
    here("umount", place)
    assert good("cat", image, "/boot/new", "/home/new").out == "boot\nhome\n"


def test_a_busy_part_of_it(guest, place):
    """What cannot be unmounted stays in the journal, and goes when nobody uses it any more."""
    here("mount", guest, place, "--via", "loop")
    with (place / "boot" / "grub" / "grub.txt").open():
        refused = imgtool("umount", place)
        assert refused.status == 4
        assert f"process {os.getpid()}" in refused.err
    here("umount", place)
    assert list(place.iterdir()) == []


# Guests that lie


def _over_the_host(guest: Path, place: Path, via: str) -> str:
    before = {row.target for row in mounts()}
    done = here("mount", guest, place, "--via", via)
    new = {row.target for row in mounts()} - before
    outside = {
        target
        for target in new
        if not target.startswith(str(place)) and not target.startswith("/run/imgtool/")
    }
    here("umount", place)
    assert outside == set()
    return done.err


@pytest.mark.parametrize("via", ["loop", "export"])
@pytest.mark.parametrize(
    "links",
    [
        {"boot": "/etc"},
        {"boot": "../../../../../../../../../../etc"},
        {"boot": "/proc/self/root/etc"},
        {"boot": "home"},  # even one that stays inside
    ],
)
def test_a_link_where_something_is_to_be_mounted(tmp_path, place, via, links):
    host = state_of([Path("/etc/passwd")])
    guest = a_guest(tmp_path / "guest.raw", a_root(FSTAB, links=links))
    said = _over_the_host(guest, place, via)
    assert "imgtool: warning: /boot is not shown" in said
    assert state_of([Path("/etc/passwd")]) == host


@pytest.mark.parametrize(
    ("mountpoint", "shown"),
    [
        ("/../../etc", "fstab line 2"),
        ("/boot/../../../etc", "fstab line 2"),
        ("/boot\\040link/etc", "/boot link/etc is not shown"),
        ("/home/out", "/home/out is not shown"),
        ("/missing", "/missing is not shown"),
        ("/etc/hostname", "/etc/hostname is not shown"),
        ("/\\033[31mred", "/\\033[31mred is not shown"),
    ],
)
def test_an_odd_mount_point_in_fstab(tmp_path, place, mountpoint, shown):
    fstab = "".join(
        f"UUID={uuid} {where} {kind} defaults 0 0\n"
        for uuid, where, kind in (
            (ROOT_UUID, "/", "ext4"),
            (BOOT_UUID, mountpoint, "ext4"),
            (HOME_UUID, "/home", "xfs"),
        )
    )
    fill = a_root(fstab, links={"boot link": "/"})
    guest = a_guest(tmp_path / "guest.raw", fill)
    said = _over_the_host(guest, place, "loop")
    assert shown in said
    assert "\033" not in said


def test_mount_options_of_the_guest_are_not_taken(tmp_path, place):
    """fstab is the guest's word: it can neither allow nor ask for anything."""
    fstab = FSTAB.replace("/boot ext4 ro", "/boot ext4 rw,exec,suid,dev,data=journal,errors=panic")
    guest = a_guest(tmp_path / "guest.raw", a_root(fstab))
    here("mount", guest, place, "--via", "loop")
    options = mount_at(place / "boot").options
    here("umount", place)
    assert {"ro", "nosuid", "nodev", "noexec"} <= options
    assert not {"errors=panic", "data=journal"} & options


def test_a_filesystem_cannot_ask_for_a_panic(tmp_path, place):
    """What the kernel does about errors is not for the guest's superblock to say."""
    image = make_filesystem(tmp_path / "panic.raw", "ext4", None)
    run("tune2fs", "-e", "panic", "-E", "mount_opts=errors=panic", image)
    before = state_of([image])
    for via in ("loop", "export"):
        here("mount", image, place, "--via", via, "-m", "/dev/sda")
        device = Path(mount_at(place).source).name
        options = Path(f"/proc/fs/ext4/{device}/options").read_text().splitlines()
        here("umount", place)
        assert "errors=remount-ro" in options
        assert "errors=panic" not in options
    assert state_of([image]) == before


def _two_subvolumes(folder: Path) -> None:
    for name in ("@", "@home"):
        run("btrfs", "-q", "subvolume", "create", folder / name)
        (folder / name / f"of {name}").write_text(name)
    (folder / "@" / "home").mkdir()


@pytest.mark.parametrize("via", ["loop", "export"])
@pytest.mark.parametrize("writable", [False, True])
def test_two_subvolumes_of_one_partition_are_both_shown(
    tmp_path, place, monkeypatch, via, writable
):
    """A second device with the same filesystem on it would be taken for another of its disks."""
    filesystem = make_filesystem(tmp_path / "filesystem", "btrfs", _two_subvolumes)
    image = blank(tmp_path / "disk.raw", 80 * MIB)
    divide(image, ["label: gpt", "start=2048"])
    put(filesystem, image, MIB)

    def items(wanted, disks):
        source = plan.partition(disks, 1)
        return [
            plan.Item(source, "/", "btrfs", "@"),
            plan.Item(source, "/home", "btrfs", "@home"),
        ]

    monkeypatch.setattr(mounting, "_items", items)
    said: list[str] = []
    journal = mount(MountRequest(image, place, via=via, writable=writable, notice=said.append))
    try:
        loops = [step for step in journal.steps if step.kind == "loop"]
        found = (place / "of @").read_text(), (place / "home" / "of @home").read_text()
    finally:
        unmount(place)
    assert (found, said, len(loops)) == (("@", "@home"), [], 1)


# Clones


@pytest.mark.parametrize("via", ["loop", "export"])
@pytest.mark.parametrize("filesystem", ["xfs", "btrfs", "ext4"])
def test_two_clones_at_once(images, tmp_path, filesystem, via):
    """The same UUID twice: each shows its own files."""
    clones, places = [], []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        clone = images.copy(images.get(filesystem), folder)
        place = tmp_path / f"at {name}"
        place.mkdir()
        mount(MountRequest(clone.path, place, via="loop", partition=clone.partition, writable=True))
        (place / "whose").write_text(name)
        unmount(place)
        clones.append(clone)
        places.append(place)
    before = [state_of(clone.files) for clone in clones]
    for clone, place in zip(clones, places, strict=True):
        here("mount", clone.path, place, "--via", via, *clone.chosen)
    whose = [(place / "whose").read_text() for place in places]
    for place in places:
        here("umount", place)
    assert whose == ["one", "two"]
    assert [state_of(clone.files) for clone in clones] == before


def test_two_disks(images, place, tmp_path):
    first, second = images.get("ext4"), images.get("xfs", "logical", "qcow2")
    here(
        *("mount", first.path, place, "--via", "export", "-A", second.path),
        *("-m", "/dev/sda2", "-m", "/dev/sdb5:/one"),
    )
    types = [row.type for row in mounts() if row.target.startswith(str(place))]
    found = tree(place)
    here("umount", place)
    assert types == ["ext4", "xfs"]
    inner = {
        path.removeprefix(b"/one"): node
        for path, node in found.items()
        if path.startswith(b"/one/")
    }
    assert inner == as_the_engine_reads_it(second.path, "-m", second.device)
