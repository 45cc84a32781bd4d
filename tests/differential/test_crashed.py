"""A guest that died with its journal full: read at once, as the kernel would mount it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool import open_guest
from imgtool.engines.direct.replay import host
from imgtool.errors import ImageError, ImgtoolError
from imgtool.guest.model import Mount
from imgtool.host.process import run
from tests.unit.engines.direct.parent.test_sandbox import ATTACK

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(),
    reason="needs root and loop devices: a filesystem is crashed by copying it while mounted",
)


@contextlib.contextmanager
def mounted(image: Path, place: Path, options: str = "rw") -> Iterator[Path]:
    """The image, mounted by the kernel; on a device that can be written, so that it recovers."""
    place.mkdir()
    device = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mount", "-o", options, device, place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def crashed(tmp_path: Path, kind: str, size: int = 128 << 20, *options: str) -> Path:
    """An image as it is when the power goes: files, links and deletions only in the journal."""
    live, image = tmp_path / "live.img", tmp_path / f"{kind}.img"
    with live.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-b", "4096", "-t", kind, *options, live], check=True)
    with mounted(live, tmp_path / "live") as root:
        (root / "kept").write_bytes(b"from before\n")
        (root / "gone").write_bytes(b"deleted before the crash\n")
        (root / "folder").mkdir()
        os.sync()
        held = (root / "held").open("wb")  # deleted but open: an orphan for the journal
        held.write(bytes(100_000))
        held.flush()
        for number in range(200):
            (root / "folder" / f"file {number}").write_bytes(b"%d\n" % number * 50)
        (root / "link").symlink_to("folder/file 7")
        (root / "gone").unlink()
        (root / "held").unlink()
        for name in ("folder", "."):
            descriptor = os.open(root / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        for path in (root / "folder").iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        subprocess.run(["cp", "--sparse=always", live, image], check=True)
        held.close()
    features = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, check=True).stdout
    assert b"needs_recovery" in features
    return image


def e2fsck_version() -> tuple[int, ...]:
    said = subprocess.run(["e2fsck", "-V"], capture_output=True, text=True, check=True).stderr
    return tuple(int(word) for word in said.split()[1].split("."))


@pytest.mark.parametrize(
    ("kind", "features"), [("ext3", "none"), ("ext4", "^orphan_file"), ("ext4", "orphan_file")]
)
def test_it_is_read_as_the_kernel_would_mount_it(tmp_path, kind, features):
    image = crashed(tmp_path, kind, 128 << 20, *([] if kind == "ext3" else ["-O", features]))
    if features == "orphan_file":  # what e2fsprogs makes since 1.47.1
        said = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, check=True).stdout
        assert b"orphan_present" in said
        if e2fsck_version() < (1, 47, 1):  # which leaves the file of orphans as it was
            with (
                pytest.raises(ImageError, match="orphan_present"),
                open_guest(image, format="raw", engine="direct") as guest,
            ):
                guest.lstat("/")
            return
    before = (hashlib.sha256(image.read_bytes()).hexdigest(), image.stat().st_mtime_ns)
    with open_guest(image, format="raw", engine="direct") as guest:
        ours = {
            entry.path: (entry.mode, entry.size, entry.mtime_ns, entry.nlink, entry.checksum)
            for entry in guest.walk("/", checksum="sha256")
        }
        (usage,) = guest.usage()
    assert (hashlib.sha256(image.read_bytes()).hexdigest(), image.stat().st_mtime_ns) == before
    theirs = {}
    with mounted(image, tmp_path / "kernel", "ro") as root:
        space = os.statvfs(root)
        for path in root.rglob("*"):
            about = path.lstat()
            plain = path.is_file() and not path.is_symlink()
            checksum = hashlib.sha256(path.read_bytes()).hexdigest() if plain else None
            name = b"/" + os.fsencode(path.relative_to(root))
            kept = (about.st_mode, about.st_size, about.st_mtime_ns, about.st_nlink, checksum)
            theirs[name] = kept
    assert ours == theirs
    assert b"/folder/file 199" in ours
    assert b"/gone" not in ours
    assert usage.size == space.f_blocks * space.f_frsize
    assert usage.used == (space.f_blocks - space.f_bfree) * space.f_frsize
    assert usage.available == space.f_bavail * space.f_frsize
    assert usage.inodes_used == space.f_files - space.f_ffree


def walked(root: Path) -> dict[bytes, tuple[int, int, int]]:
    """What the kernel shows, where it can look at it at all: without its journal not everything."""
    found = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                about = os.lstat(path)
                found[b"/" + os.path.relpath(path, os.fsencode(root))] = (
                    *(about.st_mode, about.st_size, about.st_mtime_ns),
                )
    return found


@pytest.mark.parametrize("kind", ["ext3", "ext4"])
def test_it_is_read_without_its_journal_where_that_is_said(tmp_path, kind):
    image = crashed(tmp_path, kind)
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    mounts = [Mount("/dev/sda", "/", "noload")]
    with open_guest(image, format="raw", engine="direct", mounts=mounts) as guest:
        ours = {
            entry.path: (entry.mode, entry.size, entry.mtime_ns)
            for entry in guest.walk("/", on_problem=lambda path, line: None)
        }
        kept = guest.read_bytes("/kept")
    assert kept == b"from before\n"
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before
    with mounted(image, tmp_path / "kernel", "ro,noload") as root:
        theirs = walked(root)
    assert ours == theirs
    with open_guest(image, format="raw", engine="direct") as guest:
        replayed = {entry.path for entry in guest.walk("/")}
    assert replayed - set(ours), "the journal has what is not there without it"


def test_an_xfs_is_read_without_its_log_where_that_is_said(tmp_path):
    live, image = tmp_path / "live.img", tmp_path / "xfs.img"
    with live.open("wb") as file:
        file.truncate(320 << 20)
    subprocess.run(["mkfs.xfs", "-q", live], check=True)
    with mounted(live, tmp_path / "live") as root:
        (root / "kept").write_bytes(b"from before\n")
        subprocess.run(["sync", "-f", root], check=True)
        subprocess.run(["xfs_freeze", "-f", root], check=True)  # what is there is on the disk
        subprocess.run(["xfs_freeze", "-u", root], check=True)
        for number in range(50):
            with (root / f"late {number}").open("wb") as late:
                late.write(b"late")
                os.fsync(late.fileno())
        subprocess.run(["cp", "--sparse=always", live, image], check=True)
    with (
        pytest.raises(ImgtoolError),
        open_guest(image, format="raw", engine="direct") as guest,
    ):
        guest.read_bytes("/kept")
    mounts = [Mount("/dev/sda", "/", "norecovery")]
    with open_guest(image, format="raw", engine="direct", mounts=mounts) as guest:
        ours = {
            entry.path: (entry.mode, entry.size, entry.mtime_ns)
            for entry in guest.walk("/", on_problem=lambda path, line: None)
        }
        assert guest.read_bytes("/kept") == b"from before\n"
    with mounted(image, tmp_path / "kernel", "ro,norecovery") as root:
        assert ours == walked(root)


def test_a_crashed_partition_behind_an_overlay(tmp_path):
    image = crashed(tmp_path, "ext4")
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(160 << 20)
    table = "label: gpt\nstart=8192, size=262144\n"
    subprocess.run(["sfdisk", "-q", disk], input=table.encode(), check=True)
    with disk.open("rb+") as file:
        file.seek(8192 * 512)
        file.write(image.read_bytes())
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk.name, overlay],
        check=True,
    )
    with open_guest(overlay, engine="direct") as guest:
        assert guest.read_bytes("/link") == b"7\n" * 50


def test_two_crashed_partitions_of_one_disk(tmp_path):
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(320 << 20)
    table = "label: gpt\nstart=8192, size=262144\nstart=278528, size=262144\n"
    subprocess.run(["sfdisk", "-q", disk], input=table.encode(), check=True)
    for kind, start in (("ext4", 8192), ("ext3", 278528)):
        (tmp_path / kind).mkdir()
        with disk.open("rb+") as file:
            file.seek(start * 512)
            file.write(crashed(tmp_path / kind, kind).read_bytes())
    for device in ("/dev/sda1", "/dev/sda2"):
        with open_guest(disk, format="raw", engine="direct", mounts=[Mount(device, "/")]) as guest:
            assert guest.read_bytes("/link") == b"7\n" * 50


def test_a_crashed_filesystem_whose_journal_lies_far_behind(tmp_path):
    image = crashed(tmp_path, "ext4", size=20 << 30)
    with open_guest(image, format="raw", engine="direct") as guest:
        assert guest.read_bytes("/link") == b"7\n" * 50


def test_a_journal_that_cannot_be_replayed_is_refused(tmp_path):
    image = crashed(tmp_path, "ext4")
    offset = subprocess.run(
        ["debugfs", "-R", "bmap <8> 0", image], capture_output=True, check=True
    ).stdout
    with image.open("rb+") as file:
        file.seek(int(offset.split()[-1]) * 4096)
        file.write(b"\xff" * 4096)  # the journal's own superblock
    with (
        pytest.raises(ImageError, match="journal"),
        open_guest(image, format="raw", engine="direct") as guest,
    ):
        list(guest.walk("/"))


def test_the_command_says_what_it_did(tmp_path):
    image = crashed(tmp_path, "ext4")
    words = ("ls", image, "/folder", "-v", "-o", "json", "--format", "raw")
    done = subprocess.run(
        [sys.executable, "-m", "imgtool", *words], capture_output=True, check=True
    )
    assert len(json.loads(done.stdout)) == 200
    assert b"engine: direct" in done.stderr
    assert b"journal: replayed" in done.stderr


# The sandbox of the replay, where the first program that looks at the image is somebody else's.
TAKEN_OVER = """
import sys; sys.path[:0] = {paths!r}
import os
from imgtool.engines.direct.replay import inside
from imgtool.engines.direct.wire import seccomp
from imgtool.engines.direct.worker import launcher
if not {filtered}:
    seccomp.confine = lambda program: None
