"""Mounts that the appliance serves: for root, for an ordinary user, and when they are cut short."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.host import (
    SIGKILLED,
    Done,
    Node,
    as_the_engine_reads_it,
    good,
    imgtool,
    mount_at,
    mounts,
    processes,
    run,
    started,
    state_of,
    tree,
    wait_for,
)
from tests.mount.images import Image

pytestmark = pytest.mark.appliance
REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
# An emulated appliance may take this long to start, or to be stopped while it does.
PATIENCE = 300


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _servers(folder: Path) -> list[int]:
    """The processes that serve a mount; libguestfs forks one that ends QEMU should it be killed."""
    return [pid for pid, command in processes().items() if f"appliance\0{folder}" in command]


def _appliance_below(pid: int) -> int | None:
    """The QEMU that a process started, or that one of its children did."""
    commands = processes()
    for child in _children(pid):
        if "qemu-system" in commands.get(child, ""):
            return child
        if (found := _appliance_below(child)) is not None:
            return found
    return None


def test_read_and_written(images, place, tmp_path):
    """One launch for all that root does with it."""
    image = images.copy(images.get("xfs", "logical", "chain"), tmp_path)
    expected = as_the_engine_reads_it(image.path, "-m", image.device)
    below = state_of(image.files[1:])
    words = ("mount", image.path, place, "--via", "fuse", "--rw", "-p", "5")
    done = imgtool(*words, limit=PATIENCE)
    assert done.status == 0, done.err
    assert mount_at(place).type == "fuse"
    assert {"rw", "nosuid", "nodev", "noexec"} <= mount_at(place).options
    (row,) = good("mounts", "-o", "jsonl").rows
    assert (row["state"], row["mechanism"], row["mode"]) == ("healthy", "fuse", "rw")
    assert tree(place) == expected

    other = tmp_path / "other"
    other.mkdir()
    again = imgtool("mount", image.path, other, "--via", "export", "-p", "5")
    assert again.status == 4  # it is being written to
    with (place / "noise").open("rb"):
        busy = imgtool("umount", place)
    assert busy.status == 4
    assert f"process {os.getpid()}" in busy.err
    assert good("cleanup").out == ""

    content = os.urandom(3_000_000)
    (place / "written").write_bytes(content)
    good("umount", place)
    assert state_of(image.files[1:]) == below
    run("qemu-img", "check", "-q", image.path)
    out = tmp_path / "out"
    out.mkdir()
    good("copy-out", image.path, "-m", image.device, "/written", out)
    assert (out / "written").read_bytes() == content


# As an ordinary user


@dataclass(frozen=True)
class User:
    """An ordinary user with folders of its own, who may have to see the repository elsewhere."""

    home: Path
    repository: Path

    def run(self, *words: object) -> subprocess.CompletedProcess[bytes]:
        """A Python command line of this user's."""
        packages = Path(sysconfig.get_path("purelib"))
        if packages.is_relative_to(REPOSITORY):
            packages = self.repository / packages.relative_to(REPOSITORY)
        env = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "TMPDIR": str(self.home),
            "PYTHONPATH": f"{self.repository}:{packages}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return subprocess.run(
            [os.path.realpath(sys.executable), *(str(word) for word in words)],
            capture_output=True,
            check=False,
            env=env,
            cwd=self.home,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            timeout=PATIENCE,
        )

    def imgtool(self, *words: object) -> Done:
        done = self.run("-m", "imgtool", *words)
        return Done(done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))

    def tree(self, root: Path) -> dict[bytes, Node]:
        """What this user sees there, who alone may look."""
        code = (
            "import pathlib, pickle, sys; from tests.mount.host import tree;"
            "sys.stdout.buffer.write(pickle.dumps(tree(pathlib.Path(sys.argv[1]))))"
        )
        done = self.run("-c", code, root)
        assert done.returncode == 0, done.stderr.decode()
        found: dict[bytes, Node] = pickle.loads(done.stdout)
        return found


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """nobody; the repository is shown to it where the folders above do not hide it."""
    for folder in (tmp_path, *tmp_path.parents):  # pytest keeps others out
        folder.chmod(folder.stat().st_mode | 0o011)
    home, repository = tmp_path / "home", tmp_path / "repository"
    for folder in (home, home / "run", repository):
        folder.mkdir(mode=0o700)
    repository.chmod(0o755)
    for folder in (home, home / "run"):
        os.chown(folder, NOBODY, NOBODY)
    run("mount", "--bind", REPOSITORY, repository)
    try:
        yield User(home, repository)
    finally:
        run("umount", "--lazy", repository)


