"""Where there are no namespaces: containers as docker and podman make them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.box import PACKAGES, ROOT, Box
from tests.support.roots import host_release, root_archive, unpacked

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="runc makes containers as root")


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    """Containers, and a folder with the image of an ext4."""
    with (
        unpacked(root_archive(host_release(), PACKAGES)) as root,
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
    ):
        images = Path(folder)
        images.chmod(0o755)
        tree = images / "tree"
        (tree / "etc").mkdir(parents=True)
        (tree / "etc/hostname").write_text("guest\n")
        (tree / "etc/large").write_bytes(os.urandom(3 << 20))
        raw = images / "disk.img"
        with raw.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, raw], check=True)
        subprocess.run(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, images / "disk.qcow2"],
            check=True,
        )
        yield Box(root, images)


@pytest.mark.parametrize("user", [0, 1000])
def test_a_container_reads_what_the_host_reads(box, user):
    words = ("ls", box.images / "disk.qcow2", "/", "-Rl", "--checksum", "sha256")
    here = subprocess.run(
        [sys.executable, "-m", "imgtool", *words], capture_output=True, text=True, check=True
    )
    done = box.imgtool(*words, "-v", "--engine", "direct", user=user)
    assert done.returncode == 0, done.stderr
    assert done.stdout == here.stdout
    assert "sandbox: none by namespaces" in done.stderr
    assert "(Landlock)" in done.stderr


@pytest.mark.parametrize("user", [0, 1000])
def test_images_of_one_owner_are_read_by_the_owner(box, user):
    image = box.images / "disk.qcow2"
    before = image.stat()
    try:
        os.chown(image, user, user)
        image.chmod(0o600)
        done = box.imgtool("cat", image, "/etc/hostname", "--engine", "direct", user=user)
        assert (done.returncode, done.stdout) == (0, "guest\n"), done.stderr
    finally:
        os.chown(image, before.st_uid, before.st_gid)
        image.chmod(before.st_mode & 0o7777)


@pytest.mark.parametrize("user", [0, 1000])
def test_nothing_gets_out_of_the_sandbox_in_a_container(box, user):
    """The tests of the sandbox itself, where there are no namespaces."""
    done = box.run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(
            "-k",
            "Landlock and not reads_the_same",
            ROOT / "tests/unit/engines/direct/parent/test_sandbox.py",
        ),
        user=user,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert " passed" in done.stdout and " failed" not in done.stdout


def test_doctor_says_which_sandbox_is_used(box):
    done = box.imgtool("doctor", "-o", "csv", user=1000)
    rows = [line for line in done.stdout.splitlines() if line.startswith("sandbox")]
    assert "works, and is used" in rows[1] and "Landlock" in rows[1]
    assert "works" not in rows[0] and "user namespaces" in rows[0]


LANDLOCK = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")


@pytest.mark.parametrize("engine", ["direct", "auto"])
def test_without_any_sandbox_nothing_is_read(box, engine):
    """And there is no kernel for the appliance either."""
    image = box.images / "disk.qcow2"
    done = box.imgtool("ls", image, "/", "--engine", engine, user=1000, without=LANDLOCK)
    assert (done.returncode, done.stdout) == (6, "")
    assert "no sandbox can be had (namespaces: " in done.stderr
    assert "Landlock: this kernel has no Landlock" in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