begin = launcher.start
def start(argv, descriptors, **options):
    launcher.start = begin
    with open("/tmp/code", "w") as file:
        file.write({code!r})
    os.waitpid(begin(["/usr/bin/python3", "-I", "-S", "-B", "/tmp/code"], {{1: 1}}, **options), 0)
    return begin(argv, descriptors, **options)
launcher.start = start
inside.main()
"""
BEYOND = """
def rights():
    held = (ctypes.c_uint32 * 6)()
    assert not libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), held)
    return list(held)
said["rights"] = rights()
os.unlink("/tmp/x")  # which has filled it
attempt("overlay beyond its limit", lambda: os.truncate("/work/0", (4 << 30) + 1))
attempt("overlay removed", lambda: os.unlink("/work/0"))
os.write(1, json.dumps(said).encode() + bytes((10,)))
"""


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "first filter alone"])
@pytest.mark.parametrize("owner", [None, 4321])
def test_what_replays_a_journal_has_no_rights(tmp_path, monkeypatch, owner, filtered):
    said = []

    def listened(*words, **options):
        done = run(*words, **options)
        first, _, last = done.stdout.partition(b"\n")
        said.append(json.loads(first))
        return subprocess.CompletedProcess(done.args, done.returncode, last, done.stderr)

    nothing = {
        **dict.fromkeys(("secret", "local socket", "abstract socket"), "/nowhere/x"),
        **{"image": "/images/0", "seen": "/images/0", "pid": os.getpid(), "port": 1},
    }
    code = f"targets = {nothing!r}\n{ATTACK}{BEYOND}"
    program = TAKEN_OVER.replace("{code!r}", repr(code).replace("{", "{{").replace("}", "}}"))
    monkeypatch.setattr(host, "_START", program.replace("{filtered}", str(filtered)))
    monkeypatch.setattr(host, "run", listened)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        image = Path(shutil.copy(crashed(tmp_path, "ext4"), folder))
        image.chmod(0o600)
        if owner is not None:
            os.chown(image, owner, owner)
        before = hashlib.sha256(image.read_bytes()).hexdigest()
        with open_guest(image, format="raw", engine="direct") as guest:
            assert guest.read_bytes("/link") == b"7\n" * 50
        assert hashlib.sha256(image.read_bytes()).hexdigest() == before
    (found,) = said
    rights = 4 if os.geteuid() == 0 else 0  # CAP_DAC_READ_SEARCH
    assert found.pop("rights") == [rights, rights, rights, 0, 0, 0]
    found.pop("thread")
    if not filtered:
        found.pop("program")
        found.pop("process by fork")
        found.pop("life after the parent")
    assert {name: result for name, result in found.items() if result.startswith("done")} == {}
    assert len(found) >= 100


# An e2fsck that writes into the overlay, whichever limit there is for a file's size.
FILLING = """
import sys; sys.path[:0] = {paths!r}
from imgtool.engines.direct.replay import inside
from imgtool.engines.direct.worker import launcher
begin = launcher.start
FILL = "import time; open('/work/0', 'wb').write(bytes(16 << 20)); time.sleep(60)"
def start(argv, descriptors, **options):
    if argv[0] == "/usr/bin/e2fsck":
        argv = ["/usr/bin/python3", "-I", "-S", "-B", "-c", FILL]
    return begin(argv, descriptors, **options)
launcher.start = start
inside._OVERLAYS = 8 << 20
inside.main()
"""


def test_what_replays_a_journal_cannot_fill_the_host(tmp_path, monkeypatch):
    image = crashed(tmp_path, "ext4")
    monkeypatch.setattr(host, "_START", FILLING)
    with (
        pytest.raises(ImageError, match="takes too much room"),
        open_guest(image, format="raw", engine="direct"),
    ):
        pass
