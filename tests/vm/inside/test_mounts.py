"""Host mounts through kpartx, nbd, loop and export, with LVM: for real, as root.

Every call of `mount` stands for a command; imgtool's modules are imported once, since Python takes
seconds to start in here. A command that is to be killed runs in a fork.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imgtool.errors import NotInGuestError, RefusedError
from imgtool.guest.model import Mount
from imgtool.mount.journal import journals
from imgtool.mount.mounter import MountRequest
from imgtool.mount.mounting import clean_up, mount, unmount
from tests.vm.images import FILES, GROUP, KINDS, MIB, PARTITIONS, SNAPSHOT
from tests.vm.inside.machine import loop_device, run, settle, sparse


@dataclass(frozen=True)
class Images:
    """The same disk in three formats and at a snapshot, and a filesystem of each kind alone."""

    disks: dict[str, Path]
    whole: dict[str, Path]

    def state(self) -> list[tuple[int, ...]]:
        """Size, blocks and times of all of them; their bytes are compared outside."""
        found: list[tuple[int, ...]] = []
        for path in (*self.disks.values(), *self.whole.values()):
            status = path.stat()
            found.append((status.st_size, status.st_blocks, status.st_mtime_ns, status.st_ctime_ns))
        return found


def _make_group(device: str, name: str, volumes: dict[str, int]) -> None:
    run("vgcreate", "-qq", name, device)
    for volume, size in volumes.items():
        run("lvcreate", "-qq", "-y", "-n", volume, "-L", f"{size}m", name)


@pytest.fixture(scope="session")
def images() -> Images:
    """What `tests.vm.images` made outside."""
    for module in ("loop", "dm-mod", "fuse"):
        run("modprobe", module)
    folder = Path(os.environ["IMGTOOL_VM_IMAGES"])
    disks = {
        "raw": "disk.raw",
        "qcow2": "disk.qcow2",
        "chain": "overlay.qcow2",
        "snapshot": "saved.qcow2",
    }
    return Images(
        {format: folder / name for format, name in disks.items()},
        {kind: folder / f"{kind}.raw" for kind in KINDS},
    )


@dataclass(frozen=True)
class Held:
    """What the machine holds of devices, mounts and processes."""

    loops: str
    mapped: str
    mounts: str
    nbd: str
    processes: str
    files: str


def held() -> Held:
    settle()
    nbd = list(Path("/sys/block").glob("nbd*/pid"))
    listed = subprocess.run(
        ["pgrep", "-a", "qemu-nbd|qemu-storage|ntfs-3g"], capture_output=True, text=True
    )
    files = [
        str(path)
        for folder in ("/run/imgtool", "/run/udev/rules.d")
        if Path(folder).is_dir()
        for path in Path(folder).iterdir()
    ]
    return Held(
        run("losetup", "--list", "--noheadings", "-O", "NAME,BACK-FILE,OFFSET"),
        run("dmsetup", "info", "-c", "--noheadings", "-o", "name,uuid"),
        "\n".join(
            line.split(" ", 4)[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
        ),
        str(sorted(nbd)),
        listed.stdout,
        str(sorted(files)),
    )


@pytest.fixture
def nothing_left(images: Images) -> Iterator[None]:
    """After the test the machine holds what it held before, and the images are the same."""
    before, state = held(), images.state()
    yield
    for journal in journals():
        with contextlib.suppress(Exception):  # what a failed test left; the test says why
            unmount(Path(journal.mountpoint))
    assert held() == before
    assert images.state() == state


def shown(folder: Path) -> dict[str, bytes]:
    """The files below a folder that are of the tree that was put in."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lost+found", "System Volume Information"}


def layout(source: dict[str, str]) -> list[Mount]:
    return [Mount(device, "/" if kind == "ext4" else f"/{kind}") for kind, device in source.items()]


VOLUMES = {kind: f"/dev/{GROUP}/{kind}" for kind in KINDS}
PLACES = {
    "partitions": {kind: f"/dev/sda{PARTITIONS[kind]}" for kind in KINDS},
    "volumes": VOLUMES,
}
WAYS = [
    ("kpartx", "raw"),
    ("loop", "raw"),
    ("nbd", "qcow2"),
    ("nbd", "chain"),
    ("export", "qcow2"),
    ("export", "chain"),
]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("places", list(PLACES))
@pytest.mark.parametrize(("via", "format"), WAYS)
def test_every_filesystem_is_shown_whole(
    via: str, format: str, places: str, images: Images, tmp_path: Path
) -> None:
    mount(MountRequest(images.disks[format], tmp_path, via=via, mounts=layout(PLACES[places])))
    try:
        for kind in KINDS:
            folder = tmp_path if kind == "ext4" else tmp_path / kind
            assert shown(folder) == FILES, kind
            top = {name.split("/")[0] for name in FILES}
            assert names(folder) == top | set(KINDS[1:])
            (row,) = [
                line.split(" ")
                for line in Path("/proc/self/mounts").read_text().splitlines()
                if line.split(" ")[1] == str(folder)
            ]
            assert {"ro", "nosuid", "nodev", "noexec"} <= set(row[3].split(","))
    finally:
        unmount(tmp_path)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_disk(kind: str, images: Images, tmp_path: Path) -> None:
    mount(MountRequest(images.whole[kind], tmp_path, via="nbd", mounts=[Mount("/dev/sda", "/")]))
    try:
        assert shown(tmp_path) == FILES
    finally:
        unmount(tmp_path)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("via", ["nbd", "export"])
