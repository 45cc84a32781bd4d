"""Fixtures of the host mount tests; none of these tests may leave anything on the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import host
from tests.mount.images import Images


@pytest.fixture(scope="session", autouse=True)
def needed() -> None:
    """These tests are about this host's kernel: where it cannot mount, they fail."""
    if os.geteuid() != 0:
        pytest.fail("the tests of host mounts have to be run as root")
    for path in ("/dev/loop-control", "/dev/fuse"):
        if not Path(path).exists():
            pytest.fail(f"the tests of host mounts need {path}")
    host.imgtool("cleanup")  # of what commands that other tests have killed have left
    types = Path("/proc/filesystems").read_text().split()
    for name in ("ext4", "xfs", "btrfs"):
        if name not in types:
            host.run("modprobe", name)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, needed: None) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory, needed: None) -> Iterator[None]:
    """After each test the host holds what it held before."""
    ours = tmp_path_factory.getbasetemp()
    before = host.held(ours)
    yield
    left = host.held(ours) - before
    host.let_go(left)
    assert not left, "left behind: " + "; ".join(str(thing) for thing in sorted(left))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory to mount at."""
    folder = tmp_path / "mount point"
    folder.mkdir()
    return folder