def test_an_ordinary_user(images, user):
    """No root is needed, nobody else sees the files, and its own cleanup is enough."""
    shared = images.get("ext4", "gpt", "qcow2")
    expected = as_the_engine_reads_it(shared.path, "-m", shared.device)
    image = images.copy(shared, user.home)
    place = user.home / "place"
    place.mkdir()
    for path in (image.path, place):
        os.chown(path, NOBODY, NOBODY)
    before = state_of(image.files)

    refused = user.imgtool("mount", image.path, place, "--via", "export", *image.chosen)
    assert refused.status == 6
    assert "only root" in refused.err

    done = user.imgtool("mount", image.path, place, "-v", *image.chosen)
    assert done.status == 0, done.err
    assert "mechanism: fuse" in done.err
    assert {"ro", "nosuid", "nodev", "noexec"} <= mount_at(place).options
    (folder,) = (user.home / "run" / "imgtool").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    (row,) = user.imgtool("mounts", "-o", "jsonl").rows
    assert (row["user"], row["state"], row["mode"]) == ("nobody", "healthy", "ro")
    assert user.imgtool("cleanup").out == ""
    with pytest.raises(PermissionError):
        list(place.iterdir())  # not even root, who has not mounted it
    found = user.tree(place)
    assert set(found) == set(expected)
    readable = {path for path, node in expected.items() if node.mode & 0o004}
    assert {path: found[path] for path in readable} == {path: expected[path] for path in readable}

    server = min(_servers(folder), key=lambda pid: os.getsid(pid) != pid)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not _servers(folder), "the end of both processes")
    table = user.imgtool("mounts")
    assert "broken" in table.out
    assert "imgtool cleanup" in table.err
    cleaned = user.imgtool("cleanup")
    assert cleaned.status == 0, cleaned.err
    assert list((user.home / "run" / "imgtool").iterdir()) == []
    assert list(place.iterdir()) == []
    wait_for(lambda: not _qemus_of(user), "the appliance's end")
    assert state_of(image.files) == before


def _qemus_of(user: User) -> list[str]:
    return [c for c in processes().values() if "qemu" in c and f"{user.home}/" in c]


# Cut short


def _interrupted(place: Path, image: Image, number: signal.Signals) -> tuple[int, str]:
    """imgtool gets a signal while the appliance starts: its status, and what it said."""
    found: list[int] = []

    def launching() -> bool:
        found[:] = [pid for pid in [_appliance_below(process.pid)] if pid is not None]
        return bool(found)

    with started("mount", image.path, place, "--via", "fuse", *image.chosen) as process:
        wait_for(launching, "the appliance's start")
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)
    if number == signal.SIGKILL:
        done = imgtool("cleanup", limit=PATIENCE)
        assert done.status == 0, done.err
        assert str(place) in done.out
    assert not [row for row in mounts() if row.target == str(place)]
    wait_for(lambda: found[0] not in processes(), "the appliance's end")
    return process.returncode, said.decode()


def test_ctrl_c_while_the_appliance_starts(images, place):
    status, said = _interrupted(place, images.get("ext4"), signal.SIGINT)
    assert (status, said) == (130, "imgtool: error: interrupted\n")


@pytest.mark.long
def test_killed_while_the_appliance_starts(images, place):
    """It goes on by itself, and cleanup does not wait for it to be mounted."""
    status, _ = _interrupted(place, images.get("ext4"), signal.SIGKILL)
    assert status == SIGKILLED


def test_a_subvolume_by_the_hosts_kernel(images, place):
    image = images.get("btrfs")
    before = state_of(image.files)
    words = ("mount", image.path, place, "--via", "loop", "-m", f"btrfsvol:{image.device}/inner")
    done = imgtool(*words, limit=PATIENCE)
    assert done.status == 0, done.err
    assert [path.name for path in place.iterdir()] == ["inside"]
    assert {"ro", "subvol=/inner"} <= mount_at(place).options
    good("umount", place)
    assert state_of(image.files) == before