def test_a_snapshot(via: str, images: Images, tmp_path: Path) -> None:
    """Today the disk holds nothing."""
    wanted = MountRequest(images.disks["snapshot"], tmp_path, via=via, lv=f"{GROUP}/ext4")
    mount(replace(wanted, snapshot=SNAPSHOT))
    try:
        assert shown(tmp_path) == FILES
    finally:
        unmount(tmp_path)
    with pytest.raises(NotInGuestError, match="no such volume group"):
        mount(wanted)


@pytest.mark.usefixtures("nothing_left")
def test_what_is_mounted_is_what_copy_out_gives(images: Images, tmp_path: Path) -> None:
    """The other tests compare with what was put in; so does this, of copy-out."""
    for kind in ("xfs", "vfat"):
        out = tmp_path / kind
        device = f"/dev/sda{PARTITIONS[kind]}"
        command = [sys.executable, "-m", "imgtool", "copy-out", "-m", device, "--engine", "direct"]
        run(*command, str(images.disks["qcow2"]), "/", str(out))
        assert shown(out) == FILES


@pytest.mark.usefixtures("nothing_left")
def test_clones_at_once_and_a_host_group_of_the_same_name_work(
    images: Images, tmp_path: Path
) -> None:
    disk = sparse(tmp_path / "host.raw", 64 * MIB)
    with loop_device(disk) as device:
        _make_group(device, GROUP, {"ext4": 16})
        run("mkfs.ext4", "-q", f"/dev/{GROUP}/ext4")
        host = run("dmsetup", "table")
        clone = Path(shutil.copy(images.disks["raw"], tmp_path / "clone.raw"))
        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir()
        second.mkdir()
        wanted = MountRequest(images.disks["qcow2"], first, via="nbd", lv=f"{GROUP}/xfs")
        mount(wanted)
        mount(replace(wanted, image=clone, mountpoint=second, via="kpartx"))
        try:
            assert shown(first) == shown(second) == FILES
            for line in host.splitlines():
                assert line in run("dmsetup", "table")
        finally:
            unmount(first)
            unmount(second)
        with pytest.raises(RefusedError, match="volume group of this name"):
            mount(replace(wanted, image=clone, mountpoint=second, via="loop", writable=True))
        assert run("dmsetup", "table") == host
        run("vgremove", "-qq", "-f", GROUP)


@pytest.mark.usefixtures("nothing_left")
def test_writing_to_a_volume_reaches_the_image(images: Images, tmp_path: Path) -> None:
    image = Path(shutil.copy(images.disks["qcow2"], tmp_path / "copy.qcow2"))
    at = tmp_path / "at"
    at.mkdir()
    wanted = MountRequest(image, at, via="nbd", lv=f"{GROUP}/ext4", writable=True)
    mount(wanted)
    (at / "written").write_bytes(b"new")
    unmount(at)
    mount(replace(wanted, writable=False))
    try:
        assert (at / "written").read_bytes() == b"new"
        assert shown(at) == FILES
    finally:
        unmount(at)


# Killed


def steps_of(*kinds: str) -> list[str]:
    points = [f"{when} {kind}" for kind in kinds for when in ("before", "after")]
    points += ["finished"]
    points += [f"{when} undoing {kind}" for kind in reversed(kinds) for when in ("before", "after")]
    return [*points, "before removing"]


ALL = {
    "nbd": steps_of("guard", "overlay", "nbd", "volumes", "mount"),
    "kpartx": steps_of("guard", "overlay", "export", "loop", "mapping", "volumes", "mount"),
    "snapshot": [point for point in steps_of("snapshot") if point.endswith("snapshot")],
}
SHORT = {
    "nbd": ["after nbd", "after volumes", "before undoing volumes", "after undoing nbd"],
    "kpartx": ["after mapping", "before undoing mapping"],
    "snapshot": ["after snapshot"],
}
KILLS = [(way, point) for way, points in SHORT.items() for point in points]
MORE = [(way, point) for way, points in ALL.items() for point in points if point not in SHORT[way]]


def _killed_at(point: str, wanted: MountRequest) -> bool:
    """Mount and unmount in a process that dies at this point; whether it did."""
    child = os.fork()
    if child == 0:
        os.environ["IMGTOOL_MOUNT_FAILPOINT"] = point
        try:
            mount(wanted)
            unmount(wanted.mountpoint)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("way", "point"),
    [*KILLS, *(pytest.param(*kill, marks=pytest.mark.long) for kill in MORE)],
)
def test_what_a_kill_left_is_cleaned_up(
    way: str, point: str, images: Images, tmp_path: Path
) -> None:
    """With a loop device, and a volume group, that are somebody else's."""
    at = tmp_path / "at"
    at.mkdir()
    format, via = {"kpartx": ("raw", way), "nbd": ("qcow2", way)}.get(way, (way, "nbd"))
    wanted = MountRequest(images.disks[format], at, via=via, lv=f"{GROUP}/xfs")
    if way == "snapshot":
        wanted = replace(wanted, snapshot=SNAPSHOT)
    with (
        loop_device(images.disks["raw"]),
        loop_device(sparse(tmp_path / "decoy.raw", 32 * MIB)) as device,
    ):
        _make_group(device, "decoy", {"one": 8})
        try:
            before = held()
            assert _killed_at(point, wanted)
            cleaned = clean_up()
            assert all(row.error is None for row in cleaned)
            if point == "finished":
                assert not cleaned, "a mount that is there and healthy is nobody's leftover"
                assert shown(at) == FILES
                unmount(at)
            assert held() == before
            assert run("vgs", "--noheadings", "-o", "vg_name", "decoy").strip() == "decoy"
        finally:
            run("vgremove", "-qq", "-f", "decoy")
